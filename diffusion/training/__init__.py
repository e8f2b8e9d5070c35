"""Training: from a data set to checkpoints and a final model."""
