"""What every part stands on: errors, processes, signals, files, memory. Imports no other part of the pipeline."""
