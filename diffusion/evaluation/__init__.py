"""How good a model's pictures are: features, scores with their floor and error, and a page to look at."""
