"""Scores, updates, methods and allocations of pruning."""
