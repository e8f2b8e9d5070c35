"""Tabs that generate images: one per task that the model can do, with the options that affect it."""

import io
import math
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Self

import gradio as gr
import numpy as np
from PIL import Image

from diffusion.checkpoints import load_model
from diffusion.common.errors import UserError
from diffusion.common.files import sha256_file
from diffusion.common.image_grids import png_bytes
from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.shapes import Shape, shape_name
from diffusion.families.ddpm import DiffusionModel
from diffusion.families.model import Model
from diffusion.families.pretrained import PretrainedModel
from diffusion.generation.config import GenerationRequest, Task, make_request
from diffusion.generation.limits import Budget
from diffusion.generation.requests import answer, encode, sampling_of, tasks_of
from diffusion.process.samplers import SAMPLERS, SamplingConfig
from flows.environment import settings
from flows.studio.errors import show_errors
from flows.studio.uploads import Canvas, ImageUpload, PaintableImage, check_upload, decode_upload, memory_returned

LARGEST_SEED = 2**53 - 1
"""Largest seed that a number in JavaScript can hold exactly."""
MOST = 64
"""Most images of a request."""
CANVAS = 512
"""Smallest height and width, in pixels, at which one can paint a mask; smaller images are enlarged."""
TITLES: Mapping[Task, str] = {
    "sample": "Generate",
    "inpaint": "Inpaint",
    "img2img": "Img2img",
    "interpolate": "Interpolate",
    "upscale": "Upscale",
}
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
"""Options of events that generate: a second generation would slow down the first and double its memory."""

GalleryItem = tuple[Path | Image.Image, str]


