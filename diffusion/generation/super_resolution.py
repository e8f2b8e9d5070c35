"""Super-resolution by diffusion (SR3, arXiv 2104.07636).

The network sees the small image, enlarged by interpolation, and predicts the residual to it (SRDiff, 2104.14951).
Larger images are covered with tiles, whose predictions are blended in every step (MultiDiffusion, 2302.08113).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffusion.common.device import CPU, compute_deterministically, resolve_device
from diffusion.common.errors import UserError
from diffusion.common.escaping import pluralize
from diffusion.common.fingerprint import autocast
from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.random import GaussianNoise, uniform
from diffusion.common.shapes import Shape, height_and_width
from diffusion.common.threads import worker_threads
from diffusion.families.config import FamilyConfig
from diffusion.families.diffusion_model import DiffusionModel, count_evaluations
from diffusion.families.model import Conditioning, Model, to_float, to_uint8
from diffusion.generation.config import UNCONDITIONAL, Conditions
from diffusion.generation.generate import Encodings, check_sampling, sample
from diffusion.process.samplers import SamplingConfig


def shrink_images(images: Tensor, scale: int) -> Tensor:
    """Downscale ``images``, (N, C, H, W) uint8, to (N, C, H/scale, W/scale) uint8."""
    # Bicubic with antialiasing, as in SR3: equal to Pillow's but for rounding. Integers, as in image files.
    small_shape = tuple(side // scale for side in height_and_width(images))
    output = interpolate(images.float(), small_shape, mode="bicubic", antialias=True)
    return output.round().clamp(0, 255).to(torch.uint8)


def enlarge_images(small: Tensor, scale: int) -> Tensor:
    """Upscale ``small``, (N, C, h, w) uint8, bicubically: (N, C, h·scale, w·scale) float32, about in [−1, 1]."""
    # Enlarging needs no antialiasing; with it, torch's kernel is the one of ``shrink_images``, and of Pillow.
    output = interpolate(to_float(small), scale_factor=scale, mode="bicubic", antialias=True)
    return output.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class GenerationTask:
    """Inputs and conditioning of a model, for training, evaluation and requests: noise alone, or a small image, too."""

    low_resolution: int | None = None
    """Super-resolution: height and width of small square images, in pixels; None: generation from noise."""
    scale: int = 1
    """Factor between small and large images."""
    max_noise: float = 0.0
    """Largest standard deviation of the noise that training adds to them."""

    @property
    def description(self) -> str:
        """The task as a verb phrase."""
        return f"enlarges from {self.low_resolution} pixels" if self.low_resolution else "generates from noise"

    def inputs(self, images: Tensor) -> Tensor | None:
        """Make the small version of each image, (N, C, h, w) uint8; None for generation from noise."""
        return shrink_images(images, self.scale) if self.low_resolution else None

    def conditioning(self, images: Tensor) -> Conditioning:
        """Make the small version of each image at full size, (N, C, H, W) float32, and a noise level of 0, (N,)."""
        if (inputs := self.inputs(images)) is None:
            return {}
        return {"low": enlarge_images(inputs, self.scale), "level": torch.zeros(len(images))}

    def sigma_data(self, images: Tensor) -> float:
        """Compute the standard deviation of the residuals to the small versions of ``images``."""
        # To four digits, as further ones depend on the number of cores.
        residuals = to_float(images) - self.conditioning(images)["low"]
        return float(f"{residuals.double().square().mean().sqrt().item():.4g}")


def task_of(config: FamilyConfig, size: int) -> GenerationTask:
    """Return the task of a model with this configuration for images of ``size``, as in ``ModelHeader``."""
    if config.low_resolution is not None:
        return GenerationTask(config.low_resolution, size // config.low_resolution, config.max_low_resolution_noise)
    return GenerationTask()


def scale_of(model: Model) -> int:
    """Return the scale of a super-resolution model; raises UserError for any other model."""
    if (task := task_of(model.config, model.header.size)).low_resolution:
        return task.scale
    raise UserError(
        "the model generates images and was not trained to enlarge any: train one with model.low_resolution, the "
        f"height and width of small images, say {model.header.size // 2}"
    )


def tile_shape(model: Model, images: Tensor) -> Shape:
    """Choose (h, w) of the tiles that cover small ``images`` (N, C, h, w): of the small training images' shapes.

    It is the one of which fewest tiles are needed. Raises UserError for images that ``model`` cannot enlarge.
    """
    _, channels, height, width = images.shape
    scale = scale_of(model)
    shapes = [(high // scale, wide // scale) for high, wide in model.header.trained_shapes]
    if channels != model.header.channels:
        raise UserError(
            f"the image has {pluralize(channels, 'channel')} and the model enlarges images of {model.header.channels}: "
            f"make it {'grey' if model.header.channels == 1 else 'RGB'}"
        )
    candidates = [(high, wide) for high, wide in shapes if high <= height and wide <= width]
    if not candidates:
        sizes = " or ".join(f"{high}×{wide}" for high, wide in shapes)
        raise UserError(
            f"the image has {height}×{width} pixels (height × width) and the model was trained on {sizes}, so it "
            "enlarges nothing lower or narrower: give it a larger one"
        )
    return min(candidates, key=lambda shape: len(place_tiles(height, shape[0])) * len(place_tiles(width, shape[1])))


def generate(
    model: Model,
    inputs: Tensor | None,
    indices: range,
    seed: int,
    config: SamplingConfig,
    progress: Progress = ignore_progress,
    conditions: Conditions = UNCONDITIONAL,
    encodings: Encodings | None = None,
) -> Tensor:
    """Generate the images ``indices`` of ``seed``, (N, C, H, W) uint8, from the ``inputs`` of the model's task.

    ``encodings`` are those of the prompts, if they are made.
    """
    if inputs is None:
        return sample(model, indices, seed, config, progress, conditions, encodings=encodings)
    return upscale(model, inputs, seed, config, progress, indices.start)


def add_conditioning_noise(
    conditioning: Conditioning, max_noise: float, seed: int, indices: Sequence[int]
) -> Conditioning:
    """Add noise of a standard deviation uniform in [0, ``max_noise``] to each small image (arXiv 2106.15282, 4.3)."""
    low, level = conditioning["low"], max_noise * uniform(seed, "low_resolution/level", indices).float()
    noise = GaussianNoise(seed, "low_resolution/noise", indices, tuple(low.shape[1:]))()
    return {"low": low + level[:, None, None, None] * noise, "level": level}


@dataclass(frozen=True)
class Tiles:
    """Overlapping tiles that cover a canvas, K of them, all of one shape."""

    shape: Shape
    """Height and width, in pixels."""
    places: list[tuple[int, int]]
    """First row and column of each tile."""
    weights: Tensor
    """Blending weights, (K, 1, height, width), which sum to 1 at each pixel of the canvas."""

    def cut(self, canvas: Tensor) -> Tensor:
        """Cut ``canvas`` (N, C, H, W) into tiles, the first image's first: (N K, C, height, width)."""
        high, wide = self.shape
        pieces = [canvas[:, :, top : top + high, left : left + wide] for top, left in self.places]
        return torch.stack(pieces, dim=1).flatten(0, 1)

    def blend(self, pieces: Tensor, height: int, width: int) -> Tensor:
        """Blend tiles from ``cut``: (N, C, height, width) float32."""
        high, wide = self.shape
        pieces = pieces.reshape(-1, len(self.places), *pieces.shape[1:])
        canvas = torch.zeros(len(pieces), pieces.shape[2], height, width, device=pieces.device)
        for number, (top, left) in enumerate(self.places):
            place = canvas[:, :, top : top + high, left : left + wide]
            place += self.weights[number] * pieces[:, number]
        return canvas


