"""What can be asked of a trained model, one request for every task, and the pictures that answer it.

The command line, the flow and the served model all ask in this way; a model says what it can do, and what it cannot do,
or would pass over, is refused.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from diffusion.config import Config
from diffusion.config_sampling import ANYTHING, Asked, SamplerName, SamplingConfig
from diffusion.data.config import IngestConfig
from diffusion.data.pictures import Refused, StoredPicture, prepare, unscaled
from diffusion.editing import Edit
from diffusion.errors import UserError
from diffusion.families import family_of
from diffusion.model import DiffusionModel, Model
from diffusion.progress import Progress, silent
from diffusion.samplers import levels_of
from diffusion.sampling import (
    interpolate,
    require_between,
    require_drawing,
    require_editing,
    require_read_whole,
    sample,
)
from diffusion.upscaling import require_enlarging, upscale

Task = Literal["sample", "inpaint", "img2img", "interpolate", "upscale"]

SHOWN = frozenset({"label", "prompt", "negative_prompt"})
DRAWN = frozenset({"count", "seed", "sampler", "steps", "guidance"})
TAKES: Mapping[Task, frozenset[str]] = {
    "sample": DRAWN | SHOWN | {"index"},
    "inpaint": DRAWN | SHOWN | {"index", "image", "mask", "strength", "times", "agree"},
    "img2img": DRAWN | SHOWN | {"index", "image", "strength"},
    "interpolate": DRAWN | SHOWN | {"to_seed"},
    "upscale": DRAWN - {"guidance"} | {"index", "image"},
}
"""The fields that mean something to each task."""
NEEDS: Mapping[Task, tuple[str, ...]] = {
    "sample": (),
    "inpaint": ("image", "mask"),
    "img2img": ("image",),
    "interpolate": ("to_seed",),
    "upscale": ("image",),
}
HOLE = torch.tensor(128, dtype=torch.uint8)
"""What is shown where a picture is painted anew."""
LARGEST = 2048
"""Above that in height or width no picture is enlarged."""
MOST_PIXELS = 2**23
"""Of all pictures that are enlarged for one request: all their tiles are in memory together."""
MOST_VALUES = 2**31
"""Of all pictures that are drawn for requests which are answered together, as they are held together."""
LONGEST_WORDS = 10_000
"""Characters of a label or prompt, of which far fewer are read."""
KEPT_BELOW = 32
"""Of a grey mask, whose pixels may stand for several of it, where hardly any of them is painted anew."""
LARGEST_NUMBER = 2**63 - 1
"""Of seeds and pictures, as manifests hold them."""
STRENGTH = 0.6
"""How much ``img2img`` changes unless told: much is new, and the picture is still recognised."""


class Wanted(Config):
    """So many pictures of one kind; what is left out (null) has its default."""

    task: Task = "sample"
    """sample: pictures of nothing in particular, or of what is asked; inpaint: a hole in a picture filled; img2img: a
    picture made anew, more or less like it; interpolate: pictures on the way between those of two seeds; upscale: a
    small picture drawn large, several times if the count says so."""
    count: int = Field(1, ge=1)
    """How many."""
    seed: int = Field(0, ge=0, le=LARGEST_NUMBER)
    """Picture i of a seed is the same picture everywhere."""
    index: int | None = Field(None, ge=0, le=LARGEST_NUMBER)
    """Number of the first picture, the others follow; null: 0."""
    to_seed: int | None = Field(None, ge=0, le=LARGEST_NUMBER)
    """interpolate: where the way leads to, from picture 0 of ``seed`` to picture 0 of this one."""
    label: str | None = Field(None, max_length=LONGEST_WORDS)
    """The class to show, by its name."""
    prompt: str | None = Field(None, max_length=LONGEST_WORDS)
    """What to show, in the words of captions."""
    negative_prompt: str | None = Field(None, max_length=LONGEST_WORDS)
    """What guidance leads away from."""
    strength: float | None = Field(None, allow_inf_nan=False)
    """How much is changed, above 0 and at most 1; null: 0.6 for img2img, where 1 would leave nothing, 1 for inpaint."""
    times: int | None = Field(None, ge=1, le=100)
    """inpaint: how often each stretch of the way is gone, so that what is filled in agrees with what lies around it
    (RePaint); so many times the work. Null: once."""
    agree: bool | None = None
    """inpaint: whether what is filled in is made to fit at each step, by a gradient (ΠGDM); 2.5 times the work, and
    better than as much of ``times``. Null: no."""
    sampler: SamplerName | None = None
    """As sampling.sampler, of which the options then have their defaults; null: as configured."""
    steps: int | None = Field(None, ge=2, le=10_000)
    """As sampling.steps; null: as configured."""
    guidance: float | None = Field(None, ge=0, le=1000)
    """As sampling.guidance; null: as configured, or none if nothing is asked for."""

    @property
    def asked(self) -> Asked:
        """What the pictures are to show."""
        return Asked(
            labels=() if self.label is None else (self.label,),
            prompts=() if self.prompt is None else (self.prompt,),
            negative_prompt=self.negative_prompt,
        )

    @property
    def indices(self) -> range:
        """The numbers of the pictures."""
        first = self.index or 0
        return range(first, first + self.count)

    def sampling(self, configured: SamplingConfig) -> SamplingConfig:
        """How it is drawn; raises UserError if what it sets makes no sense together."""
        if self.guidance == 1:
            # How guidance is done means nothing where there is none.
            configured = configured.unguided()
        if self.sampler is not None and self.sampler != configured.sampler:
            configured = configured.with_sampler(self.sampler)
        chosen = {"steps": self.steps, "guidance": self.guidance}
        return configured.changed({name: value for name, value in chosen.items() if value is not None})


class Request(Wanted):
    """The same with the pictures that it begins with, each as the bytes of a file (PNG, JPEG, WebP …)."""

    image: bytes | None = None
    """inpaint, img2img: its middle, a square, scaled, and laid over black if it is transparent; upscale: as it is."""
    mask: bytes | None = None
    """inpaint: a picture as large as the image, white where it is painted anew, black where it is kept; scaled down, a
    pixel is kept that stands for hardly any white."""


Kind = TypeVar("Kind", bound=Wanted)


def request_of(fields: Mapping[str, Any]) -> Request:
    """A request from a row of a table, where None stands for what is left out.

    Raises UserError for an unknown field, a value that is out of range, one that the task would pass over, and for
    one that it needs and does not get.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    task = given.get("task", "sample")
    if task not in get_args(Task):
        raise UserError(f"there is no task {task!r}: ask for {', '.join(get_args(Task))}")
    known = TAKES[task] | {"task"}
    for name in sorted(given.keys() & Request.model_fields.keys() - known):
        tasks = [other for other in TAKES if name in TAKES[other]]
        raise UserError(f"{name} means nothing to {task}, only to {', '.join(tasks)}: leave it out")
    if missing := [name for name in NEEDS[task] if name not in given]:
        raise UserError(f"{task} needs {' and '.join(missing)}: give {'them' if missing[1:] else 'it'}")
    return _valid(Request, given)


