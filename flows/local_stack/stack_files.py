"""State of the local stack on disk: folder, passwords, ports and processes."""

import json
import os
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, ValidationError

from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.files import make_folder, write_atomically
from flows.environment import Server
from flows.local_stack.server_process import Process, is_member
from flows.local_stack.tls import new_identity

ServiceName = Literal["s3", "mlflow", "prefect", "worker"]
SERVICES: tuple[ServiceName, ...] = get_args(ServiceName)
SERVICES_OF: dict[Server, tuple[ServiceName, ...]] = {
    "s3": ("s3",),
    "mlflow": ("mlflow",),
    "prefect": ("prefect", "worker"),
}
LOOPBACK = "127.0.0.1"
USER = "darkroom"
"""User name of both UIs."""


def _password() -> str:
    return secrets.token_urlsafe(24)


class Credentials(Config):
    """Credentials created with the folder, in ``credentials.json``, readable by the owner alone."""

    mlflow_username: str = USER
    mlflow_password: str = Field(default_factory=_password)
    mlflow_secret_key: str = Field(default_factory=_password)
    """Key that signs the sessions of MLflow's server."""
    prefect_auth_string: str = Field(default_factory=lambda: f"{USER}:{_password()}")
    """Login of Prefect's UI, entered as a whole: user:password."""
    s3_access_key: str = Field(default_factory=lambda: secrets.token_hex(10))
    s3_secret_key: str = Field(default_factory=lambda: secrets.token_hex(20))
    s3_tls_identity: str = Field(default_factory=lambda: new_identity(LOOPBACK))
    """Certificate and private key of the S3 server's internal mutual TLS, in PEM."""


class State(Config):
    """State of the stack between commands, in ``stack.json``."""

    bucket: str
    """Bucket of the stack, which holds MLflow's artifacts and never changes."""
    servers: tuple[Server, ...] = ()
    """Servers that belong to the stack."""
    ports: dict[str, int] = Field(default_factory=dict)
    processes: dict[ServiceName, Process] = Field(default_factory=dict)


@dataclass(frozen=True)
class LocalStack:
    """Stack in a folder (an absolute path), as last written."""

    folder: Path
    credentials: Credentials
    state: State

    @classmethod
    def read(cls, folder: Path) -> "LocalStack | None":
        """Read the stack in ``folder``, or None if there is none; raises UserError if its files are damaged."""
        files = (folder / "credentials.json", folder / "stack.json")
        if not all(file.exists() for file in files):
            return None
        try:
            credentials = Credentials.model_validate_json(files[0].read_bytes())
            state = State.model_validate_json(files[1].read_bytes())
        except ValidationError as error:
            raise UserError(
                f"{folder}: the stack's {error.title.lower()} cannot be read ({error.errors()[0]['msg']}): "
                "restore credentials.json and stack.json, or move the folder away"
            ) from error
        return cls(folder, credentials, state)

    @classmethod
    def open(cls, folder: Path, bucket: str) -> "LocalStack":
        """Open the stack in ``folder``; create it if it is missing."""
        make_folder(folder, 0o700)
        folder.chmod(0o700)
        path = folder / "credentials.json"
        stack = cls.read(folder)
        if stack is not None:
            # A file of an older Darkroom lacks credentials that were created just now.
            if Credentials.model_fields.keys() - json.loads(path.read_bytes()):
                write_private(path, stack.credentials.model_dump_json(indent=2))
            return stack
        # A killed first `up` may have written credentials that the servers already use.
        credentials = Credentials.model_validate_json(path.read_bytes()) if path.exists() else Credentials()
        write_private(path, credentials.model_dump_json(indent=2))
        return cls(folder, credentials, State(bucket=bucket)).write()

    def write(self) -> "LocalStack":
        """Write the state to disk."""
        write_private(self.folder / "stack.json", self.state.model_dump_json(indent=2))
        return self

    def updated(self, **changes: object) -> "LocalStack":
        """Copy of the stack with changed state, which is written to disk."""
        return replace(self, state=self.state.model_copy(update=changes)).write()

    @property
    def bucket(self) -> str:
        """Bucket of the stack."""
        return self.state.bucket

    def url(self, service: ServiceName) -> str:
        """URL of a service (for the worker, of Prefect)."""
        return f"http://{LOOPBACK}:{self.state.ports['prefect' if service == 'worker' else service]}"

    def log(self, service: ServiceName) -> Path:
        """Log file of a service."""
        return self.folder / "logs" / f"{service}.log"

    def process(self, service: ServiceName) -> Process | None:
        """Live process of a service, or None."""
        process = self.state.processes.get(service)
        return process if process is not None and is_member(process.pid, self.folder, service) else None

    def serves(self, server: Server) -> bool:
        """Whether the server belongs to the stack."""
        return server in self.state.servers and SERVICES_OF[server][0] in self.state.ports

    def runs(self, server: Server) -> bool:
        """Whether the server belongs to the stack and its process lives."""
        return self.serves(server) and self.process(SERVICES_OF[server][0]) is not None

    def variables(self, server: Server) -> dict[str, str]:
        """Environment variables that connect clients to the stack's ``server``."""
        own = self.credentials
        if server == "mlflow":
            return {
                "MLFLOW_TRACKING_URI": self.url("mlflow"),
                "MLFLOW_TRACKING_USERNAME": own.mlflow_username,
                "MLFLOW_TRACKING_PASSWORD": own.mlflow_password,
            }
        if server == "prefect":
            return {
                "PREFECT_API_URL": f"{self.url('prefect')}/api",
                "PREFECT_API_AUTH_STRING": own.prefect_auth_string,
                # Separate from profiles and results of the user's other Prefect servers.
                "PREFECT_HOME": str(self.folder / "prefect"),
            }
        return {
            "AWS_ENDPOINT_URL_S3": self.url("s3"),
            "AWS_ACCESS_KEY_ID": own.s3_access_key,
            "AWS_SECRET_ACCESS_KEY": own.s3_secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


def write_private(path: Path, text: str) -> None:
    """Write ``text`` atomically to a file that only its owner can read."""

    def write(partial: Path) -> None:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)

    write_atomically(path, write)