@dataclass(frozen=True)
class Source:
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
        return cls(model, str(weights), origin, sampling)

    def generate(self, fields: Mapping[str, Any], progress: Progress = ignore_progress) -> tuple[list[Path], str]:
        """Generate the images of a request into new PNG files; returns them with a line about how they were made.

        Files and pixels are those of ``darkroom sample`` and ``darkroom edit`` with a model file. Raises UserError as
        ``make_request`` and ``answer`` do.
        """
        request = self.request(fields)
        [images] = answer(self.model, [request], self.sampling, progress, Budget(settings()))
        folder = Path(mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR")))
        paths = [folder / f"{index:08d}.png" for index in request.indices]
        for path, index, image in zip(paths, request.indices, images, strict=True):
            path.write_bytes(encode(image, index, request, self.origin))
        author = f" by {self.name}" if self.name.startswith("models:/") else ""
        return paths, f"{len(paths)} images of seed {request.seed}{author}: {self.describe(request)}"

    def request(self, fields: Mapping[str, Any]) -> GenerationRequest:
        """Make a request of the fields of a form, in which empty texts mean left out."""
        request = make_request({name: None if value == "" else value for name, value in fields.items()})
        if request.count > MOST:
            raise UserError(f"{request.count} images are more than a page shows, {MOST}: use `darkroom sample`")
        return request

    def describe(self, request: GenerationRequest) -> str:
        """Describe the effective sampling of ``request`` in words."""
        if not isinstance(self.model, DiffusionModel):
            return f"{self.model.config.family}, in one pass"
        config = sampling_of(self.model, request, self.sampling)
        guidance = f", guidance {config.guidance_text}" if config.is_guided else ""
        return f"{config.sampler}, {config.steps} steps{guidance}"


def make_progress_callback(bar: gr.Progress) -> Progress:
    """Progress callback that moves the ``bar`` of a page."""

    def show(what: str, done: int, total: int | None, note: str = "") -> None:
        bar((done, total), desc=what)

    return show


def controls_key(model: Model) -> tuple[Any, ...]:
    """All that the controls for ``model`` depend on, but for the defaults shown in them."""
    config = model.header.model
    return (
        tasks_of(model),
        [*model.header.trained_shapes],
        model.classes,
        config.family,
        config.text,
        model.header.student_steps is None,
    )


def condition_controls(model: Model) -> dict[str, Any]:
    """Make the inputs of a prompt, a class and a size, as far as ``model`` knows any."""
    controls: dict[str, Any] = {}
    if model.config.text:
        controls["prompt"] = gr.Textbox(label="Prompt", lines=2, max_lines=4, placeholder="in the words of captions")
    if model.classes:
        choices = [("any, as often as in the data set", ""), *((name, name) for name in model.classes)]
        controls["label"] = gr.Dropdown(choices, value="", label="Class")
    if model.config.one_shape is None:
        shapes = [*map(shape_name, model.header.trained_shapes)]
        controls["size"] = gr.Dropdown(["", *shapes], value="", label="Size", allow_custom_value=True)
    return controls


def option_controls(source: Source, task: Task, count: int) -> dict[str, Any]:
    """Make the inputs of seeds, the number of images, and the sampler's options."""
    model, controls = source.model, dict[str, Any]()
    with gr.Row():
        controls["seed"] = _seed("Seed", 0)
        if task == "interpolate":
            controls["to_seed"] = _seed("To seed", 1)
        else:
            draw_button = gr.Button("Another seed", size="sm", min_width=110, scale=0, elem_classes="beside")
            draw_button.click(
                lambda: secrets.randbelow(2**32), None, controls["seed"], api_visibility="private", queue=False
            )
    fewest = 2 if task == "interpolate" else 1
    controls["count"] = gr.Slider(fewest, MOST, value=max(count, fewest), step=1, label="Images")
    if not isinstance(model, DiffusionModel):
        return controls
    sampling = model.header.sampling(source.sampling)
    with gr.Accordion("Sampler", open=False):
        with gr.Row():
            names = [config_class.model_fields["sampler"].default for config_class in SAMPLERS]
            if model.header.student_steps is None:
                choices = [(f"as configured: {sampling.sampler}", "")]
                exclusions = {"consistency"} if isinstance(model, PretrainedModel) else {"consistency", "scheduler"}
                choices += [(name, name) for name in names if name not in exclusions]
                controls["sampler"] = gr.Dropdown(choices, value="", label="Sampler", min_width=140)
            # Not gr.Number, which shows and sends 0 where there is no value.
            controls["steps"] = gr.Textbox(label="Steps", placeholder=str(sampling.steps), max_lines=1, min_width=110)
        if task != "upscale" and (model.classes or model.config.text):
            controls["guidance"] = gr.Textbox(
                label="Guidance (1: none)", placeholder=sampling.guidance_text, max_lines=1
            )
            if model.config.text:
                controls["negative_prompt"] = gr.Textbox(label="Negative prompt", placeholder="needs guidance")
    return controls


def _seed(label: str, value: int) -> Any:
    return gr.Number(value, label=label, precision=0, minimum=0, maximum=LARGEST_SEED, min_width=110)


def editor_files(canvas: Canvas | None, shapes: Iterable[Shape]) -> dict[str, bytes | None]:
    """Image and mask files of an image editor: painted pixels are filled, others are kept; transparency becomes black.

    An image of one of ``shapes`` that was ``enlarged`` to be painted on becomes what it was.
    """
    if canvas is None or canvas["background"] is None:
        return {"image": None, "mask": None}
    image = decode_upload(canvas["background"])
    background = Image.new("RGB", image.size)
    background.paste(image, mask=image.getchannel("A"))
    hole = np.zeros((background.height, background.width), bool)
    for layer in map(decode_upload, canvas["layers"]):
        if layer.size != background.size:
            raise UserError("what was painted is not as large as the image: clear the image and paint again")
        hole |= np.asarray(layer.getchannel("A")) > 0
    for height, width in shapes:
        small = background.resize((width, height), Image.Resampling.NEAREST)
        if enlarge_to_canvas(small) == background:
            background, scale = small, len(hole) // height
            hole = hole.reshape(height, scale, width, scale).max((1, 3))
            break
    return {"image": png_bytes(background), "mask": png_bytes(Image.fromarray(np.where(hole, np.uint8(255), 0)))}


def enlarge_to_canvas(image: Image.Image) -> Image.Image:
    """Repeat the pixels of a small image until one can paint on it."""
    scale = math.ceil(CANVAS / max(image.size))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) if scale > 1 else image


