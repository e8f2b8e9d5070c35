"""Conditions and generation requests, one pydantic model per task.

The command line, the flow and the served model share them. A request has only the options with an effect for its task.
This module loads without torch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Discriminator, Field, Tag, TypeAdapter, ValidationError

from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.process.samplers import SAMPLERS, SamplingConfig

Task = Literal["sample", "inpaint", "img2img", "interpolate", "upscale"]
MAX_TEXT_LENGTH = 10_000
"""Most characters of a label or prompt; the encoder uses far fewer."""
MAX_INTEGER = 2**63 - 1
"""Largest seed or index that manifests can store."""
MAX_FILE_BYTES = 64 * 2**20
"""Largest size of an input image file, in bytes."""


class Conditions(Config):
    """Labels and prompts: image i has the i-th label and the i-th prompt, in a cycle."""

    labels: tuple[str | None, ...] = ()
    """Class names; null: unconditional. Empty: classes with their frequency in the data set, or unconditional if there
    are prompts."""
    prompts: tuple[str | None, ...] = ()
    """Prompts in the words of captions; null or empty: unconditional."""
    negative_prompt: str | None = None
    """Prompt that guidance leads away from, instead of from the unconditional prediction."""

    def label(self, index: int) -> str | None:
        """Return the label of the image ``index``."""
        return self.labels[index % len(self.labels)] if self.labels else None

    def prompt(self, index: int) -> str | None:
        """Return the prompt of the image ``index``."""
        return self.prompts[index % len(self.prompts)] if self.prompts else None

    @property
    def texts(self) -> list[str]:
        """All prompts, the negative one included."""
        return [text for text in (*self.prompts, self.negative_prompt) if text is not None]


UNCONDITIONAL = Conditions()


class BaseRequest(Config):
    """Fields of the requests of all tasks."""

    count: int = Field(1, ge=1)
    """Number of images."""
    seed: int = Field(0, ge=0, le=MAX_INTEGER)
    """Image i of a seed is the same image everywhere."""
    sampler: str | None = None
    """As sampling.sampler, with the defaults of its options; null: as configured."""
    steps: int | None = Field(None, ge=2, le=10_000)
    """As sampling.steps; null: as configured."""

    @property
    def conditions(self) -> Conditions:
        """Labels and prompts of the images."""
        return UNCONDITIONAL

    @property
    def indices(self) -> range:
        """Indices of the images."""
        first = getattr(self, "index", 0)
        return range(first, first + self.count)

    def sampling(self, configured: SamplingConfig) -> SamplingConfig:
        """Apply the request's options to ``configured``; raises UserError if they contradict each other."""
        guidance = getattr(self, "guidance", None)
        if guidance == 1:
            # Its other options have no effect without guidance.
            configured = configured.unguided()
        if self.sampler is not None and self.sampler != configured.sampler:
            names = [each.model_fields["sampler"].default for each in SAMPLERS]
            if self.sampler not in names:
                raise UserError(f"there is no sampler {self.sampler!r}: use {', '.join(names)}")
            configured = configured.with_sampler(self.sampler)
        chosen = {"steps": self.steps, "guidance": guidance}
        return configured.changed({name: value for name, value in chosen.items() if value is not None})


class ConditionalRequest(BaseRequest):
    """Fields of tasks with labels and prompts."""

    label: str | None = Field(None, max_length=MAX_TEXT_LENGTH)
    """Name of the class."""
    prompt: str | None = Field(None, max_length=MAX_TEXT_LENGTH)
    """Prompt in the words of captions."""
    negative_prompt: str | None = Field(None, max_length=MAX_TEXT_LENGTH)
    """Prompt that guidance leads away from."""
    guidance: float | None = Field(None, ge=0, le=1000)
    """As sampling.guidance; null: as configured, or none if there is no label or prompt."""

    @property
    def conditions(self) -> Conditions:
        """Labels and prompts of the images."""
        return Conditions(
            labels=() if self.label is None else (self.label,),
            prompts=() if self.prompt is None else (self.prompt,),
            negative_prompt=self.negative_prompt,
        )


class IndexedRequest(BaseRequest):
    """Fields of tasks whose images start at an index."""

    index: int = Field(0, ge=0, le=MAX_INTEGER)
    """Index of the first image; the others follow."""


class EditRequest(ConditionalRequest, IndexedRequest):
    """Fields of tasks that edit an image."""

    image: bytes
    """Image file (PNG, JPEG, WebP …), center-cropped to a square and scaled; transparency becomes black."""


class SampleRequest(ConditionalRequest, IndexedRequest):
    """Images from noise."""

    task: Literal["sample"] = "sample"


class InpaintRequest(EditRequest):
    """Inpainting by replacing the known part of the estimate in each step (the fast method)."""

    task: Literal["inpaint"] = "inpaint"
    mask: bytes
    """Image file as large as ``image``, white where it is filled, black where it is kept; after scaling, a pixel is
    kept if it is nearly black."""
    strength: float = Field(1.0, allow_inf_nan=False)
    """Strength of the change, above 0 and at most 1."""
    method: Literal["replace"] = "replace"
    """Replace the known part of the image in each step."""