def wanted_of(fields: Mapping[str, Any]) -> Wanted:
    """What is wanted, still without the pictures that it begins with; raises UserError for a value out of range."""
    return _valid(Wanted, fields)


def _valid(kind: type[Kind], fields: Mapping[str, Any]) -> Kind:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UserError(f"there is no {name} to ask for; there is {', '.join(kind.model_fields)}") from error
        raise UserError(f"{name}: {first['msg'].lower()}") from error


def tasks_of(model: Model) -> tuple[Task, ...]:
    """What ``model`` can do."""
    if model.config.low_resolution is not None:
        return ("upscale",)
    edits = family_of(model.config).edits
    return tuple(task for task in get_args(Task) if task != "upscale" and (edits or "image" not in NEEDS[task]))


def answer(
    model: Model, requests: Sequence[Request], sampling: SamplingConfig, progress: Progress = silent
) -> list[Tensor]:
    """The pictures of each request, (count, C, H, W) uint8, drawn as ``sampling`` says where the request does not.

    Samples of one seed that are asked for in several requests are drawn together. Raises UserError, before anything is
    drawn, if ``model`` cannot do a task, was not told of what is asked for, or would pass something over.
    """
    rows = [f"row {number}: " if len(requests) > 1 else "" for number in range(len(requests))]
    asks = [_checked(model, request, sampling, row) for request, row in zip(requests, rows, strict=True)]
    if (values := sum(ask.request.count * ask.values for ask in asks)) > MOST_VALUES:
        raise UserError(
            f"the pictures that are asked for have {values:,} values, and {MOST_VALUES:,} are held at once: ask for "
            "fewer, or have a registered version print them in batches (darkroom sample --model models:/…)"
        )
    answers: dict[int, Tensor] = {}
    together: dict[tuple[int, Asked, str], list[int]] = {}
    for number, ask in enumerate(asks):
        request, config = ask.request, ask.config
        if ask.edit is not None:
            answers[number] = sample(model, request.indices, request.seed, config, progress, request.asked, ask.edit)
        elif ask.small is not None:
            several = ask.small.expand(request.count, -1, -1, -1)
            assert isinstance(model, DiffusionModel)
            answers[number] = upscale(model, several, request.seed, config, progress, request.indices.start)
        elif request.to_seed is not None:
            seeds = request.seed, request.to_seed
            answers[number] = interpolate(model, *seeds, request.count, config, progress, request.asked)
        else:
            together.setdefault((request.seed, request.asked, config.model_dump_json()), []).append(number)
    for (seed, asked, _), numbers in together.items():
        indices = sorted({index for number in numbers for index in requests[number].indices})
        drawn = dict(zip(indices, sample(model, indices, seed, asks[numbers[0]].config, progress, asked), strict=True))
        for number in numbers:
            answers[number] = torch.stack([drawn[index] for index in requests[number].indices])
    return [answers[number] for number in range(len(requests))]


