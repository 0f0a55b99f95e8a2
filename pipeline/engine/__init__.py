"""The layer-by-layer engine: blocks and matrices found by structure, and the forward that is paused at each block."""
