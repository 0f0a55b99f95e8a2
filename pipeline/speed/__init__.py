"""Measures load time, memory and tokens per second of models on this machine."""
