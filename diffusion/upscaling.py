"""Upscaling: small pictures drawn large by a model that was trained to (SR3, arXiv 2104.07636).

The network is shown the small picture, enlarged without it to full size, beside the noisy one, and asked about what the
large one has beyond it (SRDiff, arXiv 2104.14951): what is known already is nothing to be learnt. A picture that has
more pixels than those of the training is covered with overlapping tiles, whose answers are blended at every step of one
reverse process over the whole (MultiDiffusion, arXiv 2302.08113), so that they agree and leave no seams.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffusion.config_sampling import ANYTHING, SamplingConfig
from diffusion.device import repeatable, resolve_device
from diffusion.errors import UserError
from diffusion.fingerprint import autocast
from diffusion.lanes import lanes
from diffusion.model import Conditioning, DiffusionModel, Model, to_float, to_uint8
from diffusion.models.config import FamilyConfig
from diffusion.progress import Progress, silent
from diffusion.random import GaussianNoise, uniform
from diffusion.reverse_process import reversed_from_noise
from diffusion.samplers import Callback, levels_of
from diffusion.sampling import require_effect, require_small

OVERLAP = 4
"""Neighbouring tiles share at least one in so many of their pixels in a direction."""
Answer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From noisy pictures, their times, and what they are shown, with its noise, to a network's answer."""
Each = Callable[[Callable[[Tensor], Tensor], Iterable[Tensor]], Iterable[Tensor]]
"""``map``, or that of an executor."""


def shrunk(pictures: Tensor, size: int) -> Tensor:
    """``pictures``, (N, C, H, W) uint8, made small: (N, C, size, size) uint8."""
    # Bicubic with antialiasing, as in SR3 and in most of what small pictures are made by: the same as Pillow's, but for
    # rounding. In whole numbers, as files have them.
    small = interpolate(pictures.float(), (size, size), mode="bicubic", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8)


def enlarged(small: Tensor, scale: int) -> Tensor:
    """``small``, (N, C, h, w) uint8, by bicubic interpolation: (N, C, h·scale, w·scale) float32, about in [−1, 1]."""
    # Enlarging needs no antialiasing; with it, torch's kernel is that of ``shrunk``, and of Pillow.
    large = interpolate(to_float(small), scale_factor=scale, mode="bicubic", antialias=True)
    return large.contiguous(memory_format=torch.channels_last)


