"""Evaluation of models: features, metrics with errors and real baselines, comparisons, and HTML reports."""
