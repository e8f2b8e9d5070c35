"""Limits of what others may ask a model for: the work and time of a request table, and tables at once.

Work is counted in megapixels: images × network evaluations × pixels of an image, in millions, of all that is computed.
Guidance doubles the evaluations, and images are computed in whole compute batches, as their bits depend on them.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from diffusion.common.errors import DarkroomError, TransientError, UserError
from diffusion.common.shapes import height_and_width, shape_name
from diffusion.families.diffusion_model import EDIT_STEPS
from diffusion.families.model import Model
from diffusion.generation.config import GenerationLimits
from diffusion.generation.super_resolution import place_tiles, scale_of, tile_shape
from diffusion.process.editing import Edit
from diffusion.process.samplers import SamplingConfig, SchedulerSampling

MAX_ENLARGEMENT = 4
"""Most pixels of an image, relative to the largest of training: a compute batch of them has to fit into memory."""


class BusyError(TransientError):
    """Refusal of a request because as many as may wait are waiting."""


class StoppedError(DarkroomError):
    """End of a generation whose deadline passed, or whose images nobody waits for."""


@dataclass(frozen=True)
class Budget:
    """Work and time that a request table may take from now on."""

    limits: GenerationLimits
    is_abandoned: Callable[[], bool] = lambda: False
    """Whether nobody waits for the images any longer."""
    begun: float = field(default_factory=time.monotonic)

    def check(self) -> None:
        """Raise StoppedError if the deadline passed, or nobody waits for the images."""
        if self.is_abandoned():
            raise StoppedError("the request was stopped: its client left, or the server ends")
        if time.monotonic() > self.begun + self.limits.max_request_seconds:
            raise StoppedError(
                f"the request was stopped after {self.limits.max_request_seconds:g} seconds: ask for fewer images, "
                "steps or pixels, or set DARKROOM_MAX_REQUEST_SECONDS to more"
            )

    def check_work(self, megapixels: float) -> None:
        """Raise UserError for more work than is allowed."""
        if megapixels > (limit := self.limits.max_request_megapixels):
            raise UserError(
                f"the request takes {megapixels:,.0f} megapixels (images × network evaluations × pixels, in whole "
                f"compute batches), and {limit:,g} are allowed: ask for fewer images, steps or pixels, or set "
                f"DARKROOM_MAX_REQUEST_MEGAPIXELS to {math.ceil(megapixels)} or more"
            )

    @contextmanager
    def watch(self, model: Model) -> Iterator[None]:
        """Context in which ``check`` is called before each layer of the networks of ``model``.

        So a generation ends within a layer, in whichever thread it runs. Models that share the networks end with it.
        """

        def check(*_: object) -> None:  # a function: the model's copy on a GPU gets it, too
            self.check()

        networks = [network for network in vars(model).values() if isinstance(network, nn.Module)]
        layers = {layer for network in networks for layer in network.modules()}
        handles = [layer.register_forward_pre_hook(check) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class RequestQueue:
    """Queue for a model that generates one request table at a time: two would take twice the memory, and as long."""

    def __init__(self, max_waiting: int) -> None:
        self._places, self._turn = threading.Semaphore(max_waiting + 1), threading.Lock()

    @contextmanager
    def take_place(self) -> Iterator[None]:
        """Context of a place in the queue; raises BusyError if there is none."""
        if not self._places.acquire(blocking=False):
            raise BusyError("the model is busy, and as many requests wait as may: try again later")
        try:
            yield
        finally:
            self._places.release()

    @contextmanager
    def wait_for_turn(self, budget: Budget) -> Iterator[None]:
        """Context of the table whose turn it is; raises StoppedError as ``check`` of its ``budget`` does."""
        while not self._turn.acquire(timeout=0.1):
            budget.check()
        try:
            yield
        finally:
            self._turn.release()


def check_size(model: Model) -> None:
    """Raise UserError for images of far more pixels than training images have."""
    largest = max(math.prod(shape) for shape in model.header.trained_shapes)
    if math.prod(model.shape[1:]) > MAX_ENLARGEMENT * largest:
        raise UserError(
            f"images of {shape_name(model.shape[1:])} have over {MAX_ENLARGEMENT} times the pixels of those that the "
            f"model was trained on, {model.header.pixels}: give a smaller size"
        )


def count_megapixels(
    model: Model, config: SamplingConfig, indices: Sequence[int], source: Edit | Tensor | None
) -> float:
    """Count the work of the images ``indices``, of an edit, or of enlarging the image ``source``, in megapixels."""
    batch = config.compute_batch
    if isinstance(source, Tensor):
        tile, lengths = tile_shape(model, source[None]), height_and_width(source)
        tiles = math.prod(len(place_tiles(length, side)) for length, side in zip(lengths, tile, strict=True))
        members = max(1, batch // tiles)
        computed = math.ceil(len(indices) / members) * math.ceil(members * tiles / batch) * batch
        pixels = math.prod(tile) * scale_of(model) ** 2
    else:
        computed = len({index // batch for index in indices}) * batch
        pixels = math.prod(model.shape[1:])
    return computed * max_evaluations(model, config, source) * pixels / 1e6


def max_evaluations(model: Model, config: SamplingConfig, source: Edit | Tensor | None = None) -> int:
    """Compute an upper bound of the network evaluations of an image, at once, whatever the number of steps."""
    if "noise_levels" not in model.config.abilities:
        return 1
    if isinstance(config, SchedulerSampling):
        evaluations = max(times for times, _ in model.passes(config))
    else:
        is_student_edit = isinstance(source, Edit) and model.header.student_steps is not None
        steps = max(config.steps, EDIT_STEPS if is_student_edit else 0)
        evaluations = steps * config.evaluations_per_step * (2 if config.is_guided else 1)
    # A gradient takes about twice the work of the evaluation that it is of.
    return evaluations * (source.resample_steps * (3 if source.guided else 1) if isinstance(source, Edit) else 1)
