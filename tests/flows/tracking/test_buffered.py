"""Figures wait on disk until MLflow takes them, and each is there once."""

import errno
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
from mlflow.client import MlflowClient
from PIL import Image

from diffusion.common.errors import DarkroomError
from flows.tracking import buffered
from flows.tracking.buffered import BufferedTracker
from flows.tracking.runs import RunTracker
from tests.builders.shapes import blob
from tests.builders.waiting import wait_until_served


@pytest.fixture
def client(no_servers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """An MLflow of the test's own, without a server."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return MlflowClient()


def new_run(client: MlflowClient) -> RunTracker:
    return RunTracker(
        client,
        client.create_run(client.create_experiment(f"e{uuid4().hex}", str(Path.cwd() / "artifacts"))).info.run_id,
    )


def points(tracker: RunTracker, name: str) -> list[tuple[int, float, int]]:
    history = tracker.client.get_metric_history(tracker.run_id, name)
    return [(point.step, point.value, point.timestamp) for point in history]


def test_all_figures_and_images_arrive_in_order(client: MlflowClient, tmp_path: Path) -> None:
    tracker = new_run(client)
    writer = BufferedTracker(tracker, tmp_path / "buffer")
    for images in range(0, 1200, 2):
        writer.log_metrics({"loss": 1 / (images + 1), "nothing": float("nan")}, images)
    writer.log_image("samples", blob(0), 1200)
    writer.close()
    assert [point[:2] for point in points(tracker, "train/loss")] == [(n, 1 / (n + 1)) for n in range(0, 1200, 2)]
    assert points(tracker, "train/nothing") == []
    assert [point[0] for point in points(tracker, "train/samples_at_images")] == [1200]
    assert len(client.list_artifacts(tracker.run_id, "images")) > 0


def test_metrics_repeated_after_a_kill_are_logged_once(client: MlflowClient, tmp_path: Path) -> None:
    tracker, folder = new_run(client), tmp_path / "buffer"
    first = BufferedTracker(tracker, folder)
    for images in (16, 32, 48):
        first.log_metrics({"loss": images / 100}, images)
    first.close()
    before = points(tracker, "train/loss")
    # As a kill leaves it: a line that was being written.
    with (folder / "records.jsonl").open("a") as file:
        file.write('{"name": "lo')
    time.sleep(0.01)
    again = BufferedTracker(tracker, folder)
    for images in (32, 48, 64):
        again.log_metrics({"loss": images / 100}, images)
    again.close()
    after = points(tracker, "train/loss")
    assert after[:3] == before
    assert [point[:2] for point in after] == [(n, n / 100) for n in (16, 32, 48, 64)]
    assert [each["step"] for each in map(json.loads, (folder / "records.jsonl").read_text().splitlines())] == [
        16,
        32,
        48,
        64,
    ]
    restarted = BufferedTracker(new_run(client), folder, restart=True)
    restarted.close()
    assert restarted.records == []


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--default-artifact-root", str(folder / "art")]
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until_served(f"http://127.0.0.1:{port}/health", server)
        yield server
    finally:
        os.killpg(server.pid, 9)
        server.wait()


@pytest.mark.long
@pytest.mark.slow
def test_metrics_survive_a_server_outage_once_and_in_order(
    no_servers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    # Otherwise the client itself tries again for minutes before it says that nobody answers.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setattr(buffered, "PAUSE", 0.2)
    with mlflow_server(tmp_path, port):
        client = MlflowClient()
        tracker = new_run(client)
        writer = BufferedTracker(tracker, tmp_path / "buffer")
        writer.log_metrics({"loss": 0.5}, 16)
        while writer.delivered == 0:
            time.sleep(0.05)
    start = time.monotonic()
    for images in range(32, 64, 16):
        writer.log_metrics({"loss": 1 / images}, images)
        writer.log_image("samples", blob(images), images)
    assert time.monotonic() - start < 2  # nobody waited for the server
    monkeypatch.setattr(buffered, "PATIENCE", 3.0)
    with pytest.raises(DarkroomError, match=r"4 figures in .*buffer.*give the same command again when MLflow is back"):
        writer.close()
    with mlflow_server(tmp_path, port):
        monkeypatch.setattr(buffered, "PATIENCE", 60.0)
        writer.close()
        assert [point[:2] for point in points(tracker, "train/loss")] == [(16, 0.5), (32, 1 / 32), (48, 1 / 48)]
        lines = (tmp_path / "buffer" / "records.jsonl").read_text().splitlines()
        times = [record["time"] for record in map(json.loads, lines) if record["name"] == "train/loss"]
        assert [point[2] for point in points(tracker, "train/loss")] == times


def test_system_metrics_are_sampled_periodically(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffered, "EVERY", 0.3)
    tracker = new_run(client)
    writer = BufferedTracker(tracker, tmp_path / "buffer")
    writer.log_metrics({"loss": 0.5}, 16)
    time.sleep(0.4)
    for images in (32, 48):
        writer.log_metrics({"loss": 0.5}, images)
    writer.close()
    ((step, share, _),) = points(tracker, "system/cpu_utilization_percentage")
    assert step == 32
    assert 0 <= share <= 100


def test_buffered_metrics_of_an_abandoned_training_are_sent_later(client: MlflowClient, tmp_path: Path) -> None:
    tracker = new_run(client)
    first = BufferedTracker(tracker, tmp_path / "buffer")
    first.abandon()
    first.log_metrics({"loss": 0.5}, 16)
    assert points(tracker, "train/loss") == []
    BufferedTracker(tracker, tmp_path / "buffer").close()
    assert [point[:2] for point in points(tracker, "train/loss")] == [(16, 0.5)]


def test_full_disk_is_reported_and_buffered_metrics_are_sent(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = new_run(client)
    writer = BufferedTracker(tracker, tmp_path / "buffer")
    writer.log_metrics({"loss": 0.5}, 16)

    def fail(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("pathlib.Path.open", fail)
        with pytest.raises(OSError, match="No space left"):
            writer.log_metrics({"loss": 0.25}, 32)
    writer.log_metrics({"loss": 0.25}, 32)
    writer.close()
    assert [point[:2] for point in points(tracker, "train/loss")] == [(16, 0.5), (32, 0.25)]


def test_run_on_another_server_receives_all_metrics(client: MlflowClient, tmp_path: Path) -> None:
    first = BufferedTracker(new_run(client), tmp_path / "buffer")
    first.log_metrics({"loss": 0.5}, 16)
    first.close()
    other = RunTracker(client, client.create_run("0").info.run_id)
    BufferedTracker(other, tmp_path / "buffer").close()
    assert [point[:2] for point in points(other, "train/loss")] == [(16, 0.5)]


def test_metrics_already_logged_by_another_machine_are_not_repeated(client: MlflowClient, tmp_path: Path) -> None:
    tracker = new_run(client)
    image = Image.new("L", (4, 4))
    for name, images in (("here", (16, 32)), ("there", (16, 32, 48)), ("elsewhere", (16,))):
        writer = BufferedTracker(RunTracker(client, tracker.run_id), tmp_path / name)
        for step in images:
            writer.log_metrics({"loss": 1 / step}, step)
            writer.log_image("samples", image, step)
        writer.close()
    assert [point[:2] for point in points(tracker, "train/loss")] == [(16, 1 / 16), (32, 1 / 32), (48, 1 / 48)]
    assert [point[0] for point in points(tracker, "train/samples_at_images")] == [16, 32, 48]
