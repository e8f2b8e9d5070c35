"""S3 as a store of whole, checked, write-once objects."""
