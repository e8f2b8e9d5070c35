"""Sampling batches: planning, generation, storage on S3, and lookup."""
