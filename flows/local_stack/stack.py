"""The local stack: its state on disk, and how a process finds its servers or the environment's."""

import base64
import os
import secrets
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, ValidationError

from diffusion.common.config import Config
from diffusion.common.errors import UserError, describe_validation_error
from diffusion.common.files import make_folder, write_atomically
from flows import environment
from flows.environment import SERVER_VARIABLES, SERVERS, Server, settings
from flows.local_stack.server_process import LOOPBACK, Process, is_member

ServiceName = Literal["s3", "mlflow", "prefect", "worker"]
SERVICES: tuple[ServiceName, ...] = get_args(ServiceName)
USER = "darkroom"
LOGINS = ("MLFLOW_TRACKING_USERNAME", *environment.SECRET_VARIABLE.values())
"""Variables that hold users and passwords of servers."""


def _password() -> str:
    return secrets.token_urlsafe(24)


def new_identity() -> str:
    """Create a private key and its certificate, server, client and CA of mutual TLS on the loopback address, in PEM."""
    # A slow import that is needed once per stack.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "darkroom")])
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        # Trusted for its key alone; a wrong clock must not lock out the owner.
        .not_valid_before(datetime(2000, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2200, 1, 1, tzinfo=UTC))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(LOOPBACK))]), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return (private + certificate.public_bytes(encoding)).decode()


class Credentials(Config):
    """Credentials created with the folder, in ``credentials.json``, readable by the owner alone."""

    mlflow_username: str = USER
    mlflow_password: str = Field(default_factory=_password)
    mlflow_secret_key: str = Field(default_factory=_password)
    """Key that signs the sessions of MLflow's server."""
    mlflow_webhook_key: str = Field(default_factory=lambda: base64.urlsafe_b64encode(secrets.token_bytes(32)).decode())
    """Fernet key that encrypts the secrets of webhooks in MLflow's database."""
    prefect_auth_string: str = Field(default_factory=lambda: f"{USER}:{_password()}")
    """Login of Prefect's UI, entered as a whole: user:password."""
    s3_access_key: str = Field(default_factory=lambda: secrets.token_hex(10))
    s3_secret_key: str = Field(default_factory=lambda: secrets.token_hex(20))
    s3_tls_identity: str = Field(default_factory=new_identity)
    """Certificate and private key of the S3 server's internal mutual TLS, in PEM."""


class State(Config):
    """State of the stack between commands, in ``stack.json``."""

    bucket: str
    """Bucket of the stack, which holds MLflow's artifacts and never changes."""
    servers: tuple[Server, ...] = ()
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
            words = describe_validation_error(error.errors(include_input=False)[0])  # values may be passwords
            raise UserError(
                f"{folder}: the stack's {error.title.lower()} cannot be read ({words}): restore credentials.json and "
                "stack.json, or move the folder away"
            ) from error
        return cls(folder, credentials, state)

    @classmethod
    def open(cls, folder: Path, bucket: str) -> "LocalStack":
        """Open the stack in ``folder``; create it if it is missing."""
        make_folder(folder, 0o700)
        folder.chmod(0o700)
        path, stack = folder / "credentials.json", cls.read(folder)
        # A killed first `up` may have written credentials that the servers already use.
        present = Credentials.model_validate_json(path.read_bytes()) if stack is None and path.exists() else None
        credentials = stack.credentials if stack else present or Credentials()
        if (text := credentials.model_dump_json(indent=2)) != (path.read_text() if path.exists() else None):
            write_private(path, text)  # also what the stack of an older Darkroom lacks
        return stack or cls(folder, credentials, State(bucket=bucket)).update_state()

    def update_state(self, **changes: object) -> "LocalStack":
        """Copy of the stack with changed state, which is written to disk."""
        stack = replace(self, state=self.state.model_copy(update=changes))
        write_private(self.folder / "stack.json", stack.state.model_dump_json(indent=2))
        return stack

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
        return server in self.state.servers and server in self.state.ports

    def runs(self, server: Server) -> bool:
        """Whether the server belongs to the stack and its process lives."""
        return self.serves(server) and self.process(server) is not None

    def variables(self, server: Server) -> dict[str, str]:
        """Environment variables that connect clients to the stack's ``server``."""
        credentials = self.credentials
        if server == "mlflow":
            return {
                "MLFLOW_TRACKING_URI": self.url("mlflow"),
                "MLFLOW_TRACKING_USERNAME": credentials.mlflow_username,
                "MLFLOW_TRACKING_PASSWORD": credentials.mlflow_password,
            }
        if server == "prefect":
            return {
                "PREFECT_API_URL": f"{self.url('prefect')}/api",
                "PREFECT_API_AUTH_STRING": credentials.prefect_auth_string,
                # Separate from profiles and results of the user's other Prefect servers.
                "PREFECT_HOME": str(self.folder / "prefect"),
            }
        return {
            "AWS_ENDPOINT_URL_S3": self.url("s3"),
            "AWS_ACCESS_KEY_ID": credentials.s3_access_key,
            "AWS_SECRET_ACCESS_KEY": credentials.s3_secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


def write_private(path: Path, text: str) -> None:
    """Write ``text`` atomically to a file that only its owner can read."""

    def write(partial: Path) -> None:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)

    write_atomically(path, write)