def shown_small(config: FamilyConfig, pictures: Tensor) -> Conditioning:
    """What a network is told of ``pictures`` (N, C, H, W) uint8 by their small versions, without noise; {}: nothing."""
    if config.low_resolution is None:
        return {}
    low = enlarged(shrunk(pictures, config.low_resolution), pictures.shape[-1] // config.low_resolution)
    return {"low": low, "level": torch.zeros(len(low))}


def detail(low_resolution: int, pictures: Tensor) -> float:
    """Standard deviation of what ``pictures`` (N, C, H, W) uint8 have beyond their small versions, to four digits.

    The rest depends on how many cores there are.
    """
    low = enlarged(shrunk(pictures, low_resolution), pictures.shape[-1] // low_resolution)
    return float(f"{(to_float(pictures) - low).double().square().mean().sqrt().item():.4g}")


def noised(told: Conditioning, most: float, seed: int, indices: Sequence[int]) -> Conditioning:
    """``told`` with noise over the small pictures, the standard deviation of each uniform in [0, ``most``].

    That is noise conditioning augmentation (arXiv 2106.15282, section 4.3): trained on clean pictures alone, a network
    takes each fault of a small picture for a detail.
    """
    low, level = told["low"], most * uniform(seed, "low_resolution/level", indices).float()
    noise = GaussianNoise(seed, "low_resolution/noise", indices, tuple(low.shape[1:]))()
    return {"low": low + level[:, None, None, None] * noise, "level": level}


@dataclass(frozen=True)
class Tiles:
    """Overlapping squares that cover a canvas, K of them, all of one size."""

    size: int
    """Height and width, in pixels."""
    places: list[tuple[int, int]]
    """The first row and column of each."""
    weights: Tensor
    """(K, 1, size, size): how much each counts where it lies; those of a pixel of the canvas sum to 1."""

    def on(self, device: torch.device) -> "Tiles":
        """The same for canvases on ``device``."""
        return replace(self, weights=self.weights.to(device))

    def cut(self, canvas: Tensor) -> Tensor:
        """``canvas`` (N, C, H, W) as tiles, those of the first picture first: (N K, C, size, size)."""
        pieces = [canvas[:, :, top : top + self.size, left : left + self.size] for top, left in self.places]
        return torch.stack(pieces, dim=1).flatten(0, 1)

    def blended(self, pieces: Tensor, height: int, width: int) -> Tensor:
        """Tiles as ``cut`` gives them, put together again: (N, C, height, width) float32."""
        pieces = pieces.reshape(-1, len(self.places), *pieces.shape[1:])
        canvas = torch.zeros(len(pieces), pieces.shape[2], height, width, device=pieces.device)
        for number, (top, left) in enumerate(self.places):
            place = canvas[:, :, top : top + self.size, left : left + self.size]
            place += self.weights[number] * pieces[:, number]
        return canvas


def make_tiles(height: int, width: int, size: int, scale: int) -> Tiles:
    """Tiles of ``size`` small pixels for a small picture of ``height`` × ``width``, each ``scale`` pixels when large.

    They begin where small pixels do, as the pictures of the training. Each counts most in its middle and least at its
    edges, where a network sees nothing of what lies beyond.
    """
    rows, columns = ([scale * start for start in starts(length, size)] for length in (height, width))
    places = [(top, left) for top in rows for left in columns]
    full = size * scale
    ramp = torch.minimum(torch.arange(1, full + 1), torch.arange(full, 0, -1)).float()
    tent = ramp[:, None] * ramp
    total = torch.zeros(height * scale, width * scale)
    for top, left in places:
        total[top : top + full, left : left + full] += tent
    weights = [tent / total[top : top + full, left : left + full] for top, left in places]
    return Tiles(full, places, torch.stack(weights)[:, None])


def starts(length: int, size: int) -> list[int]:
    """Where tiles of ``size`` begin that cover ``length``, evenly spread; neighbours overlap by ``OVERLAP`` or more."""
    stride = size - max(1, size // OVERLAP)
    count = 1 + math.ceil((length - size) / stride)
    return [round(number * (length - size) / max(count - 1, 1)) for number in range(count)]


def tiled(
    answer: Answer, tiles: Tiles, low: Tensor, level: Tensor, batch: int, each: Each = map
) -> Callable[..., Tensor]:
    """A network for tiles as one for the canvas on which it is shown ``low`` (N, C, H, W) with noise of ``level`` (N,).

    It is asked about ``batch`` tiles at once, always as many. Its answers are blended, and so are the estimates that
    they stand for, as these are linear in them.
    """
    count = len(low) * len(tiles.places)
    # The last batch is filled up with the last tile.
    numbers = torch.arange(math.ceil(count / batch) * batch).clamp(max=count - 1).view(-1, batch)
    shown = tiles.cut(low)

    def network(x: Tensor, time: Tensor) -> Tensor:
        pieces, times, levels = tiles.cut(x), *(values.repeat_interleave(len(tiles.places)) for values in (time, level))
        answers = each(lambda some: answer(pieces[some], times[some], shown[some], levels[some]), numbers)
        return tiles.blended(torch.cat(list(answers))[:count], *x.shape[-2:])

    return network


def upscale(
    model: Model,
    pictures: Tensor,
    seed: int,
    config: SamplingConfig,
    progress: Progress = silent,
    first: int = 0,
) -> Tensor:
    """Small ``pictures``, (N, C, h, w) uint8, drawn large: (N, C, h·scale, w·scale) uint8.

    The scale is the model's, the size of what it draws by that of what it is shown, below which no height or width may
    be. Picture i has the noise of number ``first`` + i of ``seed``, and bits that depend on nothing asked for beside
    it, as the network always computes ``config.compute_batch`` tiles at once, of one picture or of several.

    Raises UserError if the model was not trained to enlarge, for a picture too small or of other channels, and for
    options that would have no effect.
    """
    low_resolution = require_enlarging(model, pictures)
    assert isinstance(model, DiffusionModel)
    require_small(model.config, config)
    require_effect(model.classes, model.config.text, config, ANYTHING)
    scale, batch = model.header.size // low_resolution, config.compute_batch
    device = resolve_device(config.device)
    model = model.on(device)
    tiles = make_tiles(pictures.shape[2], pictures.shape[3], low_resolution, scale).on(device)
    together = max(1, batch // len(tiles.places))
    groups = [range(start, start + together) for start in range(0, len(pictures), together)]
    alone = len(groups) == 1

    with repeatable(device), lanes(None if device.type == "cpu" else 1) as pool:

        def draw(members: range) -> Tensor:
            # Beyond the last picture comes the last once more, so that there are always as many.
            small = pictures[torch.tensor(members).clamp(max=len(pictures) - 1)]
            numbers = range(first + members.start, first + members.stop)
            low, level = (values.to(device) for values in _shown(small, scale, seed, numbers, config))
            # A group alone has its batches side by side. Several are so themselves, and must not wait for more lanes.
            network = tiled(_answer(model, config, device), tiles, low, level, batch, pool.map if alone else map)
            draws = GaussianNoise(seed, "sampling", numbers, tuple(low.shape[1:]))
            callback = _step_by_step(progress, config.steps) if alone else None
            with torch.inference_mode():
                sigmas = levels_of(config, model.schedule)
                denoise = replace(model.denoiser(), network=network, around=low)
                large = reversed_from_noise(denoise, sigmas, lambda: draws().to(device), config, callback)
                return to_uint8(large).cpu()

        drawn = []
        for members, large in zip(groups, (map if alone else pool.map)(draw, groups), strict=True):
            drawn.append(large)
            progress("pictures enlarged", min(members.stop, len(pictures)), len(pictures))
    return torch.cat(drawn)[: len(pictures)]


def _shown(small: Tensor, scale: int, seed: int, members: range, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """What the network is shown of ``small`` pictures number ``members``, and how much noise lies over it, (N,)."""
    low, level = enlarged(small, scale), config.low_resolution_noise or 0.0
    if level:
        low = low + level * GaussianNoise(seed, "sampling/low_resolution", members, tuple(low.shape[1:]))()
    return low, torch.full((len(low),), level)


def _answer(model: DiffusionModel, config: SamplingConfig, device: torch.device) -> Answer:
    def answer(x: Tensor, time: Tensor, low: Tensor, level: Tensor) -> Tensor:
        # Both contexts are of one thread alone: that of the lane which computes.
        with torch.inference_mode(), autocast(config.precision, device):
            out: Tensor = model.network(x, time, low=low, level=level)
        return out

    return answer


def _step_by_step(progress: Progress, steps: int) -> Callback:
    return lambda step, *_: progress("steps of enlarging", step + 1, steps)


def require_enlarging(model: Model, pictures: Tensor) -> int:
    """The model's low resolution; raises UserError if it has none, or none for ``pictures`` (N, C, h, w)."""
    low_resolution = model.config.low_resolution
    if low_resolution is None:
        raise UserError(
            "the model draws pictures and was not trained to enlarge any: train one with model.low_resolution, the "
            f"height and width of small pictures, say {model.header.size // 2}"
        )
    _, channels, height, width = pictures.shape
    if channels != model.header.channels:
        raise UserError(
            f"the picture has {channels} channels and the model enlarges pictures of {model.header.channels}: "
            f"make it {'grey' if model.header.channels == 1 else 'RGB'}"
        )
    if min(height, width) < low_resolution:
        raise UserError(
            f"the picture has {height}×{width} pixels (height × width) and the model was shown {low_resolution}×"
            f"{low_resolution} in training, so it enlarges nothing lower or narrower: give it a larger one"
        )
    return low_resolution
