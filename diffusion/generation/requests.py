"""Generation of images for requests from the command line, the flow and the served model."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffusion.common.errors import UserError
from diffusion.common.image_grids import blocks
from diffusion.common.progress import Progress, silent
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.decode import Refused, StoredImage, prepare, unscaled
from diffusion.families.ddpm import DiffusionModel
from diffusion.families.model import Model
from diffusion.generation.config import (
    UNCONDITIONAL,
    Conditions,
    GenerationRequest,
    Img2ImgRequest,
    InpaintRequest,
    InterpolateRequest,
    Task,
    UpscaleRequest,
)
from diffusion.generation.generate import (
    check_edit,
    check_interpolation,
    check_prompts,
    check_sampling,
    interpolate,
    sample,
)
from diffusion.generation.super_resolution import check_images, scale_of, task_of, upscale
from diffusion.process.editing import Edit
from diffusion.process.samplers import SamplingConfig

HOLE = torch.tensor(128, dtype=torch.uint8)
"""Grey value that shows the hole of an image to inpaint."""
MAX_SIZE = 2048
"""Largest height or width of an upscaled image, in pixels."""
MAX_PIXELS = 2**23
"""Most pixels of all upscaled images of a request, whose tiles are all in memory at once."""
MAX_VALUES = 2**31
"""Most values of all images that are generated in one call, which are all in memory at once."""
KEPT_BELOW = 32
"""Grey value of a scaled mask below which a pixel is kept."""


def tasks_of(model: Model) -> tuple[Task, ...]:
    """List the tasks that ``model`` can do."""
    if task_of(model.config).low_resolution is not None:
        return ("upscale",)
    edits: tuple[Task, ...] = ("inpaint", "img2img") if isinstance(model, DiffusionModel) else ()
    return ("sample", *edits, "interpolate")


def answer(
    model: Model, requests: Sequence[GenerationRequest], sampling: SamplingConfig, progress: Progress = silent
) -> list[Tensor]:
    """Generate the images of each request, (count, C, H, W) uint8, with ``sampling`` where the request sets nothing.

    Samples of one seed in several requests are generated together. Raises UserError, before anything is generated, if
    ``model`` cannot do a task, was not trained with a label or prompt, or an option would have no effect.
    """
    configs: list[SamplingConfig] = []
    inputs: list[Edit | Tensor | None] = []
    values = 0
    for number, request in enumerate(requests):
        try:
            configs.append(sampling_of(model, request, sampling))
            inputs.append(_input_of(model, request))
        except UserError as error:
            raise UserError(f"row {number}: {error}" if len(requests) > 1 else str(error)) from error
        small = inputs[-1]
        size = small.numel() * scale_of(model) ** 2 if isinstance(small, Tensor) else math.prod(model.shape)
        values += request.count * size
    if values > MAX_VALUES:
        raise UserError(
            f"the requested images have {values:,} values, and {MAX_VALUES:,} are held at once: ask for fewer, or have "
            "a registered version generate them in batches (darkroom sample --model models:/…)"
        )
    answers: dict[int, Tensor] = {}
    together: dict[tuple[int, Conditions, str], list[int]] = {}
    for number, (request, config, given) in enumerate(zip(requests, configs, inputs, strict=True)):
        seed, conditions = request.seed, request.conditions
        if isinstance(given, Edit):
            answers[number] = sample(model, request.indices, seed, config, progress, conditions, given)
        elif given is not None:
            several = given.expand(request.count, -1, -1, -1)
            answers[number] = upscale(model, several, seed, config, progress, request.indices.start)
        elif isinstance(request, InterpolateRequest):
            answers[number] = interpolate(model, seed, request.to_seed, request.count, config, progress, conditions)
        else:
            together.setdefault((seed, conditions, config.model_dump_json()), []).append(number)
    for (seed, conditions, _), numbers in together.items():
        indices = sorted({index for number in numbers for index in requests[number].indices})
        images = sample(model, indices, seed, configs[numbers[0]], progress, conditions)
        generated = dict(zip(indices, images, strict=True))
        for number in numbers:
            answers[number] = torch.stack([generated[index] for index in requests[number].indices])
    return [answers[number] for number in range(len(requests))]


def original(model: Model, request: GenerationRequest) -> list[Tensor]:
    """Show the input image of ``request``, if any, at the size of generated ones, (C, H, W) uint8, with grey holes."""
    given = _input_of(model, request)
    if isinstance(given, Edit):
        return [given.image if given.kept is None else torch.where(given.kept, given.image, HOLE)]
    return [] if given is None else [blocks(given[None], given.shape[-1] * scale_of(model))[0]]


def sampling_of(model: Model, request: GenerationRequest, configured: SamplingConfig) -> SamplingConfig:
    """Resolve the sampling options of ``request``; raises UserError if ``model`` does not support them."""
    if request.task not in tasks_of(model):
        raise UserError(f"the model was not trained to {request.task}: it can {', '.join(tasks_of(model))}")
    config = request.sampling(configured)
    if getattr(request, "guidance", None) is None and request.conditions == UNCONDITIONAL and not model.classes:
        config = config.unguided()
    check_sampling(model, config, request.conditions)
    check_prompts(request.conditions)
    if isinstance(request, InterpolateRequest):
        check_interpolation(model, request.seed, request.to_seed, request.count, request.conditions)
    if isinstance(model, DiffusionModel):
        config.sigma_grid(model.schedule)  # raises if there is no level between the ends
    return config


def _input_of(model: Model, request: GenerationRequest) -> Edit | Tensor | None:
    """Decode the images of ``request``: an edit, or the image to upscale, (C, h, w) uint8."""
    if isinstance(request, UpscaleRequest):
        return _small_image(model, request)
    if not isinstance(request, InpaintRequest | Img2ImgRequest):
        return None
    prepared = _prepared(model, request.image, "image")
    image = _channels_first(prepared.pixels)
    if isinstance(request, Img2ImgRequest):
        edit = Edit(image, strength=request.strength)
    else:
        mask = _prepared(model, request.mask, "mask", grey=True)
        if mask.source_size != prepared.source_size:
            theirs, ours = ("×".join(map(str, each.source_size)) for each in (mask, prepared))
            raise UserError(f"the mask has {theirs} pixels and the image {ours} (width × height): make them equal")
        kept = torch.from_numpy(mask.pixels < KEPT_BELOW)
        edit = Edit(image, kept, request.strength, request.resample_steps or 1, guided=request.method == "pigdm")
    check_edit(model, edit)
    return edit


def _small_image(model: Model, request: UpscaleRequest) -> Tensor:
    mode: Literal["grey", "rgb"] = "grey" if model.header.channels == 1 else "rgb"
    try:
        small = _channels_first(unscaled(request.image, IngestConfig(size=MAX_SIZE // 2, mode=mode, enlarge=True)))
    except Refused as error:
        raise UserError(f"the image cannot be used: {error}") from error
    check_images(model, small[None])
    pixels = request.count * small[0].numel() * scale_of(model) ** 2
    if pixels > MAX_PIXELS:
        raise UserError(
            f"{pixels / 1e6:.1f} million pixels in all would be generated at once, and {MAX_PIXELS / 1e6:.1f} may be: "
            "give a smaller image, or ask for fewer"
        )
    return small


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.copy()).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)


def _prepared(model: Model, payload: bytes, name: str, grey: bool = False) -> StoredImage:
    channels, size, _ = model.shape
    mode: Literal["grey", "rgb"] = "grey" if grey or channels == 1 else "rgb"
    try:
        return prepare(payload, IngestConfig(size=size, mode=mode, enlarge=True))
    except Refused as error:
        raise UserError(f"the {name} cannot be used: {error}") from error
