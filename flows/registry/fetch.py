"""Weights of registered versions for ``diffusion.load``, which finds this by the entry point ``darkroom.registry``."""

from pathlib import Path

from flows.local_stack.http_api import require
from flows.local_stack.stack import join_servers


def fetch_weights(uri: str) -> Path:
    """Join the servers, and fetch the weights of the version ``uri`` unless they are on this machine.

    Raises UserError if there is no such version or no server, and DarkroomError if a server does not answer.
    """
    join_servers("mlflow", "s3")
    require("mlflow", "s3")
    # Clients read the environment that was just set.
    from mlflow.client import MlflowClient

    from flows.registry import model_versions

    return model_versions.cached_weights(model_versions.resolve(MlflowClient(), uri))