def make_tiles(height: int, width: int, shape: Shape, scale: int, device: torch.device = CPU) -> Tiles:
    """Make tiles of ``shape`` in small pixels for a small image of ``height`` × ``width``, upscaled by ``scale``."""
    # Aligned to small pixels, as in training. Weights fall towards the edges, where the network lacks context.
    pairs = zip((height, width), shape, strict=True)
    rows, columns = ([scale * start for start in place_tiles(length, tile)] for length, tile in pairs)
    places = [(top, left) for top in rows for left in columns]
    high, wide = (side * scale for side in shape)
    ramps = [torch.minimum(torch.arange(1, n + 1), torch.arange(n, 0, -1)).float() for n in (high, wide)]
    tent = ramps[0][:, None] * ramps[1]
    total = torch.zeros(height * scale, width * scale)
    for top, left in places:
        total[top : top + high, left : left + wide] += tent
    weights = [tent / total[top : top + high, left : left + wide] for top, left in places]
    return Tiles((high, wide), places, torch.stack(weights)[:, None].to(device))


def place_tiles(length: int, size: int) -> list[int]:
    """Compute evenly spaced starts of tiles of ``size`` that cover ``length`` and overlap by a quarter or more."""
    count = 1 + math.ceil((length - size) / (size - max(1, size // 4)))
    return [round(number * (length - size) / max(count - 1, 1)) for number in range(count)]


def tile_network(
    network: Callable[..., Tensor],
    tiles: Tiles,
    low: Tensor,
    level: float,
    config: SamplingConfig,
    run_batches: Callable[[Callable[[Tensor], Tensor]], Tensor],
) -> Callable[[Tensor, Tensor], Tensor]:
    """Make a ``network`` of tiles one of whole images, given the small ones enlarged, ``low`` (N, C, H, W).

    ``run_batches`` calls a function with the numbers of the tiles in each compute batch, and joins its predictions, of
    which those beyond the last tile are left out. ``level`` is the noise level of ``low``.
    """
    low_tiles = tiles.cut(low)

    def predict_images(x: Tensor, time: Tensor) -> Tensor:
        x_tiles, times = tiles.cut(x), time.repeat_interleave(len(tiles.places))

        def predict(rows: Tensor) -> Tensor:
            levels = torch.full((len(rows),), level, device=low.device)
            # Both contexts are thread-local, so they are entered in the worker thread.
            with torch.inference_mode(), autocast(config.precision, low.device):
                return network(x_tiles[rows], times[rows], low=low_tiles[rows], level=levels)

        # The estimates are linear in the predictions, so these are blended.
        return tiles.blend(run_batches(predict)[: len(low_tiles)], *x.shape[-2:])

    return predict_images


def upscale(
    model: Model,
    images: Tensor,
    seed: int,
    config: SamplingConfig,
    progress: Progress = ignore_progress,
    first: int = 0,
) -> Tensor:
    """Upscale small ``images``, (N, C, h, w) uint8, to (N, C, h·scale, w·scale) uint8 with the model's scale.

    Image i has the noise of index ``first`` + i of ``seed``; its bits depend on no other image, as batches always have
    ``config.compute_batch`` tiles. Raises UserError as ``tile_shape`` and ``check_sampling`` do.
    """
    shape = tile_shape(model, images)
    check_sampling(model, config, UNCONDITIONAL)
    assert isinstance(model, DiffusionModel)
    scale, batch = scale_of(model), config.compute_batch
    device = resolve_device(config.device)
    height, width = height_and_width(images)
    model = model.to(device)
    tiles = make_tiles(height, width, shape, scale, device)
    group_size = max(1, batch // len(tiles.places))
    groups = [range(start, start + group_size) for start in range(0, len(images), group_size)]
    is_single = len(groups) == 1
    # The tiles of each compute batch; the last batch is padded with the last tile.
    pieces = group_size * len(tiles.places)
    batches = torch.arange(math.ceil(pieces / batch) * batch).clamp(max=pieces - 1).view(-1, batch)
    evaluations, steps = count(1), count_evaluations(config, model.schedule)

    with compute_deterministically(device), worker_threads(None if device.type == "cpu" else 1) as pool:

        def generate(members: range) -> Tensor:
            # The last group is padded with the last image.
            low = enlarge_images(images[torch.tensor(members).clamp(max=len(images) - 1)], scale)
            numbers = range(first + members.start, first + members.stop)
            full_shape, level = tuple(low.shape[1:]), config.low_resolution_noise or 0.0
            if level:
                low = low + level * GaussianNoise(seed, "sampling/low_resolution", numbers, full_shape)()
            low = low.to(device)

            # A single group computes its batches in parallel; several groups already occupy the threads.
            def run_batches(predict: Callable[[Tensor], Tensor]) -> Tensor:
                predictions = torch.cat(list((pool.map if is_single else map)(predict, batches)))
                if is_single:
                    progress("steps of enlarging", next(evaluations), steps)
                return predictions

            network = tile_network(model.network, tiles, low, level, config, run_batches)
            noise = GaussianNoise(seed, "sampling", numbers, full_shape)
            with torch.inference_mode():
                denoiser = replace(model.denoiser(), network=network, around=low)
                output = config.run(denoiser, config.sigma_grid(model.schedule), lambda: noise().to(device), low)
                return to_uint8(output).cpu()

        outputs = []
        for members, output in zip(groups, (map if is_single else pool.map)(generate, groups), strict=True):
            outputs.append(output)
            progress("images enlarged", min(members.stop, len(images)), len(images))
    return torch.cat(outputs)[: len(images)]
