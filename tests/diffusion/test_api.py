"""The Python API: the images are those of the command line, and what it writes the command line goes on with."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import diffusion
from diffusion.common.errors import UserError
from diffusion.common.files import sha256_file
from diffusion.families.config import ModelConfig
from tests.builders import ROOT
from tests.builders.command_line import CommandLine
from tests.builders.small_models import write_model

Darkroom = Callable[..., dict[str, Any]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_model(tmp_path / "model.safetensors", seed=0, images=0)
    small = ModelConfig(width=16, channel_mult=(1,), blocks=1, attention=(), heads=1, patch=2, low_resolution=4)
    write_model(tmp_path / "enlarging.safetensors", seed=0, images=0, config=small)
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (8, 8), np.uint8)).save(tmp_path / "face.png")
    Image.fromarray(generator.integers(0, 256, (4, 4), np.uint8)).save(tmp_path / "small.png")
    hole = np.zeros((8, 8), np.uint8)
    hole[2:5, 2:5] = 255
    Image.fromarray(hole).save(tmp_path / "hole.png")
    (tmp_path / "images").mkdir()
    for number, pixels in enumerate(generator.integers(0, 256, (120, 8, 8), np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def darkroom(folder: Path, command_line: CommandLine) -> Darkroom:
    return command_line.json


@pytest.mark.parametrize(
    ("words", "generate"),
    [
        ("sample --count 3 --seed 7", lambda model: model.generate(count=3, seed=7)),
        ("sample --seed 7 --count 1 --set sampling.steps=3", lambda model: model.generate(seed=7, steps=3)),
        (
            "edit inpaint face.png --mask hole.png --method pigdm --count 2",
            lambda model: model.inpaint("face.png", "hole.png", 2, method="pigdm"),
        ),
        (
            "edit img2img face.png --strength 0.5 --count 2",
            lambda model: model.img2img(Image.open("face.png"), 2, strength=0.5),
        ),
        ("edit interpolate 9 --seed 3 --count 4", lambda model: model.interpolate(3, 9, 4)),
    ],
)
def test_images_are_those_of_the_command_line(
    folder: Path, darkroom: Darkroom, words: str, generate: Callable[[diffusion.ImageGenerator], list[Image.Image]]
) -> None:
    images = generate(diffusion.load("model.safetensors", compute_batch=4))
    result = darkroom(
        *words.split(), "--model", "model.safetensors", "--set", "sampling.compute_batch=4", "--out", "out"
    )
    files = sorted((folder / "out").glob("0*.png"))
    assert len(images) == len(files) == result["count"]
    for image, file in zip(images, files, strict=True):
        assert (image.size, image.tobytes()) == ((8, 8), Image.open(file).tobytes())


def test_image_may_be_path_bytes_or_pillow(folder: Path) -> None:
    model = diffusion.load("enlarging.safetensors", compute_batch=4, steps=3)
    assert model.tasks == ("upscale",)
    kinds = [Path("small.png"), "small.png", (folder / "small.png").read_bytes(), Image.open("small.png")]
    first, *others = (model.upscale(kind, seed=1)[0].tobytes() for kind in kinds)
    assert len(first) == 8 * 8
    assert set(others) == {first}


def test_an_image_of_pillow_is_turned_as_its_file_says(folder: Path) -> None:
    image = Image.open("face.png")
    image.getexif()[ExifTags.Base.Orientation] = 6
    image.save("turned.jpg", quality=100, exif=image.getexif())
    model = diffusion.load("model.safetensors", compute_batch=4, steps=3)
    turned, read = (model.img2img(kind, strength=0.1) for kind in (Image.open("turned.jpg"), "turned.jpg"))
    assert turned[0].tobytes() == read[0].tobytes()


def test_restarting_without_the_data_set_keeps_the_run(folder: Path) -> None:
    checkpoint = folder / "runs" / "missing" / "checkpoints" / "1.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    with pytest.raises(UserError):
        diffusion.train("missing", minutes=1, restart=True)
    assert checkpoint.is_file()


@pytest.mark.slow
def test_run_of_python_goes_on_with_the_command_line(folder: Path, darkroom: Darkroom) -> None:
    data = diffusion.ingest("images", "noise", size=8, held_out=0.3)
    assert data.kept == 120
    network = {"width": 16, "channel_mult": [1], "attention": [], "heads": 1}
    quick = {"batch_size": 16, "images": 64, "warmup_images": 16, "checkpoints": 1, "cpu_threads": 1}
    run = diffusion.train("noise", model=network, sampling={"steps": 3}, **quick)
    assert run.final == Path("runs/noise/final.safetensors")
    sections = [f"model.{name}={json.dumps(value)}" for name, value in network.items()]
    sections += [f"training.{name}={value}" for name, value in quick.items()]
    settings = [word for each in sections for word in ("--set", each)]
    assert darkroom("train", "--local", "--dataset", "noise", *settings)["train_key"] == run.train_key

    report = diffusion.evaluate("noise", samples=20, guidance=None, sampling={"steps": 3})
    assert report.best.images == 64
    single = Path("reports/noise/models", sha256_file(run.final)[:8])
    assert Path("reports/noise/report.html").is_file()
    assert not single.exists()
    before = Path("reports/noise/evaluation.json").read_bytes()
    options = ["--set", "sampling.steps=3", "--set", "evaluation.samples=20"]
    darkroom("evaluate", "--local", "--dataset", "noise", "--model", str(run.final), *options)
    of_command_line = (single / "metrics.json").read_bytes()
    (single / "metrics.json").unlink()
    diffusion.evaluate("noise", run.final, samples=20, sampling={"steps": 3})
    assert (single / "metrics.json").read_bytes() == of_command_line
    assert Path("reports/noise/evaluation.json").read_bytes() == before
    model = diffusion.load(run.final)
    assert repr(model).startswith("<ddpm of noise: 8×8×1")

    with pytest.raises(UserError, match=r"runs/noise.*learning_rate"):
        diffusion.train("noise", model=network, learning_rate=1e-4, **quick)

    distillation = {"steps": 2, "images": 32}
    student = diffusion.distill("noise", run.final, training=quick, **distillation)
    assert student.final == Path("runs/noise-student/final.safetensors")
    assert diffusion.load(student.final).model.header.student_steps == 2
    settings += [f"--set=distillation.{name}={value}" for name, value in distillation.items()]
    teacher = f"--set=distillation.teacher={run.final}"
    assert darkroom("distill", "--local", "--dataset", "noise", teacher, *settings)["train_key"] == student.train_key

    found = diffusion.curate("noise", dry_run=True, min_brightness=127, max_dropped=0.9)
    assert 0 < found.dropped < 120
    rules = ["--set", "curation.min_brightness=127", "--set", "curation.max_dropped=0.9"]
    assert darkroom("data", "curate", "--local", "--dataset", "noise", *rules)["dropped"] == found.dropped


@pytest.mark.parametrize(
    "call",
    [
        lambda: diffusion.load("nowhere.safetensors"),
        lambda: diffusion.load("models:/faces@champion"),
        lambda: diffusion.load("model.safetensors").generate(4),  # type: ignore[arg-type]
        lambda: diffusion.load("model.safetensors").to("tpu"),
        lambda: diffusion.load(None),  # type: ignore[arg-type]
        lambda: diffusion.load("model.safetensors", stepps=3),
        lambda: diffusion.load("model.safetensors").generate(label="cat"),
        lambda: diffusion.load("model.safetensors").generate(prompt="a cat"),
        lambda: diffusion.load("model.safetensors").img2img("nowhere.png"),
        lambda: diffusion.load("model.safetensors").img2img([0]),  # type: ignore[arg-type]
        lambda: diffusion.load("model.safetensors").inpaint("face.png", None),  # type: ignore[arg-type]
        lambda: diffusion.load("model.safetensors").upscale("face.png"),
        lambda: diffusion.load("model.safetensors").interpolate(3, 3),
        lambda: diffusion.ingest("nowhere", "noise"),
        lambda: diffusion.ingest("images", "noise", sise=8),
        lambda: diffusion.ingest("images", "no/name", size=8),
        lambda: diffusion.train("missing", minutes=1),
        lambda: diffusion.train("missing", minutes=1, images=1),
        lambda: diffusion.train("missing", preset="small", minutes=1),  # type: ignore[arg-type]
        lambda: diffusion.train("missing", preset="large", model={"family": "vae"}),
        lambda: diffusion.train("missing", model={"family": "vae"}, sampling={"steps": 3}),
        lambda: diffusion.curate("missing", min_side=8),
        lambda: diffusion.curate("missing", min_sides=8),
        lambda: diffusion.distill("missing", "nowhere.safetensors"),
        lambda: diffusion.distill("missing", "model.safetensors", step=2),
        lambda: diffusion.evaluate("missing"),
        lambda: diffusion.evaluate("missing", sample=20),
    ],
)
@pytest.mark.usefixtures("folder")
def test_mistakes_are_one_line(call: Callable[[], object]) -> None:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "here"),
    [("num_inference_steps", "steps"), ("guidance_scale", "guidance"), ("num_images_per_prompt", "count")],
)
def test_names_of_diffusers_are_answered_with_those_used_here(folder: Path, name: str, here: str) -> None:
    model = diffusion.load("model.safetensors")
    calls: list[Callable[..., object]] = [model.generate, partial(diffusion.load, "model.safetensors")]
    for call in (*calls, partial(model.img2img, "face.png")):
        with pytest.raises(UserError, match=f"here it is called {here}="):
            call(**{name: 4})


def test_a_prompt_comes_first(folder: Path) -> None:
    model = diffusion.load(ROOT / "examples" / "emoji.safetensors", steps=2, compute_batch=2)
    by_place, by_name = model.generate("a red heart", count=2), model.interpolate(0, 1, 2, prompt="a red heart")
    assert by_place[0].tobytes() == by_name[0].tobytes()
    assert by_place[0].tobytes() != model.generate("a blue car")[0].tobytes()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_missing_is_refused_at_once(folder: Path) -> None:
    for call in (
        lambda: diffusion.load("model.safetensors", device="cuda"),
        lambda: diffusion.load("model.safetensors").to("cuda"),
    ):
        with pytest.raises(UserError, match="no GPU"):
            call()
    model = diffusion.load("model.safetensors", steps=3, compute_batch=4)
    moved = model.to("cpu")
    assert moved.sampling.device == "cpu"
    assert moved.generate(seed=7)[0].tobytes() == model.generate(seed=7)[0].tobytes()


def test_importing_the_package_loads_nothing_else() -> None:
    script = (
        "import sys; before = set(sys.modules); import diffusion; diffusion.__version__; dir(diffusion)\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*(loaded - set(sys.stdlib_module_names)))\n"
        "diffusion.ingest, diffusion.load, diffusion.train, diffusion.evaluate, diffusion.distill\n"
        "print('torch' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout.split() == ["diffusion", "False"]
