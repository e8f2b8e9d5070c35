"""The studio for a model file, without a browser: its pages, its images, and who may ask for them."""

import importlib.util
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.common.errors import UserError
from diffusion.common.image_grids import png_bytes
from diffusion.families.config import ModelConfig
from diffusion.generation.config import Conditions, read_request
from diffusion.generation.limits import StoppedError
from diffusion.generation.requests import generate_to_folder
from diffusion.process.samplers import sampling_config
from flows.cli.operations_commands import ui
from flows.config import Params
from flows.local_stack.server_process import choose_ports
from flows.sampling.batch_format import encode
from tests.builders.command_line import darkroom, start
from tests.builders.sampling_batches import batch
from tests.builders.shapes import blob
from tests.builders.small_models import CONFIG, write_model
from tests.builders.studio_client import with_header

gr = pytest.importorskip("gradio", reason="the studio needs Gradio: pip install 'darkroom-diffusion[ui]'")
from flows.studio.app import USER, build, launch  # noqa: E402
from flows.studio.edit import editor_files, enlarge_to_canvas  # noqa: E402
from flows.studio.generate import StudioSource  # noqa: E402

SAMPLING = sampling_config(sampler="dpmpp_2m", steps=3, compute_batch=8)
PASSWORD = "test-secret"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_model(tmp_path / "blobs.safetensors", 1, 0, classes={"even": 3, "odd": 1})


@pytest.fixture
def source(weights: Path) -> StudioSource:
    return StudioSource.from_file(weights, SAMPLING)


@pytest.fixture
def address(source: StudioSource) -> Iterator[str]:
    page = build(source)
    yield launch(page, PASSWORD)
    page.close(verbose=False)


def labels(page: gr.Blocks, kind: type) -> list[str]:
    return [each.label for each in page.blocks.values() if isinstance(each, kind)]


def test_only_tabs_and_inputs_with_effect_are_shown(source: StudioSource, tmp_path: Path) -> None:
    page = build(source)
    assert labels(page, gr.Tab) == ["Generate", "Edit", "Inpaint", "Img2img", "Interpolate"]
    [classes, *_] = [each for each in page.blocks.values() if isinstance(each, gr.Dropdown) and each.label == "Class"]
    assert {value for _, value in classes.choices} == {"", "even", "odd"}
    assert "Prompt" not in labels(page, gr.Textbox)
    config = ModelConfig.model_validate(CONFIG.model_dump() | {"low_resolution": 4, "conditional": False})
    enlarging = build(
        StudioSource.from_file(write_model(tmp_path / "large.safetensors", 1, 0, config=config), SAMPLING)
    )
    assert labels(enlarging, gr.Tab) == ["Edit", "Upscale"]
    assert not {"Class", "Size"} & {*labels(enlarging, gr.Dropdown)}


def numbers(page: gr.Blocks, title: str) -> dict[str, Any]:
    """The numbers and sliders of a tab, by label."""
    [tab] = [each for each in page.blocks.values() if isinstance(each, gr.Tab) and each.label == title]
    found, blocks = dict[str, Any](), [*tab.children]
    while blocks:
        block = blocks.pop()
        blocks += getattr(block, "children", [])
        if isinstance(block, gr.Number | gr.Slider):
            found[block.label] = block
    return found


def test_numbers_begin_with_the_defaults_of_the_model(source: StudioSource, weights: Path, tmp_path: Path) -> None:
    # The browser shows and sends 0 for an empty number once it is seen.
    values = [each.value for each in build(source).blocks.values() if isinstance(each, gr.Number | gr.Slider)]
    assert None not in values
    plain = numbers(build(source), "Generate")
    assert (plain["Steps"].value, plain["Guidance"].value) == (3, 1)
    guided = with_header(weights, SAMPLING, guidance=4.5, guidance_interval=(0.3, 5.0))
    shown = numbers(build(guided), "Inpaint")
    assert (shown["Steps"].value, shown["Guidance"].value) == (3, 4.5)


def test_a_request_sends_the_guidance_that_is_shown(source: StudioSource, weights: Path, tmp_path: Path) -> None:
    guided = with_header(weights, SAMPLING, guidance=4.5, guidance_interval=(0.3, 5.0))
    fields = {"label": "odd", "steps": 3, "sampler": "dpmpp_2m"}

    def pixels(guidance: float | None) -> list[bytes]:
        return [Image.open(path).tobytes() for path in guided.generate(fields | {"guidance": guidance}).paths]

    assert pixels(4.5) == pixels(None)
    assert len({*pixels(4.5), *pixels(2), *pixels(1)}) == 3