def original(model: Model, request: Request) -> list[Tensor]:
    """The picture that ``request`` begins with, (C, H, W) uint8, as large as what is drawn.

    What is painted anew is grey, and the pixels of a small one are squares.
    """
    if (small := _small_of(model, request)) is not None:
        scale = model.header.size // require_enlarging(model, small[None])
        return [small.repeat_interleave(scale, 1).repeat_interleave(scale, 2)]
    edit = _edit_of(model, request)
    if edit is None:
        return []
    return [edit.picture if edit.kept is None else torch.where(edit.kept, edit.picture, HOLE)]


def sampling_of(model: Model, request: Request, configured: SamplingConfig) -> SamplingConfig:
    """How ``model`` draws for ``request`` in the end; raises UserError if it cannot, or would pass something over."""
    if request.task not in tasks_of(model):
        raise UserError(f"the model was not trained to {request.task}: it can {', '.join(tasks_of(model))}")
    config = request.sampling(configured)
    if request.guidance is None and request.asked == ANYTHING and not model.classes:
        config = config.unguided()
    if request.task != "upscale":
        require_drawing(model, config, request.asked)
    require_read_whole(request.asked)
    if request.to_seed is not None:
        require_between(model, request.seed, request.to_seed, request.count, request.asked)
    if isinstance(model, DiffusionModel):
        levels_of(config, model.schedule)  # says if there is no level between them
    return config


@dataclass(frozen=True)
class _Checked:
    """A request that nothing speaks against."""

    request: Request
    config: SamplingConfig
    edit: Edit | None
    small: Tensor | None
    values: int
    """Of each picture that is drawn: channels × height × width."""


def _checked(model: Model, request: Request, configured: SamplingConfig, where: str) -> _Checked:
    try:
        config = sampling_of(model, request, configured)
        edit, small = _edit_of(model, request), _small_of(model, request)
        values = math.prod(model.shape) if small is None else _enlarged_values(model, small)
        return _Checked(request, config, edit, small, values)
    except UserError as error:
        raise UserError(f"{where}{error}") from error


def _edit_of(model: Model, request: Request) -> Edit | None:
    if request.image is None or request.task == "upscale":
        return None
    image = _prepared(model, request.image, "image")
    picture = _channels_first(image.pixels)
    if request.mask is None:
        edit = Edit(picture, strength=STRENGTH if request.strength is None else request.strength)
        require_editing(model, edit)
        return edit
    mask = _prepared(model, request.mask, "mask", grey=True)
    if mask.source_size != image.source_size:
        theirs, ours = ("×".join(map(str, each.source_size)) for each in (mask, image))
        raise UserError(f"the mask has {theirs} pixels and the image {ours} (width × height): make them equal")
    strength = 1.0 if request.strength is None else request.strength
    kept = torch.from_numpy(mask.pixels < KEPT_BELOW)
    edit = Edit(picture, kept, strength, request.times or 1, agree=bool(request.agree))
    require_editing(model, edit)
    return edit


def _small_of(model: Model, request: Request) -> Tensor | None:
    """The picture to enlarge, (C, h, w) uint8."""
    if request.image is None or request.task != "upscale":
        return None
    mode: Literal["grey", "rgb"] = "grey" if model.header.channels == 1 else "rgb"
    try:
        small = _channels_first(unscaled(request.image, IngestConfig(size=LARGEST // 2, mode=mode, enlarge=True)))
    except Refused as error:
        raise UserError(f"the image cannot be used: {error}") from error
    assert isinstance(model, DiffusionModel)
    if (pixels := request.count * _enlarged_values(model, small) // len(small)) > MOST_PIXELS:
        raise UserError(
            f"{pixels / 1e6:.1f} million pixels in all would be drawn at once, and {MOST_PIXELS / 1e6:.1f} may be: "
            "give a smaller picture, or ask for fewer"
        )
    return small


def _enlarged_values(model: Model, small: Tensor) -> int:
    scale = model.header.size // require_enlarging(model, small[None])
    return small.numel() * scale**2


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.copy()).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)


def _prepared(model: Model, payload: bytes, name: str, grey: bool = False) -> StoredPicture:
    channels, size, _ = model.shape
    mode: Literal["grey", "rgb"] = "grey" if grey or channels == 1 else "rgb"
    try:
        return prepare(payload, IngestConfig(size=size, mode=mode, enlarge=True))
    except Refused as error:
        raise UserError(f"the {name} cannot be used: {error}") from error
