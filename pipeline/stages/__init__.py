"""The stages of a run, one file each, and what decides whether one is done."""
