"""Limits of what others may ask for: work is counted as it is done, and ends with its budget within a layer."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffusion.checkpoints import load_model
from diffusion.common.errors import UserError
from diffusion.families.model import Model
from diffusion.generation.config import GenerationLimits, make_request
from diffusion.generation.limits import Budget, BusyError, RequestQueue, StoppedError
from diffusion.generation.requests import answer
from diffusion.process.samplers import SAMPLERS, sampling_config
from tests.builders.small_models import CONFIG, write_model
from tests.diffusion.generation.test_requests import HOLE, PIXELS, png

NAMES = {kind.model_fields["sampler"].default for kind in SAMPLERS}
SAMPLING = sampling_config(steps=12, compute_batch=4)
UNLIMITED = GenerationLimits(max_request_megapixels=math.inf, max_request_seconds=3600)
IMAGE: dict[str, Any] = {"image": png(PIXELS)}


@pytest.fixture
def model(tmp_path: Path) -> Model:
    classes = {"cat": 1, "dog": 1}
    return load_model(write_model(tmp_path / "model.safetensors", seed=0, images=0, classes=classes, guide=1))


@pytest.fixture
def enlarging(tmp_path: Path) -> Model:
    config = CONFIG.model_copy(update={"low_resolution": 4, "conditional": False})
    return load_model(write_model(tmp_path / "enlarging.safetensors", seed=0, images=0, config=config))


@contextmanager
def evaluations(model: Model) -> Iterator[list[int]]:
    """The pixels of each evaluation of a network of ``model``, as its inputs have them."""
    pixels: list[int] = []

    def record(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        pixels.append(inputs[0].shape[0] * math.prod(inputs[0].shape[2:]))

    networks = [network for network in (model.network, model.guide) if network is not None]
    handles = [network.register_forward_pre_hook(record) for network in networks]
    try:
        yield pixels
    finally:
        for handle in handles:
            handle.remove()


def generate(model: Model, rows: list[dict[str, Any]], sampling: Any = SAMPLING, **limits: float) -> list[torch.Tensor]:
    budget = Budget(UNLIMITED.model_copy(update=limits))
    return answer(model, [make_request(row) for row in rows], sampling, budget=budget)


def check_work(model: Model, rows: list[dict[str, Any]], sampling: Any = SAMPLING, factor: float = 1.0001) -> None:
    """Assert that less work than is done is refused before it begins, and ``factor`` of it is allowed."""
    with evaluations(model) as pixels:
        generate(model, rows, sampling)
    megapixels = sum(pixels) / 1e6
    with evaluations(model) as pixels, pytest.raises(UserError):
        generate(model, rows, sampling, max_request_megapixels=0.99 * megapixels)
    assert not pixels
    generate(model, rows, sampling, max_request_megapixels=factor * megapixels)


@pytest.mark.parametrize(
    "rows",
    [
        [{"count": 1}],
        [{"count": 9, "steps": 20}],
        [{"index": 3, "count": 2}],  # in two compute batches
        [{"index": index} for index in range(4)],  # in one
        [{"index": index} for index in range(0, 16, 4)],
        [{"seed": seed, "label": "cat"} for seed in range(3)],
        [{"label": "cat", "guidance": 3}],
        [{"size": "16x8"}, {}],
        [{"task": "interpolate", "to_seed": 1, "count": 5, "label": "dog"}],
        [{"task": "inpaint", "mask": png(HOLE), "count": 2} | IMAGE],
        [{"task": "inpaint", "mask": png(HOLE), "method": "repaint", "resample_steps": 3} | IMAGE],
    ],
)
def test_counted_work_is_the_work_that_is_done(model: Model, rows: list[dict[str, Any]]) -> None:
    check_work(model, rows)


@pytest.mark.parametrize("sampler", sorted(NAMES - {"consistency", "scheduler"}))
def test_no_sampler_does_more_work_than_is_counted(model: Model, sampler: str) -> None:
    check_work(model, [{"count": 2}], sampling_config(sampler=sampler, steps=12, compute_batch=4), factor=1.05)


def test_more_steps_of_a_students_edit_count(tmp_path: Path) -> None:
    training: dict[str, object] = {"student": {"steps": 2}}
    student = load_model(write_model(tmp_path / "student.safetensors", seed=0, images=0, training=training))
    check_work(student, [{"count": 5}])
    check_work(student, [{"task": "inpaint", "mask": png(HOLE)} | IMAGE])


def test_autoguidance_and_gradients_count(model: Model) -> None:
    check_work(model, [{"count": 2}], sampling_config(steps=12, compute_batch=4, autoguidance=2))
    check_work(model, [{"task": "inpaint", "mask": png(HOLE), "method": "pigdm"} | IMAGE], factor=3.001)
    check_work(model, [{"task": "img2img", "strength": 0.5} | IMAGE], factor=2.001)


@pytest.mark.parametrize("count", [1, 3])
def test_enlarging_counts_overlapping_tiles_of_the_output(enlarging: Model, count: int) -> None:
    check_work(enlarging, [{"task": "upscale", "count": count} | IMAGE])


def test_steps_are_counted_at_once_however_many(model: Model) -> None:
    """Counting by running a sampler took seconds for each row that is refused."""
    rows = [{"seed": seed, "steps": 10_000, "sampler": "unipc"} for seed in range(100)]
    budget = Budget(GenerationLimits(max_request_seconds=20))
    with pytest.raises(UserError):
        answer(model, [make_request(row) for row in rows], sampling_config(), budget=budget)


def test_images_far_larger_than_in_training_are_refused(model: Model) -> None:
    generate(model, [{"size": "16x16"}])
    with pytest.raises(UserError):
        generate(model, [{"size": "24x16"}])
    answer(model, [make_request({"size": "24x16"})], SAMPLING)  # on one's own machine they are not


@pytest.mark.parametrize("row", [{"count": 8}, {"task": "inpaint", "mask": png(HOLE), "method": "pigdm"} | IMAGE])
def test_a_generation_ends_before_the_next_evaluation(model: Model, row: dict[str, Any]) -> None:
    before = generate(model, [row])[0]
    with evaluations(model) as pixels:
        budget = Budget(UNLIMITED, lambda: len(pixels) >= 4)
        with pytest.raises(StoppedError):
            answer(model, [make_request(row)], SAMPLING, budget=budget)
    assert 4 <= len(pixels) <= 4 + torch.get_num_threads() + 1  # those in other threads
    assert torch.equal(generate(model, [row])[0], before)
    assert torch.equal(answer(model, [make_request(row)], SAMPLING)[0], before)


def test_a_generation_ends_at_its_deadline(model: Model) -> None:
    with pytest.raises(StoppedError):
        generate(model, [{"steps": 10_000, "count": 64}], max_request_seconds=0.5)


def test_requests_take_turns_and_a_full_queue_refuses() -> None:
    queue, budget, order = RequestQueue(1), Budget(UNLIMITED), list[str]()
    inside = threading.Event()

    def wait() -> None:
        with queue.take_place():
            inside.set()
            with queue.wait_for_turn(budget):
                order.append("second")

    second = threading.Thread(target=wait)
    with queue.take_place(), queue.wait_for_turn(budget):
        second.start()
        assert inside.wait(10)
        with pytest.raises(BusyError), queue.take_place():
            pass
        order.append("first")
    second.join()
    assert order == ["first", "second"]
    abandoned = Budget(UNLIMITED, lambda: True)
    with queue.wait_for_turn(budget), pytest.raises(StoppedError), queue.wait_for_turn(abandoned):
        pass


def test_limits_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_MAX_REQUEST_SECONDS", "7.5")
    assert GenerationLimits.from_environment() == GenerationLimits(max_request_seconds=7.5)
    monkeypatch.setenv("DARKROOM_MAX_WAITING_REQUESTS", "many")
    with pytest.raises(UserError, match="DARKROOM_MAX_WAITING_REQUESTS"):
        GenerationLimits.from_environment()
