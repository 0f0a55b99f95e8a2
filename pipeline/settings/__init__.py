"""From a recipe and the command line to typed settings, and from lists of settings to a sweep."""
