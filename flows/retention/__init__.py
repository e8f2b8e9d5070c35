"""Garbage collection: data set versions, runs, sampling batches and files that nothing needs any more."""
