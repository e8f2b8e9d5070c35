"""Environment variables of Darkroom and its servers."""

import os
from pathlib import Path
from typing import Literal, get_args
from urllib.request import getproxies

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from diffusion.common.errors import UserError, describe_validation_error
from diffusion.data.ingest.config import CaptionProgram
from diffusion.generation.config import GenerationLimits

Server = Literal["mlflow", "prefect", "s3"]
SERVERS: tuple[Server, ...] = get_args(Server)
SERVER_VARIABLES: dict[Server, tuple[str, ...]] = {
    "mlflow": ("MLFLOW_TRACKING_URI",),
    "prefect": ("PREFECT_API_URL",),
    "s3": (
        *("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ROLE_ARN"),
        *("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"),
    ),
}
"""Variables any of which names the server to use; the first is the one to set."""
SECRET_VARIABLE: dict[Server, str] = {
    "mlflow": "MLFLOW_TRACKING_PASSWORD",
    "prefect": "PREFECT_API_AUTH_STRING",
    "s3": "AWS_SECRET_ACCESS_KEY",
}
SERVER_TITLES: dict[Server, str] = {"mlflow": "MLflow", "prefect": "Prefect", "s3": "S3"}
DEFAULTS = {
    # Nothing from storage is unpickled; MLflow's default allows it.
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # Seconds. Heartbeats show which runs are alive: see flows/deployment/tasks.py.
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60",
    "DVC_NO_ANALYTICS": "1",
    # Prefect's client has telemetry of its own.
    "DO_NOT_TRACK": "true",
}
WORKER_VARIABLES = ("DARKROOM_CAPTIONERS", "DARKROOM_PRIVATE_ADDRESSES")
"""Variables that say what parameters of deployments may make a worker do."""
SERVER_PREFIXES = ("AWS_", "MLFLOW_", "PREFECT_", "DARKROOM_")
"""Prefixes of variables with server addresses and credentials."""


class Settings(GenerationLimits, BaseSettings):
    """Darkroom's own variables, ``DARKROOM_*``."""

    model_config = SettingsConfigDict(env_prefix="DARKROOM_", frozen=True, use_attribute_docstrings=True)

    home: Path = Path(".darkroom")
    """Folder of the local stack: data, logs, passwords."""
    bucket: str = Field("darkroom", pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
    """Bucket for everything large: the shards (DVC's remote), the local MLflow's artifacts, generated images."""
    log: Literal["text", "json"] = "text"
    """Format of progress and log lines on standard error: plain text or JSON."""
    ui_password: str | None = Field(None, min_length=8)
    """Password of `darkroom ui`, for the user darkroom; unset: a new one is shown at each start."""
    ui_url: str | None = Field(None, pattern=r"^https?://[A-Za-z0-9.:\[\]-]+(/[A-Za-z0-9._~-]+)*/?$")
    """Address of `darkroom ui` at a reverse proxy on this machine, https://HOST or https://HOST/PATH, which removes the
    path; unset: requests to loopback names alone are answered."""
    signing_key: SecretStr | None = None
    """Private key that signs exports, images and the ledger: path of a PEM file, or its text; unset: none."""
    signing_key_passphrase: SecretStr | None = None
    """Passphrase of that key; unset: it is not encrypted."""
    signing_certificates: str | None = None
    """Certificate of that key, then those that lead to a root: path of a PEM file, or its text; images need it."""
    captioners: tuple[CaptionProgram, ...] = ()
    """Captioners that runs of deployments may use on this worker: a JSON list of ``{"command": […]}`` or ``{"url":
    "…"}``, with ``environment`` or ``token_env`` if there are any, as in ``ingest.captioner``."""

    @property
    def folder(self) -> Path:
        """``home`` as an absolute path."""
        return self.home.expanduser().resolve()


def settings() -> Settings:
    """Read the ``DARKROOM_*`` variables; raises UserError that names an invalid one."""
    try:
        return Settings()
    except SettingsError as error:
        raise UserError(f"DARKROOM_CAPTIONERS is not JSON ({error.__cause__}): write a list of captioners") from error
    except ValidationError as error:
        detail = error.errors()[0]
        name = str(detail["loc"][0])
        shown = {key: value for key, value in detail.items() if (name, key) != ("ui_password", "input")}
        words = describe_validation_error(shown, f"DARKROOM_{name.upper()}")
        raise UserError(f"the environment variable {words}") from error


def data_source() -> str:
    """URL of the DVC remote, the permanent storage of data sets."""
    return f"s3://{settings().bucket}/dvc"


def loopback_no_proxy() -> dict[str, str]:
    """Variables that exclude the loopback address from the environment's proxies, if there are any."""
    if not getproxies():
        return {}
    names = {name: os.environ.get(name, "") for name in ("no_proxy", "NO_PROXY")}
    return {name: ",".join(filter(None, [hosts, "127.0.0.1"])) for name, hosts in names.items()}
