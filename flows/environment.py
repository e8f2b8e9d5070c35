"""Environment variables of Darkroom itself and of the servers it uses.

``DARKROOM_STAGING_*`` name the servers of another stage, the source of releases.
"""

import os
import re
from pathlib import Path
from typing import Literal, get_args
from urllib.request import getproxies

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from diffusion.common.errors import UserError

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
PREFIX = "DARKROOM_STAGING_"
SERVER_PREFIXES = ("AWS_", "MLFLOW_", "PREFECT_", "DARKROOM_")
"""Prefixes of variables with server addresses and credentials."""


class Settings(BaseSettings):
    """Darkroom's own variables, ``DARKROOM_*``."""

    model_config = SettingsConfigDict(env_prefix="DARKROOM_", frozen=True, use_attribute_docstrings=True)

    home: Path = Path(".darkroom")
    """Folder of the local stack: data, logs, passwords."""
    bucket: str = Field("darkroom", pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
    """Bucket for everything large: the shards (DVC's remote), the local MLflow's artifacts, generated images."""
    log: Literal["text", "json"] = "text"
    """Format of progress and log lines on standard error: plain text or JSON."""

    @property
    def folder(self) -> Path:
        """``home`` as an absolute path."""
        return self.home.expanduser().resolve()


def settings() -> Settings:
    """Read the ``DARKROOM_*`` variables; raises UserError that names an invalid one."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = f"DARKROOM_{first['loc'][0]}".upper()
        raise UserError(f"the variable {name} is {first['input']!r}: {first['msg']}") from error


def data_source() -> str:
    """URL of the DVC remote, the permanent storage of data sets."""
    return f"s3://{settings().bucket}/dvc"


def loopback_no_proxy() -> dict[str, str]:
    """Variables that exclude the loopback address from the environment's proxies, if there are any."""
    if not getproxies():
        return {}
    names = {name: os.environ.get(name, "") for name in ("no_proxy", "NO_PROXY")}
    return {name: ",".join(filter(None, [hosts, "127.0.0.1"])) for name, hosts in names.items()}


class Staging(BaseSettings):
    """Servers of another stage, or the folder of a local stack; each field is a variable ``DARKROOM_STAGING_…``."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, use_attribute_docstrings=True)

    home: Path | None = None
    """Folder of a running local stack, instead of all other fields."""
    mlflow_tracking_uri: str | None = None
    mlflow_tracking_username: str | None = None
    mlflow_tracking_password: SecretStr | None = None
    bucket: str | None = None
    """Bucket of its ledgers."""
    aws_endpoint_url_s3: str | None = None
    aws_access_key_id: str | None = None
    aws_secret_access_key: SecretStr | None = None
    aws_session_token: SecretStr | None = None
    aws_default_region: str | None = None

    @model_validator(mode="after")
    def _names_servers(self) -> "Staging":
        if self.home is None and (self.mlflow_tracking_uri is None or self.bucket is None):
            raise ValueError(
                f"set {PREFIX}MLFLOW_TRACKING_URI and {PREFIX}BUCKET, with {PREFIX}AWS_* and {PREFIX}MLFLOW_* for the "
                f"keys to them, or {PREFIX}HOME to the folder of a local stack"
            )
        others = self.model_dump(exclude={"home"}, exclude_none=True)
        if self.home is not None and others:
            names = ", ".join(f"{PREFIX}{name.upper()}" for name in others)
            raise ValueError(f"{PREFIX}HOME names a local stack: unset {names}")
        return self

    @property
    def called(self) -> str:
        """Location for messages, without credentials."""
        return str(self.home or re.sub(r"//[^/]*@", "//", self.mlflow_tracking_uri or ""))

    def variables(self) -> dict[str, str]:
        """Environment of a process that uses these servers instead of ours."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith(SERVER_PREFIXES)}
        for name, value in self.model_dump(exclude_none=True).items():
            text = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
            variables[f"DARKROOM_{name.upper()}" if name in ("home", "bucket") else name.upper()] = text
        return variables


def staging() -> Staging:
    """Read the ``DARKROOM_STAGING_*`` variables; raises UserError that names what is missing."""
    try:
        return Staging()
    except ValidationError as error:
        raise UserError(f"no staging servers: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
