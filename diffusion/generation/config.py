"""Conditions, limits and generation requests, one pydantic model per task with its own options; without torch."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from diffusion.common.config import Config
from diffusion.common.errors import UserError, describe_validation_error
from diffusion.common.shapes import Shape, Size
from diffusion.process.samplers import SAMPLERS, SamplingConfig, with_sampler

Task = Literal["sample", "inpaint", "img2img", "interpolate", "upscale"]
MAX_TEXT_LENGTH = 10_000
"""Most characters of a label or prompt; the encoder uses far fewer."""
MAX_TEXTS = 1024
"""Most labels or prompts of a request."""
MAX_INTEGER = 2**63 - 1
"""Largest seed or index that manifests can store."""
MAX_FILE_BYTES = 64 * 2**20
"""Largest size of an input image file, in bytes."""


class GenerationLimits(Config):
    """Limits of a served model and of the studio."""

    max_request_megapixels: float = Field(250, gt=0)
    """Most work of a request to a served model or the studio: images × network evaluations × pixels, in millions. 64
    images of 64×64 in 16 steps take 4.2, with guidance 8.4; one image as much as a whole `sampling.compute_batch`."""
    max_request_seconds: float = Field(120, gt=0, le=86_400)
    """Deadline of such a request, its waiting included, in seconds."""
    max_waiting_requests: int = Field(8, ge=0, le=1000)
    """Most requests to a served model that wait while one is computed; more are refused with status 429."""

    @classmethod
    def from_environment(cls) -> "GenerationLimits":
        """Read the variables ``DARKROOM_*``; raises UserError that names an invalid one."""
        variables = {name: os.environ.get(f"DARKROOM_{name.upper()}") for name in GenerationLimits.model_fields}
        try:
            return GenerationLimits.model_validate({name: text for name, text in variables.items() if text is not None})
        except ValidationError as error:
            detail = error.errors()[0]
            raise UserError(describe_validation_error(detail, f"DARKROOM_{detail['loc'][0]}".upper())) from error


class Conditions(Config):
    """Labels, prompts and sizes: image i has the i-th label and the i-th prompt, in a cycle."""

    labels: tuple[str | None, ...] = ()
    """Class names; null: unconditional. Empty: classes with their frequency in the data set, or unconditional if there
    are prompts."""
    prompts: tuple[str | None, ...] = ()
    """Prompts in the words of captions; null or empty: unconditional."""
    negative_prompt: str | None = None
    """Prompt that guidance leads away from, instead of from the unconditional prediction."""
    sizes: tuple[Size | None, ...] = Field((), exclude_if=lambda sizes: not sizes)
    """Sizes of the images as WIDTHxHEIGHT: image i has the i-th, in a cycle; null, and for all if empty: the most
    frequent shape of the model's training images."""

    def label(self, index: int) -> str | None:
        """Return the label of the image ``index``."""
        return self.labels[index % len(self.labels)] if self.labels else None

    def prompt(self, index: int) -> str | None:
        """Return the prompt of the image ``index``."""
        return self.prompts[index % len(self.prompts)] if self.prompts else None

    def size(self, index: int) -> Shape | None:
        """Return (H, W) of the image ``index``; None: the model's own."""
        return self.sizes[index % len(self.sizes)] if self.sizes else None

    @property
    def texts(self) -> list[str]:
        """All prompts, the negative one included."""
        return [text for text in (*self.prompts, self.negative_prompt) if text is not None]


UNCONDITIONAL = Conditions()


def is_conditional(classes: Sequence[str], conditions: Conditions) -> bool:
    """Whether a model of ``classes`` is conditioned on a label or prompt, as guidance needs."""
    is_set = any(value is not None for value in (*conditions.labels, *conditions.prompts, conditions.negative_prompt))
    return is_set or bool(classes and not conditions.prompts and not conditions.labels)


def check_conditions(classes: Sequence[str], text: bool, config: SamplingConfig, conditions: Conditions) -> None:
    """Raise UserError for ``conditions`` without effect on a model of ``classes``, and of captions if ``text``."""
    labels = [label for label in conditions.labels if label is not None]
    if labels and not classes:
        raise UserError("the model was trained without classes (model.conditional): leave labels out")
    if unknown_labels := sorted(set(labels) - set(classes)):
        raise UserError(f"the model knows no class {unknown_labels[0]!r}: use one of {', '.join(classes)}")
    if conditions.texts and not text:
        raise UserError("the model was trained without captions: leave prompts out, or train one with model.text=true")
    if conditions.negative_prompt is not None and not config.guides:
        raise UserError("a negative prompt is what sampling.guidance leads away from, not autoguidance: set it to 3")
    if config.guides and not is_conditional(classes, conditions):
        raise UserError(
            f"sampling.guidance = {config.guidance:g} leads towards a label or prompt, and there is none: "
            + ("give a prompt, or " if text else "the model was trained without classes and captions, ")
            + "leave it out (null)"
        )


