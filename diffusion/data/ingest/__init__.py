"""Ingest: images from any source into WebDataset shards, without duplicates, with a manifest."""
