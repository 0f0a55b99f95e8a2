"""What models cost on this machine: load time, memory, tokens per second."""
