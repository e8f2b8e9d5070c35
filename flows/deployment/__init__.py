"""What Prefect runs by itself: deployments, tasks, concurrency slots."""
