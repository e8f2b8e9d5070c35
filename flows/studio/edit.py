"""Page that edits images: inpainting, variations, the way between two seeds, enlarging.

Of each uploaded file, header and size are checked before Gradio or Darkroom decodes any of it: Gradio's own components
decode what they are sent, of any format and size, before an event handler sees it.
"""

import math
import re
from abc import ABCMeta
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict

import gradio as gr
import numpy as np
from gradio.component_meta import ComponentMeta
from gradio.components.base import server
from PIL import Image

from diffusion.common.errors import UserError
from diffusion.common.image_grids import png_bytes
from diffusion.common.shapes import Shape
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.decode import UnusableEntryError, decode_rgba, read_size
from diffusion.generation.config import MAX_FILE_BYTES, Task
from diffusion.generation.requests import tasks_of
from flows.studio.generate import INSTANT, GeneratedImages, StudioSource, TaskForm

FORMATS = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP", re.DOTALL)
"""First bytes of JPEG, PNG and WebP."""
LIMITS = IngestConfig(max_pixels=25_000_000, max_bytes=MAX_FILE_BYTES, enlarge=True)
"""Limits of an upload: a photograph of 24 million pixels passes, and takes up to 0.5 GB to decode."""
MAX_LAYERS = 8
"""Maximum number of layers painted on an image."""
CANVAS = 512
"""Smallest height and width, in pixels, at which one can paint a mask; smaller images are enlarged."""


class Canvas(TypedDict):
    """Value of an image editor: files whose headers were checked."""

    background: bytes | None
    layers: list[bytes]
    """What was painted, with opacity above 0, in layers as large as the background."""


def check_upload(payload: bytes | None) -> tuple[int, int]:
    """Return width and height of an image file; raises UserError if format or size is not allowed."""
    if payload is None or not FORMATS.match(payload):
        raise UserError("the image is not a PNG, JPEG or WebP file: convert it to one of them")
    try:
        return read_size(payload, LIMITS)
    except UnusableEntryError as error:
        raise UserError(f"the image cannot be used: {error}") from error


def decode_upload(payload: bytes) -> Image.Image:
    """Decode an image file as RGBA at its own size; raises UserError as ``check_upload`` does, and if it is damaged."""
    check_upload(payload)
    try:
        return decode_rgba(payload, LIMITS)
    except UnusableEntryError as error:
        raise UserError(f"the image cannot be used: {error}") from error


def _read(file: Any) -> bytes:
    """Read a file that Gradio has in its cache, or holds in memory, and check it."""
    if file is not None and not isinstance(file, bytes):
        path = Path(file.path or "")
        if not path.is_file():  # such as an image in the request itself
            raise UserError("the image was not uploaded as a file: upload it")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"the image has over {MAX_FILE_BYTES} bytes: give a smaller one")
        file = path.read_bytes()
    check_upload(file)
    return bytes(file)


class _Meta(ComponentMeta):  # type: ignore[misc]
    """Metaclass of components without Gradio's, which writes a .pyi file beside the module of each."""

    def __new__(cls, name: str, bases: tuple[type, ...], attributes: dict[str, Any]) -> Any:
        return ABCMeta.__new__(cls, name, bases, attributes)


class ImageUpload(gr.Image, metaclass=_Meta):  # type: ignore[misc]
    """Image whose value is a checked file, as bytes."""

    is_template = True
    """To Gradio: the browser shows it as the base class."""

    def preprocess(self, payload: Any) -> bytes | None:
        """Read and check the file."""
        return None if payload is None else _read(payload)


