"""Pruning: methods, scores, refinements, weight updates, allocations, the order of channels, and calibration."""
