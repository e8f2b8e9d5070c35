"""Garbage collection of unreferenced data set versions, runs, sampling batches and local files."""
