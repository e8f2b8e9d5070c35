"""Tabs that generate images: one per task that the model can do, with the options that affect it."""

import io
import math
import secrets
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from diffusion.common.errors import UserError
from diffusion.common.image_grids import png_bytes
from diffusion.common.shapes import Shape, shape_name
from diffusion.families.diffusion_model import DiffusionModel
from diffusion.families.model import Model
from diffusion.families.pretrained.model import PretrainedModel
from diffusion.generation.config import Task
from diffusion.generation.requests import tasks_of
from diffusion.process.samplers import SAMPLERS
from flows.studio.errors import show_errors
from flows.studio.results import BAR, INSTANT, ONE_AT_A_TIME, PRIVATE, PageGenerator, Results, StartButton, pixels_class
from flows.studio.source import MAX_IMAGES, GeneratedImages, StudioSource, default_guidance, make_progress_callback
from flows.studio.uploads import (
    Canvas,
    ImageUpload,
    PaintableImage,
    WholeNumber,
    check_upload,
    decode_upload,
    memory_returned,
)

MAX_SEED = 2**53 - 1
"""Largest seed that a number in JavaScript can hold exactly."""
MAX_STEPS = 100
MAX_GUIDANCE = 10
MAX_CLASS_BUTTONS = 12
"""Maximum number of classes that are shown side by side; more are in a list."""
CANVAS = 512
"""Smallest height and width, in pixels, at which one can paint a mask; smaller images are enlarged."""
TITLES: Mapping[Task, str] = {
    "sample": "Generate",
    "inpaint": "Inpaint",
    "img2img": "Img2img",
    "interpolate": "Interpolate",
    "upscale": "Upscale",
}
HINTS: Mapping[Task, str] = {
    "sample": "Your images will appear here.",
    "inpaint": "Upload an image and paint over what is to be made anew, or press Inpaint below an image in Generate.",
    "img2img": "Upload an image to make variations of it. In Generate, Vary does so in one click.",
    "interpolate": "The images on the way from one seed to the other will appear here.",
    "upscale": "Upload a small image. Its enlarged versions will appear here.",
}


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


def condition_controls(model: Model, task: Task = "sample") -> dict[str, Any]:
    """Make the inputs of a prompt and a class, as far as ``model`` knows any."""
    controls: dict[str, Any] = {}
    if model.config.text:
        # A single line to begin with, in which Enter starts; it grows with the text.
        controls["prompt"] = gr.Textbox(
            label="Prompt", lines=1, max_lines=5, placeholder="What should it show?", elem_classes="prompt"
        )
    if model.classes:
        # Between two seeds there is nothing between classes.
        any_class = [] if task == "interpolate" and not model.config.text else [("any", "")]
        choices = [*any_class, *((name, name) for name in model.classes)]
        kind = gr.Radio if len(model.classes) <= MAX_CLASS_BUTTONS else gr.Dropdown
        controls["label"] = kind(choices, value=choices[0][1], label="Class")
    return controls


