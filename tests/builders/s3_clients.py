"""Stock S3 clients, and a real server for them."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from diffusion.common.errors import DarkroomError
from flows.local_stack import seaweedfs
from flows.local_stack.server_process import choose_ports
from flows.local_stack.stack import new_identity
from tests.builders.waiting import wait_for

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def stock(variables: dict[str, str]):
    """A client as any other user of the bucket would make it."""
    return boto3.session.Session().client("s3", endpoint_url=variables["AWS_ENDPOINT_URL_S3"])


def with_key(url: str, access_key: str, secret_key: str, attempts: int = 1) -> "S3Client":
    """A client with keys of its own, whatever keys the environment names."""
    return boto3.client(
        "s3",
        endpoint_url=url,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": attempts}),
    )


@contextmanager
def seaweed(folder: Path, config: str, ready: Callable[[str], object], *arguments: str) -> Iterator[str]:
    """The address of a SeaweedFS in ``folder``, once ``ready`` does what it does with it."""
    for name, text in seaweedfs.files(config, new_identity()).items():
        (folder / name).write_text(text)
    numbers = choose_ports(len(seaweedfs.PORTS))
    address, variables = f"http://127.0.0.1:{numbers[0]}", os.environ | seaweedfs.ENVIRONMENT
    command = [*seaweedfs.command(numbers), *arguments]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, env=variables, stdout=log, stderr=subprocess.STDOUT)

    def ask() -> bool:
        assert server.poll() is None, (folder / "log").read_text()
        try:
            ready(address)
        except (DarkroomError, BotoCoreError, ClientError):
            return False
        return True

    try:
        wait_for(ask, 30, (folder / "log").read_text)
        yield address
    finally:
        server.kill()
        server.wait()
