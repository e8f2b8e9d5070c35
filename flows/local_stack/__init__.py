"""Local stack of development servers: MLflow, Prefect with a worker, and a real S3 server."""

from flows.local_stack.control import ServiceStatus, StackStatus, down, exports, status, up

__all__ = ["ServiceStatus", "StackStatus", "down", "exports", "status", "up"]