def option_controls(source: StudioSource, task: Task, count: int) -> dict[str, Any]:
    """Make the inputs of the number of images, seeds, and the sampler's options."""
    model, controls, sampling = source.model, dict[str, Any](), source.defaults
    is_sampled = isinstance(model, DiffusionModel) and not source.is_student
    min_count = 2 if task == "interpolate" else 1
    controls["count"] = gr.Slider(min_count, MAX_IMAGES, value=max(count, min_count), step=1, label="Images")
    has_guidance = is_sampled and task != "upscale" and bool(model.classes or model.config.text)
    if is_sampled:
        with gr.Row():
            lowest, highest = min(2, sampling.steps), max(MAX_STEPS, sampling.steps)
            controls["steps"] = gr.Slider(lowest, highest, value=sampling.steps, step=1, label="Steps", min_width=210)
            if has_guidance:
                default = default_guidance(sampling)
                controls["guidance"] = gr.Slider(
                    *(0, max(MAX_GUIDANCE, math.ceil(default))),
                    value=default,
                    step=0.1,
                    label="Guidance",
                    info=f"autoguidance {sampling.autoguidance:g} while this is 1" if sampling.autoguides else None,
                    min_width=210,
                )
    with gr.Row(elem_classes="seeds"):
        controls["seed"] = _seed("Seed", 0)
        if task == "interpolate":
            controls["to_seed"] = _seed("To seed", 1)
        die = gr.Button("⚄ New seed", size="sm", min_width=110, scale=0, elem_classes="beside")
        for name in {"seed", "to_seed"} & controls.keys():
            die.click(lambda: secrets.randbelow(2**32), None, controls[name], **INSTANT)
    shapes = [*map(shape_name, model.header.trained_shapes)] if task != "upscale" else []
    samplers = [kind.model_fields["sampler"].default for kind in SAMPLERS] if is_sampled else []
    if samplers or shapes[1:]:
        with gr.Accordion("More options", open=False):
            if has_guidance and model.config.text:
                controls["negative_prompt"] = gr.Textbox(
                    label="Negative prompt", placeholder="what guidance leads away from", max_lines=3
                )
            with gr.Row():
                if samplers:
                    exclusions = {"consistency"} if isinstance(model, PretrainedModel) else {"consistency", "scheduler"}
                    names = [name for name in samplers if name not in exclusions]
                    controls["sampler"] = gr.Dropdown(
                        [(f"{name} (default)" if name == sampling.sampler else name, name) for name in names],
                        value=sampling.sampler,
                        label="Sampler",
                        min_width=150,
                    )
                if shapes[1:]:
                    own = [("as the image", "")] if task in ("inpaint", "img2img") else []
                    choices = [*own, *((name, name) for name in shapes)]
                    controls["size"] = gr.Dropdown(choices, value=choices[0][1], label="Size", min_width=150)
    return controls


def _seed(label: str, value: int) -> Any:
    return WholeNumber(value, label=label, precision=0, minimum=0, maximum=MAX_SEED, min_width=110)


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


def tabs(source: StudioSource, page: gr.Blocks, container: Any, current: Callable[[], StudioSource]) -> None:
    """Add a tab for each task of the model; an image that was generated can be sent on to be inpainted.

    ``container`` holds the tabs of the ``page``, whose controls are those for ``source``; ``current`` returns what
    generates.
    """
    generate, forms = PageGenerator(current), dict[Task, dict[str, Any]]()
    all_results: dict[Task, Results] = {}
    for task in tasks_of(source.model):
        with gr.Tab(TITLES[task], id=task), gr.Row(elem_classes="workbench"):
            with gr.Column(scale=4, min_width=300, elem_classes="controls"):
                # On a phone the results come between the two.
                with gr.Column(elem_classes="request"):
                    controls = _image_controls(source, task)
                    if task != "upscale":
                        controls |= condition_controls(source.model, task)
                    start = StartButton(TITLES[task], generate)
                with gr.Column(elem_classes="options"):
                    if task in ("inpaint", "img2img"):
                        controls |= _edit_controls(task)
                    controls |= option_controls(source, task, 1 if task == "upscale" else 8)
            with gr.Column(scale=6, min_width=300, elem_classes="results"):
                results = Results(source, task, HINTS[task])
        forms[task], all_results[task] = controls, results
        triggers = [start.start.click, *([controls["prompt"].submit] if "prompt" in controls else [])]
        inputs = {*controls.values(), results.history}
        start.chain(triggers, _run(generate, results, controls), inputs, results.outputs, results.heading, task)
        results.wire(generate, start, controls)
        start.wire()
    if "inpaint" in forms:
        for results in all_results.values():
            _send_to_inpaint(results, forms["inpaint"], container)
    if "sample" in forms:
        _begin_with_examples(page, all_results["sample"], current)


