"""The stages of a run, one file each, and the runner that decides which of them run."""
