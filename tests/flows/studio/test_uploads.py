"""Uploads to the studio: what they may be, and what they cost before that is known."""

import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from diffusion.common.errors import UserError
from diffusion.common.image_grids import png_bytes
from diffusion.families.config import ModelConfig
from diffusion.process.samplers import sampling_config
from flows.local_stack.server_process import choose_ports
from tests.builders.command_line import start
from tests.builders.image_files import noise, png_of_chunks, saved
from tests.builders.small_models import CONFIG, write_model
from tests.builders.studio_client import PASSWORD, logged_in, named, peak_memory, trigger, upload
from tests.builders.waiting import wait_until_served

gr = pytest.importorskip("gradio", reason="the studio needs Gradio: pip install 'darkroom-diffusion[ui]'")
from flows.studio.app import build, launch  # noqa: E402
from flows.studio.edit import LIMITS, MAX_LAYERS, ImageUpload, PaintableImage, decode_upload  # noqa: E402
from flows.studio.generate import StudioSource  # noqa: E402

SAMPLING = sampling_config(sampler="dpmpp_2m", steps=2, compute_batch=8)


def png_bomb(side: int) -> bytes:
    """A PNG of ``side`` by ``side`` pixels in full, in a hundredth of their bytes."""
    compressor, row = zlib.compressobj(1), bytes(1 + 3 * side)
    body = b"".join(compressor.compress(row) for _ in range(side)) + compressor.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return png_of_chunks([(b"IHDR", header), (b"IDAT", body), (b"IEND", b"")])


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    weights = write_model(tmp_path_factory.mktemp("model") / "blobs.safetensors", 1, 0, classes={"even": 3, "odd": 1})
    page = build(StudioSource.from_file(weights, SAMPLING))
    yield launch(page, PASSWORD)
    page.close(verbose=False)


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[httpx.Client]:
    with logged_in(address) as client:
        yield client


@pytest.fixture(scope="module")
def bombs() -> list[bytes]:
    return [png_bomb(5001), saved(Image.new("L", (8000, 8000)), "WEBP", lossless=True, method=0)]


def canvas(background: object, *layers: object) -> dict[str, object]:
    return {"background": background, "layers": layers, "composite": None, "id": None}


def send(client: httpx.Client, task: str, payload: bytes, name: str = "image.png") -> dict[str, Any]:
    """Send a file to the input of ``task``; to the editor's as image and as layer."""
    file = upload(client, payload, name)
    values: dict[str, object] = {"image": file, "imageeditor": canvas(file, file)}
    if task == "canvas":  # on which what comes into the editor is put
        return trigger(client, lambda event: any(target[1] == "upload" for target in event["targets"]), values)
    return trigger(client, named(task), values)


def test_every_input_for_files_is_checked_before_it_is_decoded(tmp_path: Path) -> None:
    config = ModelConfig.model_validate(CONFIG.model_dump() | {"low_resolution": 4, "conditional": False})
    enlarging = write_model(tmp_path / "large.safetensors", 1, 0, config=config)
    inputs = {
        type(block)
        for weights in (write_model(tmp_path / "blobs.safetensors", 1, 0), enlarging)
        for event in build(StudioSource.from_file(weights, SAMPLING)).fns.values()
        for block in event.inputs
        if isinstance(block, gr.components.Component) and not isinstance(block, gr.State)
    }
    assert {ImageUpload, PaintableImage} < inputs
    assert inputs - {ImageUpload, PaintableImage} <= {*(gr.Dropdown, gr.Number, gr.Radio, gr.Slider, gr.Textbox)}


@pytest.mark.parametrize("task", ["canvas", "inpaint", "img2img"])
def test_bombs_are_refused_in_one_line_without_memory(client: httpx.Client, bombs: list[bytes], task: str) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = peak_memory()
    for bomb in bombs:
        message = send(client, task, bomb)["error"]
        assert "are over the limit of 25000000" in message
        assert "\n" not in message
    assert peak_memory() - before < 60e6  # decoded: 100 and 256 MB


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "text"])
def test_other_formats_are_refused_under_any_name(client: httpx.Client, kind: str) -> None:
    payload = b"<svg xmlns='http://www.w3.org/2000/svg'/>" if kind == "text" else saved(Image.new("RGB", (8, 8)), kind)
    for name in ("image.png", "image.svg"):
        for task in ("canvas", "inpaint", "img2img"):
            assert "not a PNG, JPEG or WebP file" in send(client, task, payload, name)["error"]


def test_a_damaged_image_is_an_error_in_one_line(client: httpx.Client) -> None:
    payload = png_bytes(Image.fromarray(noise(64, 64, 3).astype(np.uint8)))[:2000]
    for task in ("canvas", "inpaint", "img2img"):
        assert "damaged" in send(client, task, payload)["error"]