Text = Annotated[str, Field(max_length=MAX_TEXT_LENGTH)]
OneOrMore = Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]


class GenerationRequest(Config):
    """Fields of the requests of all tasks."""

    count: int = Field(1, ge=1)
    """Number of images."""
    seed: int = Field(0, ge=0, le=MAX_INTEGER)
    """Image i of a seed is the same image everywhere."""
    sampler: str | None = Field(None, max_length=100)
    """As sampling.sampler, with the defaults of its options; null: as configured."""
    steps: int | None = Field(None, ge=1, le=10_000)
    """As sampling.steps; null: as configured."""
    task: Task

    @property
    def conditions(self) -> Conditions:
        """Labels, prompts and sizes of the images."""
        return UNCONDITIONAL

    @property
    def indices(self) -> range:
        """Indices of the images."""
        start = getattr(self, "index", 0)
        return range(start, start + self.count)

    def sampling(self, config: SamplingConfig) -> SamplingConfig:
        """Apply the request's options to ``config``; raises UserError if they contradict each other."""
        if (guidance := getattr(self, "guidance", None)) is not None:
            config = config.with_changes({"autoguidance": None})
        if guidance == 1:
            # Its other options have no effect without guidance.
            config = config.without_guidance()
        if self.sampler is not None and self.sampler != config.sampler:
            names = [kind.model_fields["sampler"].default for kind in SAMPLERS]
            if self.sampler not in names:
                raise UserError(f"there is no sampler {self.sampler!r}: use {', '.join(names)}")
            config = with_sampler(config, self.sampler)
        options = {"steps": self.steps, "guidance": guidance}
        return config.with_changes({name: value for name, value in options.items() if value is not None})


class ConditionalRequest(GenerationRequest):
    """Fields of tasks with labels and prompts."""

    label: Text | OneOrMore | None = None
    """Name of the class; of several, image i has the i-th, in a cycle."""
    prompt: Text | OneOrMore | None = None
    """Prompt in the words of captions; of several, image i has the i-th, in a cycle."""
    negative_prompt: Text | None = None
    """Prompt that guidance leads away from."""
    guidance: float | None = Field(None, ge=0, le=1000)
    """As sampling.guidance, and without autoguidance; null: as configured, of which sampling.guidance needs a label or
    prompt."""
    size: Size | None = None
    """Width and height of the images in pixels, as WIDTHxHEIGHT; null: the most frequent shape of the model's training
    images, or for an edit the one of them whose aspect ratio is nearest to that of the image."""

    @property
    def conditions(self) -> Conditions:
        """Labels, prompts and sizes of the images."""
        return Conditions(
            labels=_as_tuple(self.label),
            prompts=_as_tuple(self.prompt),
            negative_prompt=self.negative_prompt,
            sizes=() if self.size is None else (self.size,),
        )


class IndexedRequest(GenerationRequest):
    """Fields of tasks whose images start at an index."""

    index: int = Field(0, ge=0, le=MAX_INTEGER)
    """Index of the first image; the others follow."""


class EditRequest(ConditionalRequest, IndexedRequest):
    """Fields of tasks that edit an image."""

    image: bytes
    """Image file (PNG, JPEG, WebP …), cropped to the shape of the result and scaled; transparency becomes black."""


class SampleRequest(ConditionalRequest, IndexedRequest):
    """Images from noise."""

    task: Literal["sample"] = "sample"


class InpaintRequest(EditRequest):
    """Inpainting: the part of an image under a mask is generated again."""

    task: Literal["inpaint"] = "inpaint"
    mask: bytes
    """Image file as large as ``image``, white where it is filled, black where it is kept; after scaling, a pixel is
    kept if it is nearly black."""
    strength: float = Field(1.0, gt=0, le=1)
    """Strength of the change, above 0 and at most 1."""
    method: Literal["replace", "repaint", "pigdm"] = "replace"
    """Replace the known part of the estimate in each step (replace, the fast method); also repeat stretches of steps,
    which fits the hole better to its surroundings (repaint); or guide each step by a gradient (pigdm, ΠGDM), for 2.5
    times the work."""
    resample_steps: int | None = Field(None, ge=1, le=100)
    """How often each stretch of steps is run, which multiplies the work; null: 5 with repaint, 1 with pigdm."""

    @model_validator(mode="before")
    @classmethod
    def _default_resample_steps(cls, fields: Any) -> Any:
        method = fields.get("method")
        default = 5 if method == "repaint" else 1 if method == "pigdm" else None
        return {"resample_steps": default} | fields

    @model_validator(mode="after")
    def _resampling_has_an_effect(self) -> "InpaintRequest":
        if self.method == "replace" and self.resample_steps is not None:
            raise ValueError(
                "resample_steps means nothing to this method of inpainting: use repaint or pigdm, or leave it out"
            )
        if self.method == "repaint" and self.resample_steps == 1:
            raise ValueError("resample_steps = 1 does not resample: use 2 or more, or the method replace")
        return self


