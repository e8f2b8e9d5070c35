"""A running stack, on which drills retrain in folders of their own, each as on a machine of its own."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from mlflow.client import MlflowClient
from safetensors.torch import load_file

from diffusion.common.errors import DarkroomError
from diffusion.common.files import sha256_bytes
from flows.local_stack.seaweedfs import config
from flows.local_stack.server_process import Process, members, stop
from flows.local_stack.services import Service, services
from flows.local_stack.stack import LocalStack, ServiceName
from flows.storage.s3 import Store, client
from tests.builders.waiting import wait_for
from tests.builders.workspace import PARAMS, Workspace, objects

QUICK = PARAMS | {
    "training": {**PARAMS["training"], "images": 320, "checkpoints": 4, "warmup_images": 16},
    "evaluation": {"samples": 16, "extractor_size": 32},
}
COUNT = 8
"""Images sampled at the end."""
NIGHT = {"AWS_ACCESS_KEY_ID": "night", "AWS_SECRET_ACCESS_KEY": "night-secret"}
"""Keys that retrainings have to themselves where a drill takes them away."""


@dataclass(frozen=True)
class House:
    """A stack with images to train on."""

    workspace: Workspace

    @property
    def images(self) -> Path:
        return self.workspace.folder / "images"

    @property
    def stack(self) -> LocalStack:
        local_stack = LocalStack.read(self.workspace.folder / ".darkroom")
        assert local_stack is not None
        return local_stack

    @property
    def store(self) -> Store:
        return Store(client(variables=self.stack.variables("s3")))

    def site(self, folder: Path) -> "Site":
        """A machine of its own, whose working folder is ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        parts = QUICK | {"training": {**QUICK["training"], "dataset": folder.name}}
        (folder / "params.yaml").write_text(yaml.safe_dump(parts))
        return Site(self, folder)

    def kill(self, name: ServiceName) -> None:
        """Kill a service; what asks for it afterwards gets no answer."""
        for process in members(self.stack.folder, name):
            process.kill()
            process.wait()

    def start(self, name: ServiceName) -> None:
        """Start a service that was killed, where it was before."""
        self._start(self._service(name))

    def admit(self, *keys: dict[str, str]) -> None:
        """Have the S3 server take the stack's own keys and ``keys``, and no others; it is restarted."""
        own = self.stack.credentials
        pairs = [
            (own.s3_access_key, own.s3_secret_key),
            *((each["AWS_ACCESS_KEY_ID"], each["AWS_SECRET_ACCESS_KEY"]) for each in keys),
        ]
        identities = [json.loads(config(*pair))["identities"][0] | {"name": pair[0]} for pair in pairs]
        stop(members(self.stack.folder, "s3"), 15)
        service = self._service("s3")
        files = service.files | {"s3.json": json.dumps({"identities": identities})}
        self._start(replace(service, files=files))

    def objects(self, prefix: str) -> dict[str, bytes]:
        """What lies below ``prefix`` in the stack's bucket, by key below it."""
        contents = objects(self.workspace, f"s3://{self.stack.bucket}/{prefix}")
        return {key: data for key, (_, data) in contents.items()}

    def _service(self, name: ServiceName) -> Service:
        return next(service for service in services(self.stack) if service.name == name)

    def _start(self, service: Service) -> None:
        stack = self.stack
        process = service.start(stack)
        # By this, commands know that the stack has the server.
        stack.update_state(processes=stack.state.processes | {service.name: process})
        wait_for(lambda: _serves(service, process), why=lambda: self.stack.log(service.name).read_text()[-2000:])


def stack_alone(folder: Path) -> dict[str, str | None]:
    """Variables by which a command has to do with the local stack in ``folder``, and with no other server."""
    names = ["MLFLOW_TRACKING_URI", "PREFECT_API_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "DARKROOM_BUCKET"]
    return {"DARKROOM_HOME": str(folder), **dict.fromkeys(names)}


def own_stores(folder: Path, bucket: str) -> dict[str, str | None]:
    """Variables by which a command has the ``bucket``, and an MLflow in ``folder``, to itself."""
    logins = dict.fromkeys(("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"))
    return {"DARKROOM_BUCKET": bucket, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", **logins}


def fill(folder: Path, filler: Path) -> None:
    """Fill the file system of ``folder`` by the file ``filler``, but for two pages."""
    with filler.open("wb") as file:
        while (room := shutil.disk_usage(folder).free) > 8192:
            # Others may write meanwhile.
            with suppress(OSError):
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), room - 8192)


