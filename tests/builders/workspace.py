"""A folder with images, a configuration and a running local stack: what a user of the command line has."""

import json
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml

from flows.local_stack.server_process import members
from flows.local_stack.stack import SERVICES
from tests.builders import NO_BARS
from tests.builders.command_line import start, without_servers
from tests.builders.forked import Fork, Forks
from tests.builders.s3_clients import with_key
from tests.builders.shapes import disc

PARAMS = {
    "ingest": {"size": 8, "held_out": 0.33},
    "model": {"width": 16, "channel_mult": [1], "blocks": 1, "attention": [], "patch": 1},
    "training": {
        "dataset": "blobs",
        "images": 1600,
        "learning_rate": 0.01,
        "batch_size": 16,
        "warmup_images": 64,
        "checkpoints": 4,
        "keep": 2,
        "cpu_threads": 1,
    },
    "sampling": {"sampler": "dpmpp_2m", "steps": 8, "compute_batch": 8},
    "evaluation": {"samples": 64, "extractor_size": 32},
    # Their short trainings make images that a first version is not let through with.
    "gate": NO_BARS,
}


class Workspace:
    """A folder of its own with images, a configuration and a running local stack.

    Commands are forked from a process that has done their imports, but for those that ``start`` begins as a user does.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.forks: Forks | None = None
        self.variables = without_servers(OMP_NUM_THREADS="1")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return start(self.folder, *arguments, **self.variables)

    def fork(self) -> Forks:
        """Fork commands from now on, as long as the environment is that of now."""
        if self.forks:
            self.forks.close()
        self.forks = Forks(self.variables)
        return self.forks

    def begin(self, *arguments: str) -> Fork | subprocess.Popen[str]:
        """Begin a command in a fork, if there are any for this environment."""
        if self.forks and self.forks.variables == self.variables:
            return self.forks.start(self.folder, *arguments)
        return self.start(*arguments)

    def run(self, *arguments: str, code: int | tuple[int, ...] = 0) -> str:
        """What the command prints, which ends with ``code`` or one of them; of a user's mistake, its error."""
        process = self.begin(*arguments)
        out, err = process.communicate(timeout=600)
        assert process.returncode in (code if isinstance(code, tuple) else (code,)), err[-3000:]
        if code == 2:
            assert "Traceback" not in err
            return err
        return out

    def json(self, *arguments: str, code: int | tuple[int, ...] = 0) -> Any:
        return json.loads(self.run(*arguments, "--json", code=code))

    def join(self, patch: pytest.MonkeyPatch) -> None:
        """Have this process find the workspace's MLflow and S3 servers."""
        for name, value in self.variables.items():
            if name.startswith(("MLFLOW_", "AWS_")):
                patch.setenv(name, value)

    def s3_client(self) -> Any:
        """Stock boto3."""
        names = ("AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        return with_key(*(self.variables[name] for name in names), attempts=5)

    def two_versions(self) -> None:
        """Train and evaluate two versions of blobs, of which the first or both were champion."""
        self.json("retrain", "images", "--count", "1")
        second = ("--set", "training.seed=1", "--set", "training.output=runs/second")
        self.json("train", *second)
        self.json("evaluate", *second)
        self.run("promote", *second, code=(0, 3))


DATABASES = ("mlflow/mlflow.db", "prefect/prefect.db")


@cache
def new_databases() -> TemporaryDirectory[str]:
    """A folder for the databases of a stack that has just begun, to be copied: servers take seconds to make them."""
    return TemporaryDirectory(prefix="databases-")


@contextmanager
def running(folder: Path, params: dict[str, Any], images: int) -> Iterator[Workspace]:
    """A workspace in ``folder`` with as many ``images`` in two classes, and all servers up."""
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    for number in range(images):
        path = folder / "images" / ("even" if number % 2 == 0 else "odd") / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        disc(number).save(path)
    space = Workspace(folder)
    for name in DATABASES:
        if (made := Path(new_databases().name, name)).exists():
            (database := folder / ".darkroom" / name).parent.mkdir(parents=True)
            shutil.copyfile(made, database)
    try:
        # On a machine that does much else servers may take longer than it waits for them; they start all the same.
        for _ in range(2):
            process = space.start("up")
            process.communicate()
            if process.returncode == 0:
                break
        else:
            space.run("up")
        for name in DATABASES:
            if not (made := Path(new_databases().name, name)).exists():
                made.parent.mkdir()
                with (
                    closing(sqlite3.connect(folder / ".darkroom" / name)) as here,
                    closing(sqlite3.connect(made)) as copy,
                ):
                    here.backup(copy)
        for line in space.run("env").splitlines():
            name, _, value = line.removeprefix("export ").partition("=")
            space.variables[name] = value.strip("'\"")
        space.fork()
        yield space
    finally:
        if space.forks:
            space.forks.close()
        # Nobody needs what they hold, and to let them end by themselves takes half a minute.
        for process in members(folder / ".darkroom", *SERVICES):
            process.kill()


def objects(workspace: Workspace, uri: str) -> dict[str, tuple[Any, bytes]]:
    """Stock boto3: every object below ``uri`` with its time of writing."""
    client = workspace.s3_client()
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return {
        entry["Key"].removeprefix(prefix): (
            entry["LastModified"],
            client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read(),
        )
        for page in pages
        for entry in page.get("Contents", [])
    }
