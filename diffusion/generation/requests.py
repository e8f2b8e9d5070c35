"""Generation of images for requests from the command line, the flow and the served model.

Tasks that a model cannot do, and options without effect, are errors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffusion.common.errors import UserError
from diffusion.common.progress import Progress, silent
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.decode import Refused, StoredImage, prepare, unscaled
from diffusion.families import family_of
from diffusion.families.model import DiffusionModel, Model
from diffusion.generation.config import (
    UNCONDITIONAL,
    Conditions,
    GenerationRequest,
    Img2ImgRequest,
    InpaintRequest,
    InterpolateRequest,
    PiGDMRequest,
    RepaintRequest,
    SampleRequest,
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
from diffusion.generation.super_resolution import SuperResolution, task_of, upscale
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
    if isinstance(task_of(model.config), SuperResolution):
        return ("upscale",)
    return (
        ("sample", "inpaint", "img2img", "interpolate") if family_of(model.config).edits else ("sample", "interpolate")
    )


def answer(
    model: Model, requests: Sequence[GenerationRequest], sampling: SamplingConfig, progress: Progress = silent
) -> list[Tensor]:
    """Generate the images of each request, (count, C, H, W) uint8, with ``sampling`` where the request sets nothing.

    Samples of one seed in several requests are generated together. Raises UserError, before anything is generated, if
    ``model`` cannot do a task, was not trained with a label or prompt, or an option would have no effect.
    """
    rows = [f"row {number}: " if len(requests) > 1 else "" for number in range(len(requests))]
    checked = [_checked(model, request, sampling, row) for request, row in zip(requests, rows, strict=True)]
    if (values := sum(each.request.count * each.values for each in checked)) > MAX_VALUES:
        raise UserError(
            f"the requested images have {values:,} values, and {MAX_VALUES:,} are held at once: ask for fewer, or have "
            "a registered version generate them in batches (darkroom sample --model models:/…)"
        )
    answers: dict[int, Tensor] = {}
    together: dict[tuple[int, Conditions, str], list[int]] = {}
    for number, each in enumerate(checked):
        request, config = each.request, each.config
        match request:
            case SampleRequest():
                together.setdefault((request.seed, request.conditions, config.model_dump_json()), []).append(number)
            case InterpolateRequest():
                ends = request.seed, request.to_seed
                answers[number] = interpolate(model, *ends, request.count, config, progress, request.conditions)
            case UpscaleRequest():
                assert each.small is not None
                several = each.small.expand(request.count, -1, -1, -1)
                answers[number] = upscale(model, several, request.seed, config, progress, request.index)
            case _:
                answers[number] = sample(
                    model, request.indices, request.seed, config, progress, request.conditions, each.edit
                )
    for (seed, conditions, _), numbers in together.items():
        indices = sorted({index for number in numbers for index in requests[number].indices})
        images = sample(model, indices, seed, checked[numbers[0]].config, progress, conditions)
        generated = dict(zip(indices, images, strict=True))
        for number in numbers:
            answers[number] = torch.stack([generated[index] for index in requests[number].indices])
    return [answers[number] for number in range(len(requests))]


def original(model: Model, request: GenerationRequest) -> list[Tensor]:
    """Show the input image of ``request`` at the size of the generated ones, (C, H, W) uint8; [] if there is none.

    Holes are grey; small images are enlarged by repeating pixels.
    """
    match request:
        case UpscaleRequest():
            small = _small_image(model, request)
            scale = _scale(model, small)
            return [small.repeat_interleave(scale, 1).repeat_interleave(scale, 2)]
        case InpaintRequest() | Img2ImgRequest():
            edit = _edit_of(model, request)
            return [edit.image if edit.kept is None else torch.where(edit.kept, edit.image, HOLE)]
    return []


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


@dataclass(frozen=True)
class _Checked:
    """A validated request with its decoded images."""

    request: GenerationRequest
    config: SamplingConfig
    edit: Edit | None
    small: Tensor | None
    values: int
    """Channels × height × width of each image."""


def _checked(model: Model, request: GenerationRequest, configured: SamplingConfig, where: str) -> _Checked:
    try:
        config = sampling_of(model, request, configured)
        edit = _edit_of(model, request) if isinstance(request, InpaintRequest | Img2ImgRequest) else None
        small = _small_image(model, request) if isinstance(request, UpscaleRequest) else None
        values = math.prod(model.shape) if small is None else small.numel() * _scale(model, small) ** 2
        return _Checked(request, config, edit, small, values)
    except UserError as error:
        raise UserError(f"{where}{error}") from error


def _edit_of(model: Model, request: InpaintRequest | Img2ImgRequest) -> Edit:
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
        resample_steps = request.resample_steps if isinstance(request, RepaintRequest | PiGDMRequest) else 1
        edit = Edit(image, kept, request.strength, resample_steps, guided=isinstance(request, PiGDMRequest))
    check_edit(model, edit)
    return edit


def _small_image(model: Model, request: UpscaleRequest) -> Tensor:
    """Decode the image to upscale, (C, h, w) uint8."""
    mode: Literal["grey", "rgb"] = "grey" if model.header.channels == 1 else "rgb"
    try:
        small = _channels_first(unscaled(request.image, IngestConfig(size=MAX_SIZE // 2, mode=mode, enlarge=True)))
    except Refused as error:
        raise UserError(f"the image cannot be used: {error}") from error
    pixels = request.count * small[0].numel() * _scale(model, small) ** 2
    if pixels > MAX_PIXELS:
        raise UserError(
            f"{pixels / 1e6:.1f} million pixels in all would be generated at once, and {MAX_PIXELS / 1e6:.1f} may be: "
            "give a smaller image, or ask for fewer"
        )
    return small


def _scale(model: Model, small: Tensor) -> int:
    task = task_of(model.config)
    assert isinstance(task, SuperResolution)
    task.check_images(model, small[None])
    return model.header.size // task.low_resolution


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.copy()).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)


def _prepared(model: Model, payload: bytes, name: str, grey: bool = False) -> StoredImage:
    channels, size, _ = model.shape
    mode: Literal["grey", "rgb"] = "grey" if grey or channels == 1 else "rgb"
    try:
        return prepare(payload, IngestConfig(size=size, mode=mode, enlarge=True))
    except Refused as error:
        raise UserError(f"the {name} cannot be used: {error}") from error
