"""Data sets: from a folder of images to WebDataset shards with a manifest, and from those to batches."""
