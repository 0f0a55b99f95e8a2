"""Evaluation: perplexity, zero-shot tasks, accuracy, continuations, and paired errors of differences between models."""