class Img2ImgRequest(EditRequest):
    """Image-to-image generation (SDEdit): a variation of an image."""

    task: Literal["img2img"] = "img2img"
    strength: float = Field(0.6, gt=0, lt=1)
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


def _as_tuple(texts: str | list[str] | None) -> tuple[str, ...]:
    return () if texts is None else (texts,) if isinstance(texts, str) else tuple(texts)


REQUESTS: Mapping[Task, type[GenerationRequest]] = {
    "sample": SampleRequest,
    "inpaint": InpaintRequest,
    "img2img": Img2ImgRequest,
    "interpolate": InterpolateRequest,
    "upscale": UpscaleRequest,
}
"""Request class of each task."""
FIELDS = tuple(dict.fromkeys(name for request in REQUESTS.values() for name in request.model_fields))
"""Fields of the requests of all tasks."""


def make_request(fields: Mapping[str, Any]) -> GenerationRequest:
    """Make the request with these ``fields``, None meaning left out; raises UserError if one does not fit the task."""
    values = {name: value for name, value in fields.items() if value is not None}
    if (task := values.get("task", "sample")) not in [*REQUESTS]:  # a list: what JSON holds may not be hashable
        raise UserError(f"there is no task {str(task)[:40]!r}: use {', '.join(REQUESTS)}")
    try:
        return REQUESTS[task].model_validate(values)
    except ValidationError as error:
        raise UserError(_describe_error(task, error)) from error


DIFFUSERS_NAMES = {
    "num_inference_steps": "steps=20",
    "guidance_scale": "guidance=3",
    "num_images_per_prompt": "count=4",
    "batch_size": "count=4",
    "height": 'size="WIDTHxHEIGHT"',
    "width": 'size="WIDTHxHEIGHT"',
    "class_labels": 'label="NAME"',
    "generator": "seed=7",
}
"""How to say here what options of diffusers' pipelines say."""


def describe_diffusers_names(names: Iterable[str]) -> str | None:
    """Say what an option of diffusers' pipelines among ``names`` is called here; None if there is none."""
    name = next((name for name in names if name in DIFFUSERS_NAMES), None)
    return None if name is None else f"{name} is diffusers' name: here it is called {DIFFUSERS_NAMES[name]}"


def _describe_error(task: Task, error: ValidationError) -> str:
    errors = error.errors()
    if extra_fields := [str(entry["loc"][-1]) for entry in errors if entry["type"] == "extra_forbidden"]:
        if words := describe_diffusers_names(extra_fields):
            return words
        if unknown_fields := [name[:40] for name in extra_fields if name not in FIELDS][:10]:
            return (
                f"there is no {', '.join(unknown_fields)} to ask for; there is {', '.join(REQUESTS[task].model_fields)}"
            )
        tasks = [key for key, request in REQUESTS.items() if extra_fields[0] in request.model_fields]
        return f"{extra_fields[0]} means nothing to {task}, only to {', '.join(tasks)}: leave it out"
    if missing_fields := [str(entry["loc"][-1]) for entry in errors if entry["type"] == "missing"]:
        return f"{task} needs {' and '.join(missing_fields)}: give {'them' if missing_fields[1:] else 'it'}"
    # Behind the name of a field come the alternatives of its type.
    name = "".join(map(str, errors[0]["loc"][:1]))
    return "method is replace, repaint or pigdm" if name == "method" else describe_validation_error(errors[0], name)


def read_request(fields: Mapping[str, Any], image: Path | None = None, mask: Path | None = None) -> GenerationRequest:
    """Make a request with image files; raises UserError as ``make_request`` does, and for unreadable files."""
    files = {}
    for name, path in (("image", image), ("mask", mask)):
        try:
            if path is not None:
                if path.stat().st_size > MAX_FILE_BYTES:
                    raise UserError(f"the {name} {path} has over {MAX_FILE_BYTES} bytes: give a smaller one")
                files[name] = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"the {name} {path} cannot be read ({error.strerror}): give the path of an image"
            ) from error
    return make_request({**fields, **files})