def servers_in_environment() -> dict[Server, str]:
    """Servers named by the environment, with the variable; variables from ``darkroom env`` do not count."""
    local = LocalStack.read(settings().folder)
    servers: dict[Server, str] = {}
    for server in SERVERS:
        names = [name for name in SERVER_VARIABLES[server] if os.environ.get(name)]
        secret = environment.SECRET_VARIABLE[server]
        # Also variables that were exported before the stack's ports changed.
        is_local = (
            local is not None
            and local.serves(server)
            and os.environ.get(secret) == local.variables(server)[secret]
            and os.environ.get(SERVER_VARIABLES[server][0], "").startswith(f"http://{LOOPBACK}:")
        )
        if names and not is_local:
            servers[server] = names[0]
    return servers


def _require_own_login(local: LocalStack, server: Server) -> None:
    """Raise UserError if the environment has a login, without an address, that is not the local ``server``'s."""
    address, title = SERVER_VARIABLES[server][0], environment.SERVER_TITLES[server]
    for name, value in local.variables(server).items():
        if name in LOGINS and not os.environ.get(address) and os.environ.get(name, value) not in ("", value):
            raise UserError(
                f"{name} is set, and it is not the local {title} server's (in {local.folder}/credentials.json): "
                f"unset it, or set {address} to the server that it is for"
            )


def knows_server(server: Server) -> bool:
    """Whether the environment names ``server``, or the local stack, which need not run, has it."""
    local = LocalStack.read(settings().folder)
    return server in servers_in_environment() or (local is not None and local.serves(server))


def join_servers(*servers: Server) -> None:
    """Connect this process to servers before it imports their clients; raises UserError for one that is not there."""
    for name, value in environment.DEFAULTS.items():
        os.environ.setdefault(name, value)
    external_servers = servers_in_environment()
    local = LocalStack.read(settings().folder)
    for server in (name for name in servers if name not in external_servers):
        if local is None or not local.runs(server):
            elsewhere = ", or where it runs already work in that folder, or set DARKROOM_HOME to its .darkroom"
            raise UserError(
                f"no {environment.SERVER_TITLES[server]} server: {SERVER_VARIABLES[server][0]} is not set and no local "
                f"one runs (in {settings().folder}): run `darkroom up`{elsewhere if local is None else ''}"
            )
        _require_own_login(local, server)
        os.environ.update(local.variables(server) | environment.loopback_no_proxy())
        os.environ.setdefault("DARKROOM_BUCKET", local.bucket)
