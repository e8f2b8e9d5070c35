"""Images from images: on the command line with a model file, and through the model that MLflow loads."""

import base64
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from mlflow.models.utils import _enforce_schema
from PIL import Image

from diffusion.checkpoints import load_model
from diffusion.common.files import sha256_bytes, sha256_file
from diffusion.common.image_grids import SYNTHETIC
from diffusion.generation.config import REQUESTS
from diffusion.generation.generate import sample
from diffusion.process.samplers import sampling_config
from flows.registry.model_versions import SIGNATURE
from flows.registry.pyfunc_model import ServedModel
from tests.builders.command_line import CommandLine
from tests.builders.small_models import CONFIG, write_model

QUICK = ["--set", "sampling.steps=3", "--set", "sampling.compute_batch=4"]


@pytest.fixture
def darkroom(folder: Path, monkeypatch: pytest.MonkeyPatch, command_line: CommandLine) -> CommandLine:
    monkeypatch.chdir(folder)
    return command_line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model.safetensors", seed=0, images=0)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "face.png")
    hole = np.zeros((8, 8), np.uint8)
    hole[2:5, 2:5] = 255
    Image.fromarray(hole).save(tmp_path / "hole.png")
    (tmp_path / "sizes.csv").write_text("size\n8x8\n")
    return tmp_path


def run_json(darkroom: CommandLine, *words: str) -> dict[str, Any]:
    result: dict[str, Any] = darkroom.json(*words, "--model", "model.safetensors", *QUICK)
    return result


def digests(darkroom: CommandLine, *words: str) -> list[str]:
    """Of the images that a command makes."""
    rows = json.loads(Path(run_json(darkroom, *words)["about"]).read_text())["images"]
    return [row["pixels_sha256"] for row in rows]


@pytest.mark.parametrize(
    "words",
    [
        ("edit", "inpaint", "face.png", "--mask", "hole.png", "--count", "3"),
        ("edit", "img2img", "face.png", "--strength", "0.5", "--count", "3"),
        ("edit", "interpolate", "5", "--count", "3"),
        ("sample", "--count", "3"),
    ],
    ids=lambda words: next(word for word in words if word != "edit"),
)
def test_a_model_file_answers_without_servers_and_again_alike(
    darkroom: CommandLine, folder: Path, words: tuple[str, ...]
) -> None:
    task = words[1] if words[0] == "edit" else words[0]
    result = run_json(darkroom, *words)
    place = folder / result["folder"]
    about = json.loads((place / "request.json").read_text())
    assert about["model"]["weights_sha256"] == sha256_file(folder / "model.safetensors")
    assert about["request"]["task"] == task
    assert [row["index"] for row in about["images"]] == [0, 1, 2]
    for row in about["images"]:
        assert sha256_file(place / row["file"]) == row["sha256"]
        image = Image.open(place / row["file"])
        assert sha256_bytes(image.tobytes()) == row["pixels_sha256"]
        assert SYNTHETIC in image.text["XML:com.adobe.xmp"]
        assert image.text["darkroom:task"] == task
    assert Image.open(folder / result["grid"]).size > (100, 100)
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    assert run_json(darkroom, *words) == result
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before


def test_upscaled_image_is_shown_beside_its_original(darkroom: CommandLine, folder: Path) -> None:
    config = CONFIG.model_copy(update={"low_resolution": 4, "conditional": False})
    write_model(folder / "model.safetensors", seed=0, images=0, config=config)
    result = run_json(darkroom, "edit", "upscale", "face.png", "--count", "2")
    assert Image.open(folder / result["folder"] / "00000001.png").size == (16, 16)
    assert Image.open(folder / result["grid"]).size[0] > 2 * 16


def test_upscaling_takes_the_noise_levels_of_the_model(darkroom: CommandLine, folder: Path) -> None:
    config = CONFIG.model_copy(update={"low_resolution": 4, "conditional": False})
    write_model(folder / "model.safetensors", seed=0, images=0, config=config)
    upscale = ("edit", "upscale", "face.png")
    options = ("--set", "model.low_resolution=4", "--set", "model.conditional=false")
    others = digests(darkroom, *upscale, "--set", "sampling.sigma_max=80")
    assert digests(darkroom, *upscale) == digests(darkroom, *upscale, *options) != others


def test_labels_take_turns_in_images_of_a_model_file(darkroom: CommandLine, folder: Path) -> None:
    write_model(folder / "model.safetensors", seed=0, images=0, classes={"cat": 1, "dog": 1})
    four, cat, dog = ("sample", "--count", "4"), ("--label", "cat"), ("--label", "dog")
    cats, dogs = digests(darkroom, *four, *cat), digests(darkroom, *four, *dog)
    for _ in range(2):
        assert digests(darkroom, *four, *cat, *dog) == [cats[0], dogs[1], cats[2], dogs[3]]
    assert not {*cats} & {*dogs}


