"""Training a pruned model back to health while its masks hold."""
