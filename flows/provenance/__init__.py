"""Provenance: tracing generated images back to their data, and reproducing them."""
