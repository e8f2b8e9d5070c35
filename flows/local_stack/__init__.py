"""Local stack of development servers: MLflow, Prefect with a worker, and a real S3 server."""