def _image_controls(source: StudioSource, task: Task) -> dict[str, Any]:
    """Make the input of the image that a task edits, if it edits one."""
    if task == "inpaint":
        editor = PaintableImage(
            label="Paint the hole",
            placeholder="Upload an image",
            format="png",
            sources=("upload", "clipboard"),
            transforms=(),
            brush=gr.Brush(default_size=40, colors=["#2979ff"], color_mode="fixed"),
            layers=False,
            height=420,
            buttons=[],
        )
        put = editor.upload(_put_on_canvas, editor, editor, api_visibility="private", queue=False)
        put.failure(lambda: None, None, editor, **INSTANT)
        return {"image": editor}
    if task in ("img2img", "upscale"):
        image = ImageUpload(
            label="Image",
            format="png",
            sources=["upload", "clipboard"],
            height=300,
            elem_classes=pixels_class(source),
            buttons=[],
        )
        # It is checked as it comes, and one that cannot be used goes.
        checked = image.upload(lambda file: None, image, None, **PRIVATE)
        checked.failure(lambda: None, None, image, **INSTANT)
        return {"image": image}
    return {}


def _edit_controls(task: Task) -> dict[str, Any]:
    """Make the inputs of how an image is edited."""
    value, highest, meaning = (1.0, 1.0, "1: replace all") if task == "inpaint" else (0.6, 0.99, "near 0: keep")
    controls = {"strength": gr.Slider(0.01, highest, value=value, step=0.01, label=f"Strength ({meaning})")}
    if task == "inpaint":
        methods = [("fast", "replace"), ("guided, 2.5 times", "pigdm"), ("resampled, 5 times", "repaint")]
        controls["method"] = gr.Radio(methods, value="replace", label="Method")
    return controls


def _run(generate: PageGenerator, results: Results, controls: Mapping[str, Any]) -> Any:
    """Event handler that generates the images of a task from the values of its ``controls``."""

    def run(values: dict[Any, Any], request: gr.Request, bar: gr.Progress = BAR) -> list[Any]:
        fields = {name: values[control] for name, control in controls.items()}
        with show_errors(), memory_returned() if "image" in fields else nullcontext():
            source = generate.current()
            if results.task == "inpaint":
                fields |= editor_files(fields["image"], source.model.header.trained_shapes)
            if "image" in fields and fields["image"] is None:
                raise UserError("there is no image: upload one, or paste it from the clipboard")
            batch = generate({"task": results.task} | fields, request, bar, source)
        return results.show([batch, *values[results.history]])

    return run


def _begin_with_examples(page: gr.Blocks, results: Results, current: Callable[[], StudioSource]) -> None:
    """Show examples of what the model makes when the page is opened."""

    def begin(history: list[GeneratedImages], bar: gr.Progress = BAR) -> list[Any]:
        with show_errors():
            examples = current().make_examples(make_progress_callback(bar))
        return [gr.skip()] * len(results.outputs) if examples is None else results.show([*history, examples])

    page.load(begin, results.history, results.outputs, show_progress_on=results.heading, **ONE_AT_A_TIME, **PRIVATE)


def _send_to_inpaint(results: Results, form: Mapping[str, Any], container: Any) -> None:
    """Connect the button that opens the shown image in the tab for inpainting, with its prompt and class."""
    names = [name for name in ("prompt", "label") if name in form]

    def send(history: list[GeneratedImages], position: tuple[int, int]) -> list[Any]:
        batch, number = history[position[0]], position[1]
        background = enlarge_to_canvas(Image.open(io.BytesIO(batch.paths[number].read_bytes())))
        texts = {"prompt": batch.prompts[number], "label": batch.labels[number]}
        canvas = {"background": background, "layers": [], "composite": None}
        return [canvas, gr.Tabs(selected="inpaint"), *(texts[name] or "" for name in names)]

    outputs = [form["image"], container, *(form[name] for name in names)]
    assert results.inpaint is not None
    results.inpaint.click(send, [results.history, results.position], outputs, **INSTANT)


def _put_on_canvas(canvas: Canvas) -> Any:
    background = canvas["background"]
    if background is None or max(check_upload(background)) >= CANVAS:
        return gr.skip()
    with show_errors():
        return {"background": enlarge_to_canvas(decode_upload(background)), "layers": [], "composite": None}
