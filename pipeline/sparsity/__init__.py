"""Sparsity patterns and masks."""
