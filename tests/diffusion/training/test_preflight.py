"""What is known of a run before it begins: its length, work and size."""

import json
import logging
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from diffusion.checkpoints import load_model
from diffusion.common.errors import UserError
from diffusion.common.model_files import read_header
from diffusion.common.threads import worker_threads
from diffusion.families.config import ModelConfig
from diffusion.families.ddpm.network import UNet
from diffusion.training.config import TrainingConfig
from diffusion.training.muon import Muon
from diffusion.training.preflight import Preflight, count_flops, make_preflight, muon_size, warn_of_memory
from diffusion.training.train import preflight
from tests.builders.small_trainers import make_trainer
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


NETWORK = ModelConfig(width=32, channel_mult=(1, 2), blocks=1, attention=(1,), patch=2)
SHAPES = [(48, 160)] * 3 + [(96, 96)] * 2 + [(200, 40)] + [(32, 24, 3, 3)] * 4


def parameters(shapes: list[tuple[int, ...]], memory_format: torch.memory_format) -> list[nn.Parameter]:
    parameter_list = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for each in parameter_list:
        if each.ndim == 4:
            each.data = each.data.to(memory_format=memory_format)
        each.grad = torch.randn_like(each)
    return parameter_list


def by_hand(matrices: list[nn.Parameter]) -> list[int]:
    """Bytes for each length of the shorter side, the most first: of updates, their matrices, and square products.

    Matrices of convolutions in channels-last format are copies. At most there are six products, Gram matrices among
    them, in an iteration; or three and the results at the end.
    """
    sizes = []
    for side in {min(each.flatten(1).shape) for each in matrices}:
        group = [each for each in matrices if min(each.flatten(1).shape) == side]
        updates = 4 * sum(each.numel() for each in group)
        copies = 4 * sum(each.numel() for each in group if each.flatten(1).data_ptr() != each.data_ptr())
        products = 4 * len(group) * side**2
        sizes.append(updates + copies + max(6 * products, 3 * products + updates))
    return sorted(sizes, reverse=True)


def allocated(matrices: list[nn.Parameter], trace: Path) -> int:
    """Bytes that torch's profiler sees allocated at most in the second step, whose first one makes the momentum."""
    optimizer = Muon(matrices, 0.1, 0.1)
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        optimizer.step()
    profiler.export_chrome_trace(str(trace))
    events = [each for each in json.loads(trace.read_text())["traceEvents"] if each.get("name") == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda each: each["ts"]):
        live += event["args"]["Bytes"]
        most = max(most, live)
    return most


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_estimate_is_what_torch_allocates(memory_format: torch.memory_format, tmp_path: Path) -> None:
    matrices = parameters(SHAPES, memory_format)
    estimate = muon_size(matrices, 1)
    assert estimate == pytest.approx(by_hand(matrices)[0], rel=0.02)
    assert estimate == pytest.approx(allocated(matrices, tmp_path / "trace.json"), rel=0.05)
    assert all(each.grad is not None and not each.is_meta for each in matrices)


def test_threads_update_the_matrices_of_as_many_sides_at_once() -> None:
    matrices = parameters(SHAPES, torch.contiguous_format)
    sizes = by_hand(matrices)
    for threads in (1, 2, 3):
        assert muon_size(matrices, threads) == pytest.approx(sum(sizes[:threads]), rel=0.02)
    assert muon_size(matrices, 9) == pytest.approx(sum(sizes), rel=0.02)
    assert muon_size([], 2) == 0


def estimate(dataset: Path, threads: int, model: ModelConfig = NETWORK, **training: object) -> Preflight:
    config = TrainingConfig.model_validate({"images": 96, "batch_size": 48, "cpu_threads": threads} | training)
    with worker_threads(threads) as pool:
        return make_preflight(make_trainer(dataset, model, config, pool, 96), None)


def test_preflight_counts_the_step_or_the_images_whichever_takes_more(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network = UNet(NETWORK, 1, 8, classes=2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    sizes = by_hand(network.matrices())
    small, threaded, adamw = (
        estimate(dataset, n, micro_batch=1, **more) for n, more in ((1, {}), (2, {}), (1, {"optimizer": "adamw"}))
    )
    assert small.optimizer_bytes == pytest.approx(sizes[0], rel=0.02)
    assert threaded.optimizer_bytes == pytest.approx(sum(sizes[:2]), rel=0.02)
    assert small.memory == small.state_bytes + small.optimizer_bytes > small.state_bytes + small.activation_bytes
    assert "for Muon" in dict(small.lines())["memory"]
    assert (adamw.optimizer_bytes, adamw.memory) == (0, adamw.state_bytes + adamw.activation_bytes)
    assert "Muon" not in dict(adamw.lines())["memory"]
    # Without the step, so much would be enough.
    free = small.state_bytes + math.ceil((small.activation_bytes + small.optimizer_bytes) / 2)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    warn_of_memory(small.model_copy(update={"optimizer_bytes": 0}), torch.device("cpu"))
    assert not caplog.messages
    warn_of_memory(small, torch.device("cpu"))
    (message,) = caplog.messages
    assert "training.optimizer=adamw" in message


def test_activations_count_where_they_take_more_than_the_step(dataset: Path) -> None:
    about = estimate(dataset, 1, NETWORK.model_copy(update={"patch": 1}))
    assert about.images_at_once == 48
    assert about.activation_bytes > about.optimizer_bytes > 0
    assert about.memory == about.state_bytes + about.activation_bytes
