"""Pruning: methods, scores, weight updates, allocations and calibration."""
