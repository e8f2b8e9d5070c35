"""What is known of a run before it begins: its length, work and size."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from diffusion.checkpoints import load_model
from diffusion.common.errors import UserError
from diffusion.common.model_files import read_header
from diffusion.training.config import TrainingConfig
from diffusion.training.preflight import count_flops
from diffusion.training.train import preflight
from tests.builders.training_runs import CONFIG, MODEL, SAMPLING, Stop, StopAt, run


@pytest.mark.slow
def test_minutes_are_converted_to_images_once(dataset: Path, tmp_path: Path) -> None:
    config = TrainingConfig(dataset="blobs", minutes=0.1, batch_size=16, checkpoints=2)
    with pytest.raises(Stop):
        run(dataset, tmp_path / "run", config, track=lambda _: StopAt(1))
    first = sorted((tmp_path / "run" / "checkpoints").glob("*.safetensors"))[0]
    planned = read_header(first)["total"]
    images = run(dataset, tmp_path / "run", config).images
    assert images == planned
    assert images % 16 == 0


def test_slow_machine_gets_fewer_checkpoints_and_is_told(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("diffusion.training.preflight.MEASURED_SECONDS", 0.1)
    folder = tmp_path / "run"
    config = TrainingConfig(dataset="blobs", minutes=0.02, batch_size=16, checkpoints=1000, keep=1000)
    with pytest.raises(Stop), caplog.at_level(logging.WARNING):
        run(dataset, folder, config, track=lambda _: StopAt(1))
    planned = json.loads((folder / "preflight.json").read_bytes())
    assert 1 <= planned["checkpoints"] < 1000
    assert any("instead of 1000" in record.getMessage() for record in caplog.records)
    total = run(dataset, folder, config).images
    grids = sorted(int(path.stem) for path in (folder / "samples").iterdir())
    assert len(grids) <= planned["checkpoints"]
    # A resumption keeps their distance.
    assert grids[-1] == total
    assert len(set(np.diff([0, *grids[:-1]]))) <= 1


def test_single_sample_grid_slower_than_the_budget_still_trains(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusion.training.preflight.MEASURED_SECONDS", 0.1)
    config = TrainingConfig(dataset="blobs", minutes=1e-6, batch_size=16, checkpoints=6)
    assert run(dataset, tmp_path / "run", config).images == 16
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 1


def test_dry_run_describes_the_run_and_writes_nothing(dataset: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    about = preflight(dataset, MODEL, CONFIG, SAMPLING)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert (about.train + about.held_out, about.shape, about.images) == (48, (1, 8, 8), 320)
    result = run(dataset, tmp_path / "run")
    weights = load_model(result.final).network.state_dict()
    assert about.parameters == sum(value.numel() for value in weights.values())
    checkpoint_bytes = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert about.disk_bytes / 3 < checkpoint_bytes < about.disk_bytes * 1.5
    assert 0 < about.seconds < 600
    words = dict(about.lines())
    assert words["length"] == f"320 images, {320 / about.train:.1f} epochs"
    largest = max(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").glob("*.safetensors"))
    assert about.checkpoint_bytes == pytest.approx(largest, rel=0.3)


def test_work_grows_with_width_and_size_as_convolutions_do() -> None:
    # Nearly all of it is convolutions, whose work grows with the square of the channels and with the positions.
    small, twice = (count_flops(MODEL.model_copy(update={"width": width}), (1, 8, 8), 0) for width in (16, 32))
    assert 3.5 < twice / small < 4
    assert count_flops(MODEL, (1, 16, 16), 0) / small == pytest.approx(4, rel=0.02)


def test_disk_too_small_for_checkpoints_is_an_early_error(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No test may fill the disk of the machine it runs on.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"checkpoints in .* and its disk has 1000 Bytes free: .* lower training\.keep"):
        run(dataset, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
