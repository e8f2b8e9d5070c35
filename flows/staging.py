"""Where the staging servers are, which releases come from: ``DARKROOM_STAGING_*``, beside those that are used here."""

import os
import re
from pathlib import Path

from pydantic import SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from diffusion.errors import UserError

PREFIX = "DARKROOM_STAGING_"
SERVERS = ("AWS_", "MLFLOW_", "PREFECT_", "DARKROOM_")
"""Variables that lead to servers, with the keys to them."""


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
        kept = {name: value for name, value in os.environ.items() if not name.startswith(SERVERS)}
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
