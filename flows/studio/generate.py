"""Page that generates images, and the form of a task that the page for edits consists of, too."""

import ctypes
import os
import secrets
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextvars import copy_context
from dataclasses import dataclass
from html import escape
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple, Self

import gradio as gr

from diffusion.checkpoints import load_model
from diffusion.common.errors import UserError
from diffusion.common.escaping import pluralize
from diffusion.common.files import sha256_file
from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.shapes import shape_name
from diffusion.families.diffusion_model import DiffusionModel
from diffusion.families.model import Model
from diffusion.families.pretrained.model import PretrainedModel
from diffusion.generation.config import GenerationRequest, Task, make_request
from diffusion.generation.generate import describe_conditions
from diffusion.generation.limits import Budget
from diffusion.generation.requests import answer, encode
from diffusion.process.samplers import SAMPLERS, SamplingConfig
from flows.environment import settings
from flows.tracking.console import Pace

MAX_IMAGES = 64
"""Maximum number of images of a request."""
MAX_SEED = 2**53 - 1
"""Largest seed that a number in JavaScript can hold exactly."""
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
"""Options of events that generate: a second generation would slow down the first and double its memory."""
BAR = gr.Progress()
"""Default of a handler's argument, for which Gradio gives it a bar of its own."""
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
INSTANT: dict[str, Any] = {**PRIVATE, "queue": False, "show_progress": "hidden"}


