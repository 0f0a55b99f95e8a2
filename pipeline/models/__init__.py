"""Model folders: loading, dequantisation, file names, placement and rewriting."""
