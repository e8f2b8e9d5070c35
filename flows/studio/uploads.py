"""Inputs for images: of each file, header and size are checked before Gradio or Darkroom decodes any of it.

Gradio's own components decode what they are sent, of any format and size, before an event handler sees it.
"""

import ctypes
import re
from abc import ABCMeta
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import gradio as gr
from gradio.component_meta import ComponentMeta
from gradio.components.base import server
from PIL import Image

from diffusion.common.errors import UserError
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.decode import UnusableEntryError, decode_rgba, read_size
from diffusion.generation.config import MAX_FILE_BYTES
from flows.studio.errors import show_errors

FORMATS = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP", re.DOTALL)
"""First bytes of JPEG, PNG and WebP."""
LIMITS = IngestConfig(max_pixels=25_000_000, max_bytes=MAX_FILE_BYTES, enlarge=True)
"""Limits of an upload: a photograph of 24 million pixels passes, and takes up to 0.5 GB to decode."""
MAX_LAYERS = 8
"""Maximum number of layers painted on an image."""


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


@contextmanager
def memory_returned() -> Iterator[None]:
    """Context after which the memory of decoded images is the system's again; glibc would keep it, thread by thread."""
    try:
        yield
    finally:
        if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
            trim(0)


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
        with show_errors():
            return None if payload is None else _read(payload)


class WholeNumber(gr.Number, metaclass=_Meta):  # type: ignore[misc]
    """Number whose range an error names together with its label."""

    is_template = True

    def preprocess(self, payload: float | None) -> float | int | None:
        """Check that the number is in its range."""
        with show_errors():
            if payload is not None and not self.minimum <= payload <= self.maximum:
                raise UserError(f"{self.label} {payload:g}: give a whole number from {self.minimum} to {self.maximum}")
        return super().preprocess(payload)  # type: ignore[no-any-return]


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
        with show_errors():
            if len(files.layers) > MAX_LAYERS:
                raise UserError(f"{len(files.layers)} layers were painted: paint in at most {MAX_LAYERS}")
            return {
                "background": _read(files.background),
                "layers": [_read(layer) for layer in files.layers if layer is not None],
            }

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
