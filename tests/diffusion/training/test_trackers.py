"""TensorBoard and Weights & Biases: every metric and grid arrives, each step once, also after a kill."""

import importlib
import json
import os
import struct
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusion.common.errors import UserError
from diffusion.training.logging import read_metrics
from diffusion.training.trackers import TRACKERS, open_trackers
from tests.builders import ROOT
from tests.builders.training_runs import CONFIG, Stop, StopAt, run

FIELDS = {"dataset": "blobs"}
KILLED = """
import os, signal, sys
from pathlib import Path
from PIL import Image
from diffusion.training.trackers import open_trackers
with open_trackers([sys.argv[1]], Path(sys.argv[2]), 0, {"dataset": "blobs"}) as [tracker]:
    for images in (8, 16):
        tracker.log_metrics({"loss": images / 10}, images)
    tracker.log_image("samples", Image.new("L", (8, 8)), 16)
    tracker.sync()
    tracker.log_metrics({"loss": 2.4}, 24)
    os.kill(os.getpid(), signal.SIGKILL)
"""


LOGGED = CONFIG.model_copy(update={"log_to": ("tensorboard",)})


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """Steps and values as TensorBoard's own reader shows them."""
    events = EventAccumulator(str(folder / TRACKERS / "tensorboard")).Reload()
    return [(point.step, point.value) for point in events.Scalars(name)]


def kill(tracker: str, output: Path) -> None:
    """A process that logs up to 24 images, and is killed after the checkpoint at 16."""
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    process = subprocess.run([sys.executable, "-c", KILLED, tracker, str(output)], env=variables, check=False)
    assert process.returncode == -9


@pytest.mark.slow
def test_tensorboard_shows_the_csv_files_also_after_a_stop(dataset: Path, tmp_path: Path) -> None:
    plain, logged = tmp_path / "plain", tmp_path / "logged"
    with pytest.raises(Stop):
        run(dataset, logged, LOGGED, track=lambda _: StopAt(230))
    weights = [run(dataset, plain).final.read_bytes(), run(dataset, logged, LOGGED).final.read_bytes()]
    assert weights[0] == weights[1]
    history = [(int(row["images"]), pytest.approx(row["loss"])) for row in read_metrics(logged / "history.csv")]
    assert scalars(logged, "train/loss") == history
    rows = read_metrics(logged / "losses.csv")
    losses = [(int(row["images"]), pytest.approx(row["held_out_loss_ema"])) for row in rows]
    assert scalars(logged, "train/held_out_loss_ema") == losses
    events = EventAccumulator(str(logged / TRACKERS / "tensorboard")).Reload()
    assert [image.step for image in events.Images("samples")] == [images for images, _ in losses]


@pytest.mark.long
@pytest.mark.slow
def test_tensorboard_shows_no_step_twice_after_a_kill(tmp_path: Path) -> None:
    kill("tensorboard", tmp_path)
    time.sleep(1)  # files of one second are read in the order of their processes' numbers
    with open_trackers(["tensorboard"], tmp_path, 16, FIELDS) as [tracker]:
        for images in (24, 32):
            tracker.log_metrics({"loss": images / 10, "nothing": float("nan")}, images)
        tracker.log_image("samples", Image.new("RGB", (8, 8)), 32)
    assert scalars(tmp_path, "train/loss") == [(n, pytest.approx(n / 10)) for n in (8, 16, 24, 32)]
    events = EventAccumulator(str(tmp_path / TRACKERS / "tensorboard")).Reload()
    assert [image.step for image in events.Images("samples")] == [16, 32]
    assert "train/nothing" not in events.Tags()["scalars"]


@pytest.mark.skipif(not find_spec("wandb"), reason="wandb is not installed: pip install 'darkroom-diffusion[wandb]'")
@pytest.mark.slow
def test_wandb_offline_has_each_step_once_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    kill("wandb", tmp_path)
    with open_trackers(["wandb"], tmp_path, 16, FIELDS) as [tracker]:
        for images in (24, 32):
            tracker.log_metrics({"loss": images / 10, "nothing": float("nan")}, images)
        tracker.log_image("samples", Image.new("RGB", (8, 8)), 32)
    records = offline_records(tmp_path / TRACKERS / "wandb")
    assert len({run for run, _ in records}) == 1
    losses = sorted((row["images"], row["train/loss"]) for _, row in records if "train/loss" in row)
    assert losses == [(n, pytest.approx(n / 10)) for n in (8, 16, 24, 32)]
    assert sorted(row["images"] for _, row in records if "samples" in row) == [16, 32]


def offline_records(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Run id and values of each point in the files that `wandb sync` would send, which are logs as LevelDB writes."""
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    found, head = [], 7
    for path in sorted(folder.rglob("*.wandb")):
        data, position, record = path.read_bytes(), head, b""
        while position + head <= len(data):
            left = 2**15 - position % 2**15
            if left < head:  # the rest of a block
                position += left
                continue
            _, size, kind = struct.unpack_from("<IHB", data, position)
            record += data[position + head : position + head + size]
            position += head + size
            if kind in (1, 4):  # whole, or the last part
                message, record = messages.Record.FromString(record), b""
                if message.WhichOneof("record_type") == "history":
                    items = ((item.key or item.nested_key[0], item.value_json) for item in message.history.item)
                    found.append((path.stem, {key: json.loads(value) for key, value in items}))
    return found


@pytest.mark.skipif(bool(find_spec("wandb")), reason="wandb is installed")
def test_a_missing_package_is_named_before_the_training(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"darkroom-diffusion\[wandb\]"):
        run(dataset, tmp_path / "run", CONFIG.model_copy(update={"log_to": ("wandb",)}))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_training_that_begins_again_keeps_no_steps(dataset: Path, tmp_path: Path) -> None:
    run(dataset, tmp_path / "run", LOGGED)
    run(dataset, tmp_path / "run", LOGGED.model_copy(update={"images": 160}), restart="if_different")
    assert max(step for step, _ in scalars(tmp_path / "run", "train/loss")) == 160
