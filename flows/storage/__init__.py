"""S3 storage: write-once, verified objects, multipart uploads and numbered objects."""