def tabs(source: Source, container: Any, current: Callable[[], Source]) -> None:
    """Add a tab for each task of the model; an image that was generated can be sent on to those that edit one.

    ``container`` holds the tabs, whose controls are those for ``source``; ``current`` returns what generates.
    """
    editors: dict[Task, Any] = {}
    outputs: dict[Task, tuple[Any, Any, Any]] = {}
    for task in tasks_of(source.model):
        with gr.Tab(TITLES[task], id=task), gr.Row():
            with gr.Column(scale=2, min_width=300):
                controls: dict[str, Any] = {}
                if task == "inpaint":
                    brush = gr.Brush(default_size=40, colors=["#2979ff"], color_mode="fixed")
                    editor = controls["image"] = editors[task] = PaintableImage(
                        label="Paint over what is to be filled",
                        format="png",
                        sources=("upload", "clipboard"),
                        transforms=(),
                        brush=brush,
                        layers=False,
                        height=420,
                        buttons=[],
                    )
                    editor.upload(_put_on_canvas, editor, editor, api_visibility="private", queue=False)
                elif task in ("img2img", "upscale"):
                    controls["image"] = editors[task] = ImageUpload(
                        label="Image",
                        format="png",
                        sources=["upload", "clipboard"],
                        height=300,
                        elem_classes=pixels_class(source),
                        buttons=[],
                    )
                if task in ("inpaint", "img2img"):
                    strength, least = (1.0, "1: replace all") if task == "inpaint" else (0.6, "near 0: keep the image")
                    most = 1.0 if task == "inpaint" else 0.99
                    controls["strength"] = gr.Slider(0.01, most, value=strength, step=0.01, label=f"Strength ({least})")
                if task == "inpaint":
                    controls["method"] = gr.Radio(
                        [
                            ("fast", "replace"),
                            ("guided, 2.5 times", "pigdm"),
                            ("resampled, 5 times", "repaint"),
                        ],
                        value="replace",
                        label="Method",
                    )
                if task != "upscale":
                    controls |= condition_controls(source.model)
                controls |= option_controls(source, task, 1 if task == "upscale" else 8)
                start_button = gr.Button(TITLES[task], variant="primary")
            with gr.Column(scale=3, min_width=300):
                gallery = gr.Gallery(
                    label="Images",
                    show_label=False,
                    columns=4,
                    format="png",
                    object_fit="contain",
                    height="auto",
                    interactive=False,
                    elem_classes=pixels_class(source),
                    buttons=["download", "fullscreen"],
                )
                note, paths = gr.Markdown(), gr.State([])
                outputs[task] = (gallery, paths, gr.Row())
        start_button.click(
            _run(current, task, controls),
            set(controls.values()),
            [gallery, note, paths],
            api_name=task,
            **ONE_AT_A_TIME,
        )
    for gallery, paths, row in outputs.values():
        for target, editor in editors.items():
            # Also the state inside of the row: what lies between tabs shifts their numbers in Gradio 6.
            with row:
                send_button = gr.Button(f"Send to {TITLES[target]}", size="sm", min_width=140, interactive=False)
                selection = gr.State()
            gallery.select(_choose, paths, [selection, send_button], api_visibility="private", queue=False)
            send_button.click(_open(target), selection, [editor, container], api_visibility="private", queue=False)


def pixels_class(source: Source) -> str:
    """CSS class of images: the pixels of small ones stay squares when they are enlarged."""
    return "pixels" if source.model.header.size <= 128 else "smooth"


def _run(current: Callable[[], Source], task: Task, controls: Mapping[str, Any]) -> Any:
    """Event handler that generates the images of ``task`` from the values of its ``controls``."""

    def run(values: dict[Any, Any], bar: gr.Progress = gr.Progress()) -> tuple[list[GalleryItem], str, list[Path]]:  # noqa: B008
        fields = {name: values[control] for name, control in controls.items()}
        with show_errors(), memory_returned() if "image" in fields else nullcontext():
            source = current()
            if task == "inpaint":
                fields |= editor_files(fields["image"], source.model.header.trained_shapes)
            paths, note = source.generate({"task": task} | fields, make_progress_callback(bar))
        start = int(paths[0].stem)
        return [(path, str(start + number)) for number, path in enumerate(paths)], note, paths

    return run


def _put_on_canvas(canvas: Canvas) -> Any:
    background = canvas["background"]
    if background is None or max(check_upload(background)) >= CANVAS:
        return gr.skip()
    with show_errors():
        return {"background": enlarge_to_canvas(decode_upload(background)), "layers": [], "composite": None}


def _choose(paths: list[Path], event: gr.SelectData) -> tuple[Path, Any]:
    # By number in our own list: a path from the browser could name any file.
    return paths[event.index], gr.Button(interactive=True)


def _open(target: Task) -> Any:
    def show(path: Path) -> tuple[Any, Any]:
        tab_update = gr.Tabs(selected=target)
        if target != "inpaint":
            return path, tab_update
        background = enlarge_to_canvas(Image.open(io.BytesIO(path.read_bytes())))
        return {"background": background, "layers": [], "composite": None}, tab_update

    return show
