"""Errors, processes, signals, files, memory. Imports no other part of the pipeline."""
