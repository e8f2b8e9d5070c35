"""Generation: a model and a request in, images out."""
