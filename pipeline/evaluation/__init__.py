"""Evaluation: perplexity, zero-shot tasks, continuations, and paired errors of their differences."""
