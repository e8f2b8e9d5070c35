"""What generated images are to show, and the requests for them: one pydantic model for each task.

The command line, the flow and the served model all take these. An option that has no effect for a task is no field of
its request. This module loads without torch.
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
"""Characters of a label or prompt, of which far fewer are read."""
MAX_INTEGER = 2**63 - 1
"""Of seeds and indices, as manifests hold them."""
MAX_FILE_BYTES = 64 * 2**20
"""Size of an image file to begin with."""


class Conditions(Config):
    """Labels and prompts: image i shows the i-th label and the i-th prompt, from the front again after the last."""

    labels: tuple[str | None, ...] = ()
    """Names of classes, null: any. None at all: each as often as the data set has it, or with prompts any."""
    prompts: tuple[str | None, ...] = ()
    """In the words of captions, null: unconditional. None at all: unconditional."""
    negative_prompt: str | None = None
    """Prompt that guidance leads away from, instead of from the unconditional prediction."""

    def label(self, index: int) -> str | None:
        """The label of image number ``index``."""
        return self.labels[index % len(self.labels)] if self.labels else None

    def prompt(self, index: int) -> str | None:
        """The prompt of image number ``index``."""
        return self.prompts[index % len(self.prompts)] if self.prompts else None

    @property
    def texts(self) -> list[str]:
        """All prompts, the negative one included."""
        return [text for text in (*self.prompts, self.negative_prompt) if text is not None]


UNCONDITIONAL = Conditions()


class BaseRequest(Config):
    """Fields that requests of all tasks have; what is left out has its default."""

    count: int = Field(1, ge=1)
    """Number of images."""
    seed: int = Field(0, ge=0, le=MAX_INTEGER)
    """Image i of a seed is the same image everywhere."""
    sampler: str | None = None
    """As sampling.sampler, whose own options then have their defaults; null: as configured."""
    steps: int | None = Field(None, ge=2, le=10_000)
    """As sampling.steps; null: as configured."""

    @property
    def conditions(self) -> Conditions:
        """What the images are to show."""
        return UNCONDITIONAL

    @property
    def indices(self) -> range:
        """The numbers of the images."""
        first = getattr(self, "index", 0)
        return range(first, first + self.count)

    def sampling(self, configured: SamplingConfig) -> SamplingConfig:
        """How the images are sampled; raises UserError if what the request sets makes no sense together."""
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
    """Fields of tasks whose images may be told what to show."""

    label: str | None = Field(None, max_length=MAX_TEXT_LENGTH)
    """Class to show, by its name."""
    prompt: str | None = Field(None, max_length=MAX_TEXT_LENGTH)
    """What to show, in the words of captions."""
    negative_prompt: str | None = Field(None, max_length=MAX_TEXT_LENGTH)
    """What guidance leads away from."""
    guidance: float | None = Field(None, ge=0, le=1000)
    """As sampling.guidance; null: as configured, or none if there is no label or prompt."""

    @property
    def conditions(self) -> Conditions:
        """What the images are to show."""
        return Conditions(
            labels=() if self.label is None else (self.label,),
            prompts=() if self.prompt is None else (self.prompt,),
            negative_prompt=self.negative_prompt,
        )


class IndexedRequest(BaseRequest):
    """Fields of tasks whose images are numbered from where the request says."""

    index: int = Field(0, ge=0, le=MAX_INTEGER)
    """Number of the first image; the others follow."""


class EditRequest(ConditionalRequest, IndexedRequest):
    """Fields of tasks that change an image."""

    image: bytes
    """File (PNG, JPEG, WebP …): its middle, a square, scaled, and laid over black if it is transparent."""


class SampleRequest(ConditionalRequest, IndexedRequest):
    """Images from noise."""

    task: Literal["sample"] = "sample"


class InpaintRequest(EditRequest):
    """A hole in an image filled, with a step's estimate replaced where the image is known (the fast method)."""

    task: Literal["inpaint"] = "inpaint"
    mask: bytes
    """File of an image as large as ``image``, white where it is filled, black where it is kept; scaled down, a pixel is
    kept that stands for hardly any white."""
    strength: float = Field(1.0, allow_inf_nan=False)
    """How much is changed, above 0 and at most 1."""
    method: Literal["replace"] = "replace"
    """Replace the known part of the image at each step."""


class RepaintRequest(InpaintRequest):
    """A hole in an image filled with resampling (RePaint), so that it fits what lies around it."""

    method: Literal["repaint"] = "repaint"  # type: ignore[assignment]
    """Repeat stretches of steps."""
    resample_steps: int = Field(5, ge=2, le=100)
    """How often each stretch of steps is repeated; so many times the work."""


class PiGDMRequest(InpaintRequest):
    """A hole in an image filled with each step guided by a gradient (ΠGDM), for 2.5 times the work."""

    method: Literal["pigdm"] = "pigdm"  # type: ignore[assignment]
    """Guide each step by a gradient."""
    resample_steps: int = Field(1, ge=1, le=100)
    """How often each stretch of steps is repeated besides, as in RePaint."""


class Img2ImgRequest(EditRequest):
    """An image made anew, more or less like it (SDEdit)."""

    task: Literal["img2img"] = "img2img"
    strength: float = Field(0.6, allow_inf_nan=False)
    """How much is changed, above 0 and below 1: at 0.6 much is new, and the image is still recognised."""


class InterpolateRequest(ConditionalRequest):
    """Images between those of two seeds."""

    task: Literal["interpolate"] = "interpolate"
    to_seed: int = Field(ge=0, le=MAX_INTEGER)
    """Seed of the last image: the path goes from image 0 of ``seed`` to image 0 of this one."""


class UpscaleRequest(IndexedRequest):
    """A small image made large, several times if the count says so."""

    task: Literal["upscale"] = "upscale"
    image: bytes
    """File (PNG, JPEG, WebP …), used as it is."""


def _task_and_method(given: Any) -> str:
    """The tag of a request: its task, or for inpainting the method that has options of its own."""
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
"""The request of each task, for inpainting the one with the most fields."""


def make_request(fields: Mapping[str, Any]) -> GenerationRequest:
    """The request with these ``fields``, as from a row of a table, where None stands for what is left out.

    Raises UserError for an unknown field, a value out of range, one that has no effect for the task, and for one that
    the task needs and does not get.
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
    """``make_request`` with the images in those files; raises UserError also for a file that cannot be read."""
    files = {name: _read(path, name) for name, path in (("image", image), ("mask", mask)) if path is not None}
    return make_request({**fields, **files})


def _read(path: Path, name: str) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"the {name} {path} has over {MAX_FILE_BYTES} bytes: give a smaller one")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"the {name} {path} cannot be read ({error.strerror}): give the path of an image") from error