class PaintableImage(gr.ImageEditor, metaclass=_Meta):  # type: ignore[misc]
    """Image editor whose value is a ``Canvas``."""

    is_template = True

    def preprocess(self, payload: Any) -> Canvas | None:
        """Read and check the files; an empty canvas if the browser sent none."""
        if payload is None:
            return None
        files = payload if payload.id is None else self.blob_storage.pop(payload.id, None)
        if files is None or files.background is None:
            return {"background": None, "layers": []}
        if len(files.layers) > MAX_LAYERS:
            raise UserError(f"{len(files.layers)} layers were painted: paint in at most {MAX_LAYERS}")
        layers = [_read(layer) for layer in files.layers if layer is not None]
        return {"background": _read(files.background), "layers": layers}

    @server  # type: ignore[untyped-decorator]
    def accept_blobs(self, data: Any) -> None:
        """Keep a file that the browser sends ahead of an event; the oldest are dropped beyond some memory."""
        fields = data.data
        if fields["type"] == "composite":  # which nothing here uses
            return
        if fields["type"] == "layer" and not 0 <= int(fields["index"]) < MAX_LAYERS:
            raise UserError(f"layer {fields['index']} was painted: paint in at most {MAX_LAYERS}")
        super().accept_blobs(data)
        # Oldest first.
        for key in [*self.blob_storage]:
            if sum(map(_stored_bytes, [*self.blob_storage.values()])) > 2 * MAX_FILE_BYTES:
                self.blob_storage.pop(key, None)


def _stored_bytes(blobs: Any) -> int:
    return sum(len(blob or b"") for blob in (blobs.background, *blobs.layers))


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


def _canvas_of(background: Image.Image) -> dict[str, Any]:
    return {"background": enlarge_to_canvas(background), "layers": [], "composite": None}


def _put_on_canvas(canvas: Canvas) -> Any:
    background = canvas["background"]
    if background is None or max(check_upload(background)) >= CANVAS:
        return gr.skip()
    return _canvas_of(decode_upload(background))


class EditForm(TaskForm):
    """Form with the image that a task edits, if it edits one."""

    def make_inputs(self) -> dict[str, Any]:
        if self.task == "inpaint":
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
            editor.upload(_put_on_canvas, editor, editor, **INSTANT)
            methods = [("fast", "replace"), ("guided, 2.5 times", "pigdm"), ("resampled, 5 times", "repaint")]
            return {
                "image": editor,
                "strength": gr.Slider(0.01, 1.0, value=1.0, step=0.01, label="Strength (1: replace all)"),
                "method": gr.Radio(methods, value="replace", label="Method"),
            }
        if self.task not in ("img2img", "upscale"):
            return {}
        style: dict[str, Any] = {"height": 300, "elem_classes": self.source.pixels_class, "buttons": []}
        image = ImageUpload(label="Image", format="png", sources=["upload", "clipboard"], **style)
        if self.task == "upscale":
            return {"image": image}
        strength = gr.Slider(0.01, 0.99, value=0.6, step=0.01, label="Strength (near 0: keep)")
        return {"image": image, "strength": strength}

    def read(self, fields: dict[str, Any]) -> dict[str, Any]:
        if self.task == "inpaint":
            fields |= editor_files(fields["image"], self.source.model.header.trained_shapes)
        if "image" in fields and fields["image"] is None:
            raise UserError("there is no image: upload one, or paste it from the clipboard")
        return fields


def add_page(source: StudioSource, pages: Any, generate: TaskForm | None) -> None:
    """Add the page, with a tab for each edit of the model, to which ``pages`` leads from an image of ``generate``."""
    forms = dict[Task, TaskForm]()
    with gr.Tab("Edit", id="edit"), gr.Tabs() as tabs:
        for task in tasks_of(source.model):
            if task != "sample":
                with gr.Tab(task.capitalize(), id=task):
                    forms[task] = EditForm(source, task, task.capitalize())
    for task, title in (("inpaint", "Inpaint this image"), ("img2img", "Vary this image")):
        if generate is not None and task in forms:
            _send(generate, forms[task], title, [pages, tabs])


def _send(generate: TaskForm, form: TaskForm, title: str, tabs: list[Any]) -> None:
    """Add a button that opens the chosen image in the form of an edit, with its prompt and class."""
    names = [name for name in ("prompt", "label") if name in form.controls]

    def send(images: GeneratedImages, number: int) -> list[Any]:
        path, conditions, index = images.paths[number], images.request.conditions, images.request.indices[number]
        image = _canvas_of(Image.open(path)) if form.task == "inpaint" else path
        texts = {"prompt": conditions.prompt(index), "label": conditions.label(index)}
        return [image, gr.Tabs(selected="edit"), gr.Tabs(selected=form.task), *(texts[name] or "" for name in names)]

    with generate.actions:
        button = gr.Button(title, size="sm")
    outputs = [form.controls["image"], *tabs, *(form.controls[name] for name in names)]
    button.click(send, [generate.images, generate.number], outputs, **INSTANT)
