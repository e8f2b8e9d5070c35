"""The family: configuration, network and model."""
