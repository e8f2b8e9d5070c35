"""Memory of Muon's step, estimated before training: against arithmetic by hand and torch's own account."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from diffusion.common.threads import worker_threads
from diffusion.families.config import ModelConfig
from diffusion.families.ddpm.network import UNet
from diffusion.training.config import TrainingConfig
from diffusion.training.muon import Muon
from diffusion.training.preflight import Preflight, make_preflight, muon_size, warn_of_memory
from tests.builders.small_trainers import make_trainer

MODEL = ModelConfig(width=32, channel_mult=(1, 2), blocks=1, attention=(1,), patch=2)
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


def preflight(dataset: Path, threads: int, model: ModelConfig = MODEL, **training: object) -> Preflight:
    config = TrainingConfig.model_validate({"images": 96, "batch_size": 48, "cpu_threads": threads} | training)
    with worker_threads(threads) as pool:
        return make_preflight(make_trainer(dataset, model, config, pool, 96), None)


def test_preflight_counts_the_step_or_the_images_whichever_takes_more(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network = UNet(MODEL, 1, 8, classes=2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    sizes = by_hand(network.matrices())
    small, threaded, adamw = (
        preflight(dataset, n, micro_batch=1, **more) for n, more in ((1, {}), (2, {}), (1, {"optimizer": "adamw"}))
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
    about = preflight(dataset, 1, MODEL.model_copy(update={"patch": 1}))
    assert about.images_at_once == 48
    assert about.activation_bytes > about.optimizer_bytes > 0
    assert about.memory == about.state_bytes + about.activation_bytes
