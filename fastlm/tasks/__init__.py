"""What is learned: losses, metrics and predictions over a model."""
