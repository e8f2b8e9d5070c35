"""Environment variables: those of Darkroom itself, and those by which servers are named.

``DARKROOM_STAGING_*`` name the servers of another stage, which releases come from.
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

NAMED_BY: dict[Server, tuple[str, ...]] = {
    "mlflow": ("MLFLOW_TRACKING_URI",),
    "prefect": ("PREFECT_API_URL",),
    "s3": (
        "AWS_ENDPOINT_URL_S3",
        "AWS_ENDPOINT_URL",
        "AWS_ACCESS_KEY_ID",
        "AWS_PROFILE",
        "AWS_ROLE_ARN",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    ),
}
"""Any of these in the environment says which server to use; the first is the one to set."""
SECRET: dict[Server, str] = {
    "mlflow": "MLFLOW_TRACKING_PASSWORD",
    "prefect": "PREFECT_API_AUTH_STRING",
    "s3": "AWS_SECRET_ACCESS_KEY",
}
CALLED: dict[Server, str] = {"mlflow": "MLflow", "prefect": "Prefect", "s3": "S3"}
DEFAULTS = {
    # Nothing read from storage is unpickled; MLflow's own default would.
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # Seconds. By these it is known which runs are alive: see flows/deployment/tasks.py.
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60",
    "DVC_NO_ANALYTICS": "1",
    # Prefect's client sends its own besides the server's.
    "DO_NOT_TRACK": "true",
}
PREFIX = "DARKROOM_STAGING_"
SERVER_PREFIXES = ("AWS_", "MLFLOW_", "PREFECT_", "DARKROOM_")
"""Variables that lead to servers, with the keys to them."""


class Settings(BaseSettings):
    """Darkroom's own variables, ``DARKROOM_*``."""

    model_config = SettingsConfigDict(env_prefix="DARKROOM_", frozen=True, use_attribute_docstrings=True)

    home: Path = Path(".darkroom")
    """Folder of the local stack: data, logs, passwords."""
    bucket: str = Field("darkroom", pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
    """Bucket for everything large: the shards (DVC's remote), the local MLflow's artifacts, generated images."""
    log: Literal["text", "json"] = "text"
    """What commands write while they work: lines for people, or JSON for programs."""

    @property
    def folder(self) -> Path:
        """``home`` as an absolute path."""
        return self.home.expanduser().resolve()


def settings() -> Settings:
    """The environment's ``DARKROOM_*`` variables; raises UserError that names a bad one."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = f"DARKROOM_{first['loc'][0]}".upper()
        raise UserError(f"the variable {name} is {first['input']!r}: {first['msg']}") from error


def data_source() -> str:
    """Where data sets are kept for good: the URL of DVC's remote."""
    return f"s3://{settings().bucket}/dvc"


def beside_proxies() -> dict[str, str]:
    """Variables that keep the environment's proxies, if it has any, away from the loopback address."""
    if not getproxies():
        return {}
    names = {name: os.environ.get(name, "") for name in ("no_proxy", "NO_PROXY")}
    return {name: ",".join(filter(None, [hosts, "127.0.0.1"])) for name, hosts in names.items()}


class Staging(BaseSettings):
    """The servers of another stage, or the folder of a local stack; each field is a variable ``DARKROOM_STAGING_…``."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, use_attribute_docstrings=True)

    home: Path | None = None
    """Folder of a local stack that runs, instead of all the others."""
    mlflow_tracking_uri: str | None = None
    mlflow_tracking_username: str | None = None
    mlflow_tracking_password: SecretStr | None = None
    bucket: str | None = None
    """Where its ledgers lie."""
    aws_endpoint_url_s3: str | None = None
    aws_access_key_id: str | None = None
    aws_secret_access_key: SecretStr | None = None
    aws_session_token: SecretStr | None = None
    aws_default_region: str | None = None

    @model_validator(mode="after")
    def _leads_somewhere(self) -> "Staging":
        if self.home is None and (self.mlflow_tracking_uri is None or self.bucket is None):
            raise ValueError(
                f"set {PREFIX}MLFLOW_TRACKING_URI and {PREFIX}BUCKET, with {PREFIX}AWS_* and {PREFIX}MLFLOW_* for the "
                f"keys to them, or {PREFIX}HOME to the folder of a local stack"
            )
        others = self.model_dump(exclude={"home"}, exclude_none=True)
        if self.home is not None and others:
            raise ValueError(
                f"{PREFIX}HOME names a local stack: unset {', '.join(f'{PREFIX}{n.upper()}' for n in others)}"
            )
        return self

    @property
    def called(self) -> str:
        """Where that is, without keys, for people."""
        if self.home is not None:
            return str(self.home)
        return re.sub(r"//[^/]*@", "//", self.mlflow_tracking_uri or "")

    def variables(self) -> dict[str, str]:
        """The environment of a process that finds these servers, and none of ours."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(SERVER_PREFIXES)}
        for name, value in self.model_dump(exclude_none=True).items():
            text = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
            kept[f"DARKROOM_{name.upper()}" if name in ("home", "bucket") else name.upper()] = text
        return kept


def staging() -> Staging:
    """The variables ``DARKROOM_STAGING_*``; raises UserError that says what is missing."""
    try:
        return Staging()
    except ValidationError as error:
        raise UserError(f"no staging servers: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
