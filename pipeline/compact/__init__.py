"""Compact models, stored as one bit per weight and the kept values: file format, and runtime on CPUs and GPUs."""
