"""Sampling batches: planned, generated, written to S3 and found again."""
