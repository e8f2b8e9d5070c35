"""Discovery of the servers that this process uses: those in the environment, else those of the local stack."""

import os

from diffusion.common.errors import UserError
from flows.environment import (
    DEFAULTS,
    SECRET_VARIABLE,
    SERVER_TITLES,
    SERVER_VARIABLES,
    SERVERS,
    Server,
    loopback_no_proxy,
    settings,
)
from flows.local_stack import seaweedfs
from flows.local_stack.stack_files import LocalStack


def servers_in_environment() -> dict[Server, str]:
    """Servers named by the environment, with the variable; variables from ``darkroom env`` do not count."""
    local = LocalStack.read(settings().folder)
    found: dict[Server, str] = {}
    for server in SERVERS:
        named = [name for name in SERVER_VARIABLES[server] if os.environ.get(name)]
        ours = local is not None and local.serves(server) and _came_from(local, server)
        if named and not ours:
            found[server] = named[0]
    return found


def join_servers(*needs: Server) -> None:
    """Connect this process and its children to the servers in ``needs``; call it before importing their clients.

    Raises UserError for a server that neither the environment nor a running local stack provides.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    missing = [server for server in needs if server not in servers_in_environment()]
    local = LocalStack.read(settings().folder)
    for server in missing:
        if local is None or not local.runs(server):
            raise UserError(
                f"no {SERVER_TITLES[server]} server: {SERVER_VARIABLES[server][0]} is not set and no local one runs "
                f"(in {settings().home}): run `darkroom up`"
            )
        os.environ.update(local.variables(server) | loopback_no_proxy())
        os.environ.setdefault("DARKROOM_BUCKET", local.bucket)


def vacuum_deleted_objects() -> None:
    """Free the disk space of deleted objects on the local S3 server, if it is in use."""
    local = LocalStack.read(settings().folder)
    if local is not None and "s3" not in servers_in_environment() and local.runs("s3"):
        seaweedfs.vacuum(local.state.ports["master"], local.folder / "s3")


def _came_from(local: LocalStack, server: Server) -> bool:
    """Whether the environment's variables for ``server`` are current or earlier ones of the local stack."""
    address = os.environ.get(SERVER_VARIABLES[server][0], "")
    secret = os.environ.get(SECRET_VARIABLE[server])
    return secret == local.variables(server)[SECRET_VARIABLE[server]] and address.startswith("http://127.0.0.1:")
