"""Text: where it comes from, and the windows of tokens that are cut from it."""
