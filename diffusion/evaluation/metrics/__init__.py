"""Metrics of generated images, each with its definition and source."""