def test_what_has_no_effect_is_not_shown(weights: Path, tmp_path: Path) -> None:
    config = ModelConfig.model_validate(CONFIG.model_dump() | {"conditional": False})
    plain = write_model(tmp_path / "plain.safetensors", 1, 0, config=config)
    assert {*numbers(build(StudioSource.from_file(plain, SAMPLING)), "Generate")} == {"Images", "Steps", "Seed"}
    student = write_model(
        tmp_path / "student.safetensors", 1, 0, classes={"even": 3, "odd": 1}, training={"student": {"steps": 2}}
    )
    page = build(StudioSource.from_file(student, SAMPLING))
    assert {*numbers(page, "Generate")} == {"Images", "Seed"}
    assert "Sampler" not in labels(page, gr.Dropdown)
    square, several = {(8, 8): 4}, {(8, 8): 4, (8, 16): 2}
    for shapes, is_shown in ((square, False), (several, True)):
        page = build(with_header(weights, SAMPLING, shapes=shapes))
        assert ("Size" in labels(page, gr.Dropdown)) is is_shown


def test_a_download_carries_the_lineage_of_images_on_s3(source: StudioSource, tmp_path: Path) -> None:
    origin = {"model": "models:/blobs/3", "run_id": "f" * 32, "content_digest": "0" * 64}
    registered = StudioSource(source.model, "models:/blobs/3", origin, SAMPLING)
    [path] = registered.generate({"label": "odd", "seed": 7}).paths
    planned = batch(1)
    on_s3, _ = encode(planned, 0, torch.zeros(1, 8, 8, dtype=torch.uint8), None, Conditions(labels=("odd",)))

    def texts(png: bytes) -> dict[str, str]:
        image = Image.open(io.BytesIO(png))
        return {name: str(text) for name, text in image.info.items() if name.startswith(("darkroom:", "XML"))}

    local, stored = texts(path.read_bytes()), texts(on_s3)
    assert local.keys() == stored.keys() | {"darkroom:task"}
    assert local["darkroom:label"] == stored["darkroom:label"] == "odd"
    assert local["darkroom:model"] == "models:/blobs/3"
    assert (local["darkroom:seed"], local["darkroom:index"]) == ("7", "0")
    assert path.name == "blobs-3-seed7-0.png"


def test_a_generation_is_stopped_by_its_page(source: StudioSource) -> None:
    calls = list[int]()

    def is_abandoned() -> bool:
        calls.append(1)
        return len(calls) > 40

    with pytest.raises(StoppedError):
        source.generate({"steps": 10_000}, is_abandoned=is_abandoned)


