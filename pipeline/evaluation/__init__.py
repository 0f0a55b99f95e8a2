"""Perplexity, zero-shot tasks and continuations, with the errors of their differences."""
