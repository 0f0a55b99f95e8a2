"""Compact models, stored as one bit per weight and the kept values: file format and CPU runtime."""