@pytest.mark.slow
def test_images_are_the_files_of_the_command_line(source: StudioSource, weights: Path, tmp_path: Path) -> None:
    options = ("--set", "sampling.sampler=dpmpp_2m", "--set", "sampling.steps=3", "--set", "sampling.compute_batch=8")
    result = darkroom(
        tmp_path, "sample", "--model", str(weights), "--label", "odd", "--seed", "7", "--count", "3", *options,
        "--out", str(tmp_path / "command"), OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    batch = source.generate({"task": "sample", "label": "odd", "seed": 7, "count": 3})
    assert [path.read_bytes() for path in batch.paths] == [
        path.read_bytes() for path in sorted((tmp_path / "command").glob("0*.png"))
    ]


def test_a_painted_hole_is_filled_as_by_the_command(source: StudioSource, weights: Path, tmp_path: Path) -> None:
    image = blob(3).convert("RGB").resize((8, 8))
    layer = Image.new("RGBA", (8, 8))
    layer.paste((41, 121, 255, 200), (2, 3, 6, 7))
    hole = np.zeros((8, 8), np.uint8)
    hole[3:7, 2:6] = 255
    image.save(tmp_path / "image.png")
    Image.fromarray(hole).save(tmp_path / "mask.png")
    request = read_request({"task": "inpaint", "count": 2}, tmp_path / "image.png", tmp_path / "mask.png")
    result = generate_to_folder(weights, request, SAMPLING, tmp_path / "out")
    painted = editor_files({"background": png_bytes(image.convert("RGBA")), "layers": [png_bytes(layer)]}, [(8, 8)])
    batch = source.generate({"task": "inpaint", "count": 2} | painted)
    expected = [path.read_bytes() for path in sorted(result.folder.glob("0*.png"))]
    assert [path.read_bytes() for path in batch.paths] == expected
    # Painting on the enlarged image marks the same pixels.
    large = enlarge_to_canvas(image.convert("RGBA")), layer.resize((512, 512), 0)
    files = {"background": png_bytes(large[0]), "layers": [png_bytes(large[1])]}
    again = source.generate({"task": "inpaint", "count": 2} | editor_files(files, [(8, 8)]))
    assert [path.read_bytes() for path in again.paths] == expected


@pytest.mark.parametrize(
    "fields",
    [
        *({"label": "neither"}, {"prompt": "a cat"}, {"count": 65}, {"seed": -1}, {"task": "upscale"}),
        *({"task": "inpaint"}, {"steps": "0"}, {"steps": "many"}, {"steps": "2.5"}, {"guidance": "nan"}),
    ],
)
def test_what_the_model_cannot_do_is_an_error(source: StudioSource, fields: dict[str, object]) -> None:
    with pytest.raises(UserError):
        source.generate({"task": "sample"} | fields)


def test_a_request_takes_no_more_work_or_time_than_allowed(
    source: StudioSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="DARKROOM_MAX_REQUEST_MEGAPIXELS"):
        source.generate({"task": "sample", "count": 64, "steps": 10_000, "size": "16x16", "sampler": "heun"})
    monkeypatch.setenv("DARKROOM_MAX_REQUEST_SECONDS", "0.5")
    with pytest.raises(StoppedError):
        source.generate({"task": "sample", "count": 64, "steps": 10_000})


def test_nothing_is_served_without_the_password(address: str) -> None:
    with httpx.Client(base_url=address) as client:
        for path in ("config", "gradio_api/info", "gradio_api/queue/data?session_hash=x", "gradio_api/file=/etc/hosts"):
            assert client.get(path).status_code == 401
        assert client.post("gradio_api/upload", files={"files": b"x"}).status_code == 401
        assert client.post("gradio_api/call/sample", json={"data": []}).status_code == 401
        wrong = client.post("login", data={"username": USER, "password": "wrong horse"})
        assert wrong.status_code == 400
        assert client.get("config").status_code == 401
        assert client.post("login", data={"username": USER, "password": PASSWORD}).status_code == 200
        config = client.get("config")
        assert config.status_code == 200
        assert config.json()["analytics_enabled"] is False
        # Other files of this machine stay closed to who has the password.
        assert client.get("gradio_api/file=/etc/hosts").status_code == 403
        assert client.get(f"gradio_api/file={Path.cwd()}/pyproject.toml").status_code == 403


def test_the_page_generates_for_who_is_logged_in(address: str, source: StudioSource) -> None:
    from gradio_client import Client

    client = Client(address, auth=(USER, PASSWORD), verbose=False)
    gallery, note, *_ = client.predict("odd", 2, 7, 3, "dpmpp_2m", 1, api_name="/sample")
    expected = source.generate({"task": "sample", "label": "odd", "seed": 7, "count": 2})
    assert [Path(each["image"]).read_bytes() for each in gallery] == [path.read_bytes() for path in expected.paths]
    assert "seed 7" in note


def test_a_taken_port_and_a_missing_gradio_are_errors(
    address: str, source: StudioSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError):
        launch(build(source), PASSWORD, port=int(address.rstrip("/").rpartition(":")[2]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        ui(Params())
    assert error.value.exit_code == 2
    assert "darkroom-diffusion[ui]" in str(error.value)


@pytest.mark.slow
def test_it_ends_soon_while_it_generates(weights: Path) -> None:
    from gradio_client import Client

    [port] = choose_ports(1)
    words = ("--model", str(weights), "--port", str(port), "--no-browser", "--set", "sampling.steps=10000")
    process = start(weights.parent, "ui", *words, DARKROOM_UI_PASSWORD=PASSWORD, TMPDIR=str(weights.parent))
    try:
        assert process.stderr is not None
        assert str(port) in process.stderr.readline()
        client = Client(f"http://127.0.0.1:{port}", auth=(USER, PASSWORD), verbose=False)
        job = client.submit("odd", 64, 7, 10_000, "dpmpp_2m", 1, api_name="/sample")
        time.sleep(3)
        assert not job.done()
        begun = time.monotonic()
        process.terminate()
        process.wait(30)
        assert time.monotonic() < begun + 3
        assert not [*weights.parent.glob("darkroom-ui-*")]
    finally:
        process.kill()
        process.communicate()
