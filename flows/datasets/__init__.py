"""Data sets in operation: DVC, the catalog of versions on S3, checkout and purge."""
