"""Pruned models with one bit a weight and the kept values: the file format and the CPU runtime."""
