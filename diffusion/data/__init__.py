"""From a folder of pictures to WebDataset shards with a manifest, and from those to batches."""
