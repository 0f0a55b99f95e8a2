"""Model folders: which class loads one, its files and names, quantised input, and how one is written."""
