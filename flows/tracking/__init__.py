"""MLflow runs, the buffered logger, progress and logs."""
