"""Typed settings, read from recipes and the command line."""