class RepaintRequest(InpaintRequest):
    """Inpainting with resampling (RePaint), which fits the hole better to its surroundings."""

    method: Literal["repaint"] = "repaint"  # type: ignore[assignment]
    """Resample: repeat stretches of steps."""
    resample_steps: int = Field(5, ge=2, le=100)
    """How often each stretch of steps is run, which multiplies the work."""


class PiGDMRequest(InpaintRequest):
    """Inpainting guided by a gradient in each step (ΠGDM), for 2.5 times the work."""

    method: Literal["pigdm"] = "pigdm"  # type: ignore[assignment]
    """Guide each step by a gradient."""
    resample_steps: int = Field(1, ge=1, le=100)
    """How often each stretch of steps is run, as in RePaint."""


class Img2ImgRequest(EditRequest):
    """Image-to-image generation (SDEdit): a variation of an image."""

    task: Literal["img2img"] = "img2img"
    strength: float = Field(0.6, allow_inf_nan=False)
    """Strength of the change, above 0 and below 1; at 0.6 the image is still recognisable."""


class InterpolateRequest(ConditionalRequest):
    """Interpolation between the images of two seeds."""

    task: Literal["interpolate"] = "interpolate"
    to_seed: int = Field(ge=0, le=MAX_INTEGER)
    """Seed of the last image: the path goes from image 0 of ``seed`` to image 0 of this one."""


class UpscaleRequest(IndexedRequest):
    """Super-resolution of a small image, in ``count`` versions."""

    task: Literal["upscale"] = "upscale"
    image: bytes
    """Image file (PNG, JPEG, WebP …), used without scaling."""


def _task_and_method(given: Any) -> str:
    """Return the tag of a request: its task, or the method of inpainting if it has its own options."""
    if isinstance(given, BaseModel):
        given = {name: getattr(given, name, None) for name in ("task", "method")}
    task = given.get("task", "sample")
    method = given.get("method")
    return str(method) if task == "inpaint" and method in ("repaint", "pigdm") else str(task)


GenerationRequest: TypeAlias = Annotated[
    Annotated[SampleRequest, Tag("sample")]
    | Annotated[InpaintRequest, Tag("inpaint")]
    | Annotated[RepaintRequest, Tag("repaint")]
    | Annotated[PiGDMRequest, Tag("pigdm")]
    | Annotated[Img2ImgRequest, Tag("img2img")]
    | Annotated[InterpolateRequest, Tag("interpolate")]
    | Annotated[UpscaleRequest, Tag("upscale")],
    Discriminator(_task_and_method),
]
REQUEST_ADAPTER: TypeAdapter[GenerationRequest] = TypeAdapter(GenerationRequest)
REQUESTS: Mapping[Task, type[BaseRequest]] = {
    "sample": SampleRequest,
    "inpaint": RepaintRequest,
    "img2img": Img2ImgRequest,
    "interpolate": InterpolateRequest,
    "upscale": UpscaleRequest,
}
"""Request class of each task; for inpainting the one with the most fields."""


def make_request(fields: Mapping[str, Any]) -> GenerationRequest:
    """Make the request with these ``fields``, as from a row of a table; None means left out.

    Raises UserError for an unknown, missing or ineffective field, or a value out of range.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    task = given.get("task", "sample")
    if task not in REQUESTS:
        raise UserError(f"there is no task {task!r}: use {', '.join(REQUESTS)}")
    try:
        return REQUEST_ADAPTER.validate_python(given)
    except ValidationError as error:
        raise UserError(_describe_error(task, error)) from error


def _describe_error(task: Task, error: ValidationError) -> str:
    errors = error.errors(include_input=False)
    for each in errors:
        name = str(each["loc"][-1])
        if each["type"] != "extra_forbidden":
            continue
        if name == "resample_steps" and task == "inpaint":
            return "resample_steps means nothing to this method of inpainting: use repaint or pigdm, or leave it out"
        tasks = [other for other, request in REQUESTS.items() if name in request.model_fields]
        if tasks:
            return f"{name} means nothing to {task}, only to {', '.join(tasks)}: leave it out"
        return f"there is no {name} to ask for; there is {', '.join(REQUESTS[task].model_fields)}"
    if missing := [str(each["loc"][-1]) for each in errors if each["type"] == "missing"]:
        return f"{task} needs {' and '.join(missing)}: give {'them' if missing[1:] else 'it'}"
    name = ".".join(str(part) for part in errors[0]["loc"][1:])
    if name == "method":
        return "method is replace, repaint or pigdm"
    return f"{name}: {errors[0]['msg'].lower()}"


def read_request(fields: Mapping[str, Any], image: Path | None = None, mask: Path | None = None) -> GenerationRequest:
    """Make a request with image files; raises UserError as ``make_request`` does, and for unreadable files."""
    files = {name: _read(path, name) for name, path in (("image", image), ("mask", mask)) if path is not None}
    return make_request({**fields, **files})


def _read(path: Path, name: str) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"the {name} {path} has over {MAX_FILE_BYTES} bytes: give a smaller one")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"the {name} {path} cannot be read ({error.strerror}): give the path of an image") from error
