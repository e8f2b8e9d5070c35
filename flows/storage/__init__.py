"""S3 storage: write-once, verified objects and numbered objects."""
