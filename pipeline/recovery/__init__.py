"""Recovery: trains a pruned model while its masks hold."""
