"""The studio for a model file, without a browser: its tabs, its images, and who may ask for them."""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from diffusion.common.errors import UserError
from diffusion.common.image_grids import png_bytes
from diffusion.generation.config import read_request
from diffusion.generation.limits import StoppedError
from diffusion.generation.requests import generate_to_folder
from diffusion.models.config import ModelConfig
from diffusion.process.samplers import sampling_config
from flows.cli.operations_commands import ui
from flows.config import Params
from flows.local_stack.server_process import choose_ports
from tests.builders.command_line import darkroom
from tests.builders.shapes import blob
from tests.builders.small_models import CONFIG, write_model

gr = pytest.importorskip("gradio", reason="the studio needs Gradio: pip install 'darkroom-diffusion[ui]'")
from flows.studio.app import USER, build, launch  # noqa: E402
from flows.studio.generation import Source, editor_files, enlarge_to_canvas  # noqa: E402

SAMPLING = sampling_config(sampler="dpmpp_2m", steps=3, compute_batch=8)
PASSWORD = "test-secret"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_model(tmp_path / "blobs.safetensors", 1, 0, classes={"even": 3, "odd": 1})


@pytest.fixture
def source(weights: Path) -> Source:
    return Source.from_file(weights, SAMPLING)


@pytest.fixture
def address(source: Source) -> Iterator[str]:
    page = build(source)
    yield launch(page, PASSWORD)
    page.close(verbose=False)


def labels(page: gr.Blocks, kind: type) -> list[str]:
    return [each.label for each in page.blocks.values() if isinstance(each, kind)]


def test_only_tabs_and_inputs_that_the_model_can_use_are_shown(source: Source, tmp_path: Path) -> None:
    page = build(source)
    assert labels(page, gr.Tab) == ["Generate", "Inpaint", "Img2img", "Interpolate"]
    [classes, *_] = [each for each in page.blocks.values() if isinstance(each, gr.Dropdown) and each.label == "Class"]
    assert {value for _, value in classes.choices} == {"", "even", "odd"}
    assert "Prompt" not in labels(page, gr.Textbox)
    config = ModelConfig.model_validate(CONFIG.model_dump() | {"low_resolution": 4, "conditional": False})
    enlarging = build(Source.from_file(write_model(tmp_path / "large.safetensors", 1, 0, config=config), SAMPLING))
    assert labels(enlarging, gr.Tab) == ["Upscale"]
    assert "Class" not in labels(enlarging, gr.Dropdown)


def test_no_number_is_empty_and_options_left_out_are_as_configured(source: Source) -> None:
    # The browser shows and sends 0 for an empty number once it is seen.
    numbers = [each for each in build(source).blocks.values() if isinstance(each, gr.Number | gr.Slider)]
    assert {each.label for each in numbers} >= {"Seed", "Images"}
    assert None not in [each.value for each in numbers]
    paths, note = source.generate({"steps": "", "guidance": "", "label": "odd"})
    assert note.endswith("dpmpp_2m, 3 steps")
    same_paths, _ = source.generate({"steps": "3", "label": "odd"})
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in same_paths]


def test_images_are_the_files_of_the_command_line(source: Source, weights: Path, tmp_path: Path) -> None:
    options = ("--set", "sampling.sampler=dpmpp_2m", "--set", "sampling.steps=3", "--set", "sampling.compute_batch=8")
    result = darkroom(
        tmp_path, "sample", "--model", str(weights), "--label", "odd", "--seed", "7", "--count", "3", *options,
        "--out", str(tmp_path / "command"), OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    paths, _ = source.generate({"task": "sample", "label": "odd", "seed": 7, "count": 3})
    assert [path.read_bytes() for path in paths] == [
        path.read_bytes() for path in sorted((tmp_path / "command").glob("0*.png"))
    ]


def test_a_painted_hole_is_filled_as_by_the_command_with_a_mask(source: Source, weights: Path, tmp_path: Path) -> None:
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
    paths, _ = source.generate({"task": "inpaint", "count": 2} | painted)
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in sorted(result.folder.glob("0*.png"))]
    # Painting on the enlarged image marks the same pixels.
    large = enlarge_to_canvas(image.convert("RGBA")), layer.resize((512, 512), 0)
    files = {"background": png_bytes(large[0]), "layers": [png_bytes(large[1])]}
    again, _ = source.generate({"task": "inpaint", "count": 2} | editor_files(files, [(8, 8)]))
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]


@pytest.mark.parametrize(
    "fields",
    [
        *({"label": "neither"}, {"prompt": "a cat"}, {"count": 65}, {"seed": -1}, {"task": "upscale"}),
        *({"task": "inpaint"}, {"steps": "0"}, {"steps": "many"}, {"steps": "2.5"}, {"guidance": "nan"}),
    ],
)
def test_what_the_model_cannot_do_is_an_error_of_the_user(source: Source, fields: dict[str, object]) -> None:
    with pytest.raises(UserError):
        source.generate({"task": "sample"} | fields)


def test_a_request_takes_no_more_work_or_time_than_allowed(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="DARKROOM_MAX_REQUEST_MEGAPIXELS"):
        source.generate({"task": "sample", "count": 64, "steps": 10_000, "size": "16x16", "sampler": "heun"})
    monkeypatch.setenv("DARKROOM_MAX_REQUEST_SECONDS", "0.5")
    with pytest.raises(StoppedError):
        source.generate({"task": "sample", "count": 64, "steps": 10_000})


def test_nothing_is_served_without_the_password(address: str) -> None:
    with httpx.Client(base_url=address) as client:
        for path in (
            "config",
            "gradio_api/info",
            "gradio_api/queue/data?session_hash=x",
            "gradio_api/file=/etc/hosts",
        ):
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


def test_the_page_generates_for_who_is_logged_in(address: str, source: Source) -> None:
    from gradio_client import Client

    client = Client(address, auth=(USER, PASSWORD), verbose=False)
    gallery, note, *_ = client.predict("odd", "", 7, 2, "", 3, None, api_name="/sample")
    expected, _ = source.generate({"task": "sample", "label": "odd", "seed": 7, "count": 2})
    assert [Path(each["image"]).read_bytes() for each in gallery] == [path.read_bytes() for path in expected]
    assert "seed 7" in note


def test_a_taken_port_and_a_missing_gradio_are_errors_of_the_user(
    address: str, source: Source, monkeypatch: pytest.MonkeyPatch
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
    command = [sys.executable, "-c", "from flows.cli import main; main()", "ui", "--model", str(weights)]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--no-browser"],
        env=os.environ | {"DARKROOM_UI_PASSWORD": PASSWORD, "TMPDIR": str(weights.parent)},
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        assert str(port).encode() in process.stderr.readline()
        client = Client(f"http://127.0.0.1:{port}", auth=(USER, PASSWORD), verbose=False)
        job = client.submit("odd", "", 7, 64, "", 10_000, None, api_name="/sample")
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
