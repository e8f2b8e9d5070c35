"""Feature extractors and the classifiers on top of them."""
