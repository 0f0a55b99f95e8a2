"""The layer-by-layer engine: finds blocks and matrices by structure, and runs a forward that pauses at each block."""