def test_requests_that_differ_lie_in_folders_of_their_own(darkroom: CommandLine) -> None:
    one = run_json(darkroom, "edit", "img2img", "face.png", "--count", "1")
    other = run_json(darkroom, "edit", "img2img", "face.png", "--count", "1", "--strength", "0.3")
    assert one["folder"] != other["folder"]
    assert run_json(darkroom, "edit", "img2img", "face.png", "--count", "1", "--out", "mine")["folder"] == "mine"


def test_a_folder_takes_the_answer_to_one_request_only(darkroom: CommandLine, folder: Path) -> None:
    run_json(darkroom, "sample", "--count", "3", "--out", "mine")
    for out, words in (("mine", "holds the answer to another request"), ("face.png", "is a file")):
        assert words in darkroom.mistake("sample", "--count", 2, "--out", out, "--model", "model.safetensors", *QUICK)
    run_json(darkroom, "sample", "--count", "3", "--out", "mine")
    assert len(list((folder / "mine").glob("0*.png"))) == 3


def test_images_name_weights_and_not_their_path(darkroom: CommandLine, folder: Path) -> None:
    result = run_json(darkroom, "sample", "--count", "1")
    image = Image.open(folder / result["folder"] / "00000000.png")
    assert image.text["darkroom:model"] == f"sha256:{sha256_file(folder / 'model.safetensors')}"


def test_stored_sampling_settings_are_those_that_were_used(darkroom: CommandLine, folder: Path) -> None:
    """Guidance that leads nowhere is not done, and so is not said."""
    (folder / "params.yaml").write_text("sampling: {guidance: 3}\n")
    result = run_json(darkroom, "sample", "--count", "1")
    assert "guidance" not in json.loads((folder / result["about"]).read_text())["sampling"]


@pytest.mark.slow
@pytest.mark.parametrize("verb", [("sample",), ("edit", "img2img", "face.png")])
def test_settings_of_the_command_line_without_effect_are_an_error(
    darkroom: CommandLine, folder: Path, verb: tuple[str, ...]
) -> None:
    write_model(folder / "student.safetensors", seed=0, images=0, training={"student": {"steps": 2}})
    for setting, model in (
        ("sampling.guidance=3", "model.safetensors"),
        ("sampling={guidance: 3}", "model.safetensors"),
        ("sampling.steps=32", "student.safetensors"),
        ("sampling.sampler=heun", "student.safetensors"),
        ("sampling={sampler: heun, churn: {amount: 5}}", "student.safetensors"),
    ):
        message = darkroom.mistake(*verb, "--count", "1", "--model", model, "--set", setting)
        assert setting.partition("=")[0] in message
    assert not (folder / "samples").exists()
    for setting in ("sampling.guidance=1", "sampling.guidance=null", "sampling.sigma_max=20", "sampling={}"):
        darkroom(*verb, "--count", "1", "--model", "student.safetensors", "--set", setting)
    churn = ["--set", "sampling.sampler=heun", "--set", "sampling.churn.amount=5"]
    darkroom(*verb, "--count", "1", "--model", "model.safetensors", *churn)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("edit", "img2img", "nothing.png"), "nothing.png cannot be read (No such file or directory)"),
        (("edit", "img2img", "face.png", "--label", "cat"), "trained without classes"),
        (
            ("edit", "inpaint", "face.png", "--mask", "model.safetensors"),
            "model.safetensors cannot be read (it is not an image",
        ),
        (("edit", "interpolate", "0"), "from seed 0 to seed 0: give two seeds"),
        (("edit", "upscale", "face.png"), "not trained to upscale"),
        (("edit", "img2img", "face.png", "--strength", "2"), "--strength 2"),
        (("edit", "img2img", "face.png", "--strength", "1"), "--strength 1"),
        (("edit", "inpaint", "face.png", "--mask", "hole.png", "--strength", "0"), "--strength 0"),
        (("model", "explain"), "--model model.safetensors is a file"),
        (("sample", "--to", "s3://bucket"), "use --out FOLDER"),
        (("sample", "--requests", "sizes.csv"), "--size"),
        (("sample", "--label", "cat", "--label", "dog"), "trained without classes"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    darkroom: CommandLine, folder: Path, words: tuple[str, ...], message: str
) -> None:
    assert message in darkroom.mistake(*words, "--model", "model.safetensors", *QUICK)
    assert not (folder / "samples").exists()