class GeneratedImages(NamedTuple):
    """Images of a request, in PNG files that carry the metadata of ``darkroom sample``."""

    request: GenerationRequest
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class StudioSource:
    """Loaded model, with what it is called, what its images say of their origin, and the configured sampling."""

    model: Model
    name: str
    origin: Mapping[str, str]
    sampling: SamplingConfig

    @classmethod
    def from_file(cls, weights: Path, sampling: SamplingConfig) -> Self:
        """Load the model in a file; raises UserError if it is none."""
        model = load_model(weights)
        origin = {"model": f"sha256:{sha256_file(weights)}", "content_digest": model.header.content_digest}
        return cls(model, weights.stem, origin, sampling)

    @property
    def defaults(self) -> SamplingConfig:
        """Sampling of a request that sets nothing."""
        return self.model.header.sampling(self.sampling)

    @property
    def pixels_class(self) -> str:
        """CSS class of images: the pixels of small ones stay squares when they are enlarged."""
        return "pixels" if self.model.header.size <= 128 else "smooth"

    def generate(
        self,
        fields: Mapping[str, Any],
        progress: Progress = ignore_progress,
        is_abandoned: Callable[[], bool] = lambda: False,
    ) -> GeneratedImages:
        """Generate the images of the fields of a form, in which empty texts mean left out, into new PNG files.

        Files and pixels are as ``darkroom sample`` and ``darkroom edit`` make them with a model file. Raises UserError
        as ``make_request`` and ``answer`` do, and StoppedError if nobody waits for them any longer.
        """
        fields = {name: None if value == "" else value for name, value in fields.items()}
        if fields.get("guidance") == default_guidance(self.defaults):
            fields["guidance"] = None  # by default it may be limited to some noise levels, or be autoguidance
        request = make_request(fields)
        if request.count > MAX_IMAGES:
            raise UserError(f"{request.count} images are more than a page shows, {MAX_IMAGES}: use `darkroom sample`")
        [images] = answer(self.model, [request], self.sampling, progress, Budget(settings(), is_abandoned))
        folder, indices = Path(mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR"))), request.indices
        stem = self.name.removeprefix("models:/").replace("/", "-")
        paths = tuple(folder / f"{stem}-seed{request.seed}-{index}.png" for index in indices)
        for path, index, image in zip(paths, indices, images, strict=True):
            path.write_bytes(encode(image, index, request, self.origin))
        return GeneratedImages(request, paths)


def default_guidance(sampling: SamplingConfig) -> float:
    """Scale of guidance that a form shows for ``sampling``; 1 for none, and for autoguidance."""
    return 1.0 if sampling.guidance is None else sampling.guidance


def make_progress_callback(bar: gr.Progress) -> Progress:
    """Progress callback that moves the ``bar`` of a page, from any thread, with rate and time left."""
    context, lock, paces = copy_context(), threading.Lock(), defaultdict[str, Pace](Pace)

    def show(what: str, done: int, total: int | None, note: str = "") -> None:
        count = f"{done} of {total} {what}" if total else f"{done} {what}"
        with lock:
            paces[what].add(done)
            words = ", ".join(filter(None, (count, paces[what].words(total))))
            context.run(bar, done / total if total else None, desc=words)

    return show


def condition_controls(model: Model, task: Task = "sample") -> dict[str, Any]:
    """Make the inputs of a prompt and a class, as far as ``model`` knows any."""
    controls: dict[str, Any] = {}
    if model.config.text:
        # A single line to begin with, in which Enter starts; it grows with the text.
        controls["prompt"] = gr.Textbox(label="Prompt", lines=1, max_lines=5, placeholder="What should it show?")
    if model.classes:
        # Between two seeds there is nothing between classes.
        any_class = [] if task == "interpolate" and not model.config.text else [("any", "")]
        choices = [*any_class, *((name, name) for name in model.classes)]
        controls["label"] = gr.Dropdown(choices, value=choices[0][1], label="Class")
    return controls


def option_controls(source: StudioSource, task: Task) -> dict[str, Any]:
    """Make the inputs of the number of images, seeds, and the sampler's options, as far as they have an effect."""
    model, controls, sampling = source.model, dict[str, Any](), source.defaults
    # Of a student they are fixed by distillation.
    is_sampled = isinstance(model, DiffusionModel) and model.header.student_steps is None
    min_count, count = (2 if task == "interpolate" else 1), (1 if task == "upscale" else 8)
    controls["count"] = gr.Slider(min_count, MAX_IMAGES, value=count, step=1, label="Images")
    has_guidance = is_sampled and task != "upscale" and bool(model.classes or model.config.text)
    seeds = {"seed": "Seed", **({"to_seed": "To seed"} if task == "interpolate" else {})}
    with gr.Row():
        for value, (name, label) in enumerate(seeds.items()):
            controls[name] = gr.Number(value, label=label, precision=0, minimum=0, maximum=MAX_SEED, min_width=110)
        die = gr.Button("New seed", size="sm", min_width=110, scale=0)
        for name in seeds:
            die.click(lambda: secrets.randbelow(2**32), None, controls[name], **INSTANT)
    shapes = [*map(shape_name, model.header.trained_shapes)] if task != "upscale" else []
    with gr.Row():
        if is_sampled:
            controls["steps"] = gr.Number(sampling.steps, label="Steps", precision=0, minimum=1, min_width=110)
            unknown = {"consistency"} if isinstance(model, PretrainedModel) else {"consistency", "scheduler"}
            names = [name for kind in SAMPLERS if (name := kind.model_fields["sampler"].default) not in unknown]
            controls["sampler"] = gr.Dropdown(names, value=sampling.sampler, label="Sampler", min_width=150)
        if has_guidance:
            controls["guidance"] = gr.Number(default_guidance(sampling), label="Guidance", minimum=0, step=0.1)
        if shapes[1:]:
            own = [("as the image", "")] if task in ("inpaint", "img2img") else []
            choices = [*own, *((name, name) for name in shapes)]
            controls["size"] = gr.Dropdown(choices, value=choices[0][1], label="Size", min_width=150)
    if has_guidance and model.config.text:
        controls["negative_prompt"] = gr.Textbox(label="Negative prompt", placeholder="what guidance leads away from")
    return controls


class TaskForm:
    """Controls of a task, the button that starts it, and its results."""

    def __init__(self, source: StudioSource, task: Task, title: str) -> None:
        self.source, self.task = source, task
        self._stops: dict[str, threading.Event] = {}
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                self.controls = self.make_inputs()
                if task != "upscale":
                    self.controls |= condition_controls(source.model, task)
                with gr.Row():
                    start = gr.Button(title, variant="primary", min_width=150, scale=3)
                    stop = gr.Button("Stop", min_width=80, scale=1)
                self.controls |= option_controls(source, task)
            with gr.Column(scale=6, min_width=300):
                self.heading = gr.HTML("Your images will appear here.", elem_classes="heading")
                self.gallery = gr.Gallery(
                    format="png",
                    columns=4,
                    height="auto",
                    object_fit="contain",
                    show_label=False,
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_classes=[source.pixels_class, "images"],
                )
                self.actions = gr.Row(visible=False)
        self.images, self.number = gr.State(None), gr.State(0)
        self.gallery.select(self._select, None, self.number, **INSTANT)
        triggers = [start.click, *([self.controls["prompt"].submit] if "prompt" in self.controls else [])]
        run = gr.on(
            triggers,
            self._run,
            {*self.controls.values()},
            [self.gallery, self.heading, self.images, self.number, self.actions],
            show_progress_on=self.heading,
            api_name=task,
            **ONE_AT_A_TIME,
        )
        run.then(lambda: gr.Gallery(selected_index=None), None, self.gallery, **INSTANT)
        stop.click(self._stop, cancels=[run], **INSTANT)

    def make_inputs(self) -> dict[str, Any]:
        """Make the inputs of an edit."""
        return {}

    def read(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Turn the values of the controls into the fields of a request."""
        return fields

    def _run(self, values: dict[Any, Any], page: gr.Request, bar: gr.Progress = BAR) -> list[Any]:
        session, stop = page.session_hash or "", threading.Event()
        self._stops[session] = stop
        try:
            fields = self.read({"task": self.task} | {name: values[item] for name, item in self.controls.items()})
            images = self.source.generate(fields, make_progress_callback(bar), stop.is_set)
        finally:
            if self._stops.get(session) is stop:
                del self._stops[session]
            # The memory of decoded images is the system's again; glibc would keep it, thread by thread.
            if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
                trim(0)
        request, paths = images
        texts = [str(index) for index in request.indices]
        if self.task != "interpolate":  # whose images are in order
            described = describe_conditions(self.source.model, request.indices, request.seed, request.conditions)
            texts = described if len({*described}) > 1 else texts
        text = f"{pluralize(len(paths), 'image')} of seed {request.seed} by {escape(self.source.name)}"
        return [[*zip(paths, texts, strict=True)], text, images, 0, gr.Row(visible=True)]

    def _stop(self, page: gr.Request) -> None:
        if (stop := self._stops.get(page.session_hash or "")) is not None:
            stop.set()

    def _select(self, event: gr.SelectData) -> int:
        # By its number in the list kept here: a path from the browser could name any file.
        return int(event.index)
