"""Sparsity patterns, and the masks that follow them: packed, saved, applied, checked."""