def test_an_edit_without_an_image_asks_for_one(client: httpx.Client) -> None:
    for task, empty in (("inpaint", canvas(None)), ("img2img", None)):
        assert "upload one" in trigger(client, named(task), {"imageeditor": empty, "image": empty})["error"]


def test_an_image_inside_the_request_is_refused(client: httpx.Client) -> None:
    for file in ({"path": None, "url": "data:image/png;base64,iVBORw0KGgo="}, {"path": "/etc/hostname"}):
        assert "error" in trigger(client, named("img2img"), {"image": file})
    with pytest.raises(UserError, match="not uploaded"):
        ImageUpload().preprocess(SimpleNamespace(path=None, url="data:image/png;base64,iVBORw0KGgo="))


def test_photographs_are_edited(client: httpx.Client) -> None:
    photograph = Image.fromarray(noise(300, 400, 3).astype(np.uint8)).resize((5600, 4200))
    for kind in ("JPEG", "WEBP"):
        assert "error" not in send(client, "img2img", saved(photograph.resize((1400, 1050)), kind))
    assert "error" not in send(client, "img2img", saved(photograph, "JPEG"))


def test_decoding_keeps_transparency_and_turns_upright() -> None:
    image = Image.fromarray(noise(5, 7, 4).astype(np.uint8), "RGBA")
    assert decode_upload(png_bytes(image)).tobytes() == image.tobytes()
    exif = Image.Exif()
    exif[274] = 6
    turned = decode_upload(saved(image.convert("RGB"), "PNG", exif=exif))
    assert turned.tobytes() == image.convert("RGB").rotate(-90, expand=True).convert("RGBA").tobytes()
    cmyk = decode_upload(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert cmyk.getpixel((4, 4)) == pytest.approx((255, 0, 0, 255), abs=3)


def test_files_sent_ahead_of_an_event_take_bounded_memory() -> None:
    editor = PaintableImage()

    def accept(key: str, kind: str, index: str, payload: bytes) -> None:
        fields = {"id": key, "type": kind, "index": index}
        editor.accept_blobs(SimpleNamespace(data=fields, files=[("blob", payload)]))

    block = bytes(48 * 2**20)
    for number in range(6):
        accept(str(number), "background", "null", block)
        accept(str(number), "composite", "null", block)
    assert [*editor.blob_storage] == ["4", "5"]
    with pytest.raises(UserError):
        accept("5", "layer", str(MAX_LAYERS), b"")
    image = png_bytes(Image.new("RGB", (8, 8)))
    accept("last", "background", "null", image)
    accept("last", "layer", "1", image)
    value = editor.preprocess(SimpleNamespace(id="last"))
    assert value == {"background": image, "layers": [image]}
    assert editor.preprocess(SimpleNamespace(id="last")) == {"background": None, "layers": []}


@pytest.mark.parametrize(
    ("path", "size", "status"),
    [("upload", 65 * 2**20 + 2**10, 413), ("queue/join", 2**20 + 1, 413), ("run/sample", None, 411)],
)
def test_long_requests_are_refused_unread(client: httpx.Client, path: str, size: int | None, status: int) -> None:
    chunks = iter([b"[", b"]"])
    content: Any = bytes(size) if size is not None else chunks
    assert client.post(f"gradio_api/{path}", content=content).status_code == status


@pytest.mark.slow
@pytest.mark.long
def test_four_bombs_at_once_leave_the_server_small(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "blobs.safetensors", 1, 0, classes={"even": 3, "odd": 1})
    [port] = choose_ports(1)
    words = ("ui", "--model", str(weights), "--no-browser", "--port", str(port))
    server = start(tmp_path, *words, DARKROOM_UI_PASSWORD=PASSWORD, OMP_NUM_THREADS="1")
    address = f"http://127.0.0.1:{port}/"
    try:
        wait_until_served(address, server)
        # Under what Pillow refuses by itself (179 million pixels), and above.
        bombs = [png_bomb(13_000), png_bomb(20_000)]
        # The largest that is allowed is decoded, one at a time.
        allowed = png_bomb(round(LIMITS.max_pixels**0.5))
        with logged_in(address) as client, ThreadPoolExecutor(4) as pool:
            before = peak_memory(server.pid)
            for task in ("canvas", "inpaint", "img2img"):
                for output in pool.map(lambda number, task=task: send(client, task, bombs[number % 2]), range(4)):
                    assert "are over the limit" in output["error"]
            assert peak_memory(server.pid) - before < 200e6
            for output in pool.map(lambda _: send(client, "img2img", allowed), range(4)):
                assert "error" not in output
            for output in pool.map(lambda _: send(client, "inpaint", allowed), range(2)):
                assert "the mask keeps nothing" in output["error"]  # for what is opaque is painted
            assert peak_memory(server.pid) - before < 800e6  # a single one takes half of that
    finally:
        server.terminate()
        assert server.wait(20) == 0