def expect_exit(process: subprocess.Popen[str], code: int) -> str:
    """What is said by a command that ends with ``code``: all of it if that is 0, else the line that says why."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors[-3000:]
    if code == 0:
        return errors
    assert "Traceback" not in errors, errors[-6000:]
    [line] = [line for line in errors.splitlines() if line.startswith("darkroom: ")]
    assert errors.rstrip().endswith(line)
    return line


def _serves(service: Service, process: Process) -> bool:
    try:
        service.check(process)
    except DarkroomError:
        return False
    return True


class Site(Workspace):
    """A working folder on a house's stack, with a data set and a model of its name."""

    def __init__(self, house: House, folder: Path) -> None:
        super().__init__(folder)
        self.house, self.name = house, folder.name
        self.variables = dict(house.workspace.variables)
        self.retraining = ("retrain", str(house.images), "--dataset", self.name, "--count", str(COUNT))

    @property
    def final(self) -> Path:
        """The trained model."""
        return self.folder / "runs" / self.name / "final.safetensors"

    @contextmanager
    def paused(self, point: str, arguments: Sequence[str] | None = None) -> Iterator[subprocess.Popen[str]]:
        """The command, which waits at ``point`` inside; see ``tests.chaos.paused``."""
        here, go = self.folder / "here", self.folder / "go"
        for mark in (here, go):
            mark.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.chaos.paused", point, str(self.folder)]
        process = subprocess.Popen(
            [*command, "--", *(arguments or self.retraining)],
            cwd=self.folder,
            env=self.variables,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        wait_for(lambda: here.exists() or process.poll() is not None, why=lambda: point)
        assert process.poll() is None, f"{point}: {process.communicate()[1][-3000:]}"
        try:
            yield process
        finally:
            go.touch()

    def killed_at(self, point: str) -> None:
        """Give the command, and kill it with all its children when it is at ``point``."""
        with self.paused(point) as process:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def end(self, done: dict[str, Any]) -> dict[str, Any]:
        """All that the retraining left behind which said ``done``, but for what differs between any two: ids, times."""
        client = MlflowClient(self.variables["MLFLOW_TRACKING_URI"])
        runs = client.search_runs([client.get_experiment_by_name(self.name).experiment_id])
        losses = client.get_metric_history(done["run_id"], "train/loss")
        samples = self.house.objects(done["samples"]["uri"].removeprefix(f"s3://{self.house.stack.bucket}/"))
        table = pq.read_table(io.BytesIO(samples["manifest.parquet"])).to_pylist()
        return {
            "champion": client.get_model_version_by_alias(self.name, "champion").version,
            "versions": [version.version for version in client.search_model_versions(f"name='{self.name}'")],
            "runs": [(run.info.run_id == done["run_id"], run.info.status) for run in runs],
            # In the order of training: MLflow's is that of the clock.
            "losses": sorted((point.step, point.value) for point in losses),
            "ledger": sorted(self.house.objects(f"ledger/{self.name}/")),
            # Of each version: its digest is also of the data set's name.
            "data": sorted(key.partition("/")[2] for key in self.house.objects(f"datasets/{self.name}/")),
            "content": done["data"]["result"]["content_digest"],
            # Of the tensors alone, as the header says of which data set they are.
            "weights": {name: sha256_bytes(each.numpy().tobytes()) for name, each in load_file(self.final).items()},
            "samples": sorted(samples),
            "whole": all(sha256_bytes(samples[row["key"]]) == row["sha256"] for row in table),
            "pixels": [row["pixels_sha256"] for row in table],
            "notes": len(self.house.objects(f"retrained/{self.name}/")),
        }