@pytest.fixture
def served(folder: Path) -> Any:
    return serve(folder)


def serve(folder: Path) -> Any:
    model = ServedModel()
    config = sampling_config(steps=3, compute_batch=4).model_dump(mode="json")
    # What MLflow hands over: where the weights lie, and the configuration that was logged.
    context: Any = SimpleNamespace(artifacts={"weights": str(folder / "model.safetensors")}, model_config=config)
    model.load_context(context)
    return model


def test_served_model_answers_a_table_of_tasks(folder: Path, served: Any) -> None:
    image, mask = (base64.b64encode((folder / name).read_bytes()).decode() for name in ("face.png", "hole.png"))
    table = pd.DataFrame(
        {
            "task": ["sample", "img2img", "inpaint", "interpolate"],
            "seed": [3, 3, 3, 3],
            "count": [2.0, np.nan, 1.0, 2.0],
            "to_seed": [np.nan, np.nan, np.nan, 4.0],
            "image": [None, image, image, None],
            "mask": [None, None, mask, None],
            "strength": [np.nan, 0.5, np.nan, np.nan],
        },
        index=[7, 7, 7, 7],
    )
    out = served.predict(None, table)
    assert out["request"].tolist() == [0, 0, 1, 2, 3, 3]
    assert out["index"].tolist() == [0, 1, 0, 0, 0, 1]
    images = sample(load_model(folder / "model.safetensors"), [1], 3, sampling_config(steps=3, compute_batch=4))
    (folder / "out.png").write_bytes(out["png"][1])
    assert np.array_equal(np.asarray(Image.open(folder / "out.png")), images[0, 0].numpy())


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"strength": [np.nan, 0.5]}, "row 1: strength means nothing to sample, only to inpaint, img2img"),
        ({"count": [1, [1, 2]]}, r"row 1: count: .*integer"),
        ({"label": [None, "cat"]}, "row 1: the model was trained without classes"),
        ({"task": ["sample", "img2img"], "image": [None, "å"]}, "row 1: image is not in base64"),
        ({"count": [1.0, 4096.0]}, "4097 images in one table"),
    ],
)
def test_a_row_that_cannot_be_answered_is_named(served: Any, table: dict[str, list[Any]], words: str) -> None:
    with pytest.raises(MlflowException, match=words):
        served.predict(None, pd.DataFrame({"seed": [0, 0], **table}))


@pytest.mark.parametrize(
    ("records", "status"),
    [
        ([{"prompts": "a cat"}], 400),  # which MLflow drops
        ([{}], 400),
        ([], 400),
        ([{"seed": 1}, {"seed": None}], 400),
        ([{"seed": 1}] * 4097, 400),
        ([{"count": 4096, "steps": 10_000}], 400),
        ([{"task": "img2img", "image": "A" * 100_000_000}], 400),
        ([{"count": 64, "steps": 10_000}], 504),
    ],
    ids=["unknown", "empty", "none", "null", "rows", "work", "file", "time"],
)
def test_a_table_is_limited_however_the_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, records: list[dict[str, Any]], status: int
) -> None:
    monkeypatch.setenv("DARKROOM_MAX_REQUEST_SECONDS", "1")
    served = serve(folder)
    table = _enforce_schema(pd.DataFrame(records), SIGNATURE.inputs)
    with pytest.raises(MlflowException) as error:
        served.predict(None, table)
    assert error.value.get_http_status_code() == status


def test_a_busy_model_refuses_what_cannot_wait(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_MAX_WAITING_REQUESTS", "0")
    served = serve(folder)
    with served.queue.take_place(), pytest.raises(MlflowException) as error:
        served.predict(None, pd.DataFrame({"seed": [0]}))
    assert error.value.get_http_status_code() == 429
    assert len(served.predict(None, pd.DataFrame({"seed": [0]}))) == 1


def test_the_signature_has_every_field_of_a_request() -> None:
    assert {column.name for column in SIGNATURE.inputs} == {
        name for request in REQUESTS.values() for name in request.model_fields
    }


@pytest.mark.parametrize(
    "table",
    [
        {"seed": [5, 6], "index": [39, 2], "guidance": [3, 2]},
        {
            "seed": [5, 6],
            "index": [39, None],
            "strength": [None, 0.5],
            "task": [None, "img2img"],
            "image": [None, "aa=="],
        },
    ],
)
def test_whole_numbers_and_empty_cells_pass_the_signature(table: dict[str, list[Any]]) -> None:
    passed = _enforce_schema(pd.DataFrame(table), SIGNATURE.inputs)
    assert passed.to_dict("list").keys() == table.keys()
