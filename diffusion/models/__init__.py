"""Networks and their configuration."""
