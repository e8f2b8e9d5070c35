"""What a feature costs: the examples of CONTRIBUTING.md are applied to a copy of the code, counted and used."""

import ast
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import diffusers
import numpy as np
import pytest
from PIL import Image

from tests.builders import ROOT
from tests.builders.command_line import darkroom
from tests.builders.pipelines import unet_2d, write_pipeline
from tests.builders.small_models import write_model

pytestmark = pytest.mark.slow
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
FENCE = re.compile(r"^```(?P<kind>python|diff) (?P<path>\S+)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A new file, a definition for a file, or a change of a file."""

    kind: str
    path: str
    text: str


class Cost(NamedTuple):
    """What an example adds: places (files or folders of a family), definitions, and lines in other files."""

    places: int
    definitions: int
    lines_elsewhere: int


def blocks_of(heading: str) -> list[Block]:
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [Block(match["kind"], match["path"], match["text"]) for match in FENCE.finditer(section)]


def insert_definition(file: Path, text: str, changed: list[str]) -> None:
    """Put a definition before the statement that has one of the lines ``changed``; at the end if there is none."""
    source = file.read_text()
    lines = source.splitlines(keepends=True)
    starts = [node.lineno - 1 for node in ast.parse(source).body]
    numbers = [number for number, line in enumerate(lines) if line.rstrip("\n") in changed]
    place = max(start for start in starts if start <= numbers[0]) if numbers else len(lines)
    file.write_text("".join([*lines[:place], "\n\n", text, "\n\n", *lines[place:]]))


def apply(heading: str, root: Path) -> Cost:
    """Apply the blocks of a section to a copy of the code below ``root``."""
    blocks = blocks_of(heading)
    new, definitions, main = set[str](), 0, set[str]()
    for block in blocks:
        file = root / block.path
        if block.kind == "python" and not file.exists():
            file.parent.mkdir(exist_ok=True)
            if not (file.parent / "__init__.py").exists():
                (file.parent / "__init__.py").write_text('"""A new package."""\n')
            file.write_text(block.text)
            is_family = Path(block.path).parts[:2] == ("diffusion", "families") and file.name in (
                "config.py",
                "model.py",
            )
            new.add(str(Path(block.path).parent) if is_family else block.path)
        elif block.kind == "python":
            contexts = [
                line[1:]
                for change in blocks
                if change.kind == "diff" and change.path == block.path
                for line in change.text.splitlines()
                if not line.startswith("+")
            ]
            insert_definition(file, block.text, contexts)
            definitions += len(ast.parse(block.text).body)
            main.add(block.path)
    lines = 0
    for block in blocks:
        if block.kind == "diff":
            before, after = (
                "".join(f"{line[1:]}\n" for line in block.text.splitlines() if line[0] in signs)
                for signs in (" -", " +")
            )
            text = (root / block.path).read_text()
            assert text.count(before) == 1, f"{block.path} does not have these lines once:\n{before}"
            (root / block.path).write_text(text.replace(before, after))
            lines += 0 if block.path in main else sum(line.startswith("+") for line in block.text.splitlines())
    return Cost(len(new), definitions, lines)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the code, in a folder to work in."""
    for package in ("diffusion", "flows"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(root: Path, *arguments: str, code: int = 0) -> str:
    process = darkroom(root, *arguments, PYTHONPATH=str(root))
    assert process.returncode == code, process.stderr
    return process.stdout or process.stderr


def save_images(folder: Path, count: int = 24) -> None:
    """Images of two classes, half of them red."""
    pixels = np.random.default_rng(0).integers(0, 120, (count, 8, 8, 3), np.uint8)
    pixels[::2, ..., 0] = 255
    for number, image in enumerate(pixels):
        place = folder / ("red", "dark")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number}.png")


INGEST = ("ingest", "images", "--dataset", "faces", "--local", "--json", "--set", "ingest.size=8")


def use_sampler(root: Path) -> None:
    write_model(root / "m.safetensors", seed=0, images=1)
    sampling = ("--set", "sampling.sampler=midpoint", "--set", "sampling.steps=2")
    run(root, "sample", "--model", "m.safetensors", "--count", "1", "--out", "samples", *sampling)
    assert (root / "samples" / "00000000.png").is_file()


def use_source(root: Path) -> None:
    np.save(root / "faces.npy", np.random.default_rng(0).integers(0, 255, (6, 8, 8, 3), np.uint8))
    found = json.loads(run(root, "ingest", "faces.npy", *INGEST[2:]))
    assert found["kept"] == 6
    assert "give a folder" in run(root, "ingest", "nowhere.xyz", *INGEST[2:], code=2)


def use_metric(root: Path) -> None:
    save_images(root / "images", 48)
    run(root, *INGEST, "--set", "ingest.held_out=0.5")
    write_model(root / "m.safetensors", seed=0, images=1, size=8, channels=3)
    evaluation = ("--set", "evaluation.samples=12", "--set", "sampling.steps=2", "--set", "training.dataset=faces")
    run(root, "evaluate", "--model", "m.safetensors", "--local", *evaluation)
    [metrics] = (root / "reports").rglob("metrics.json")
    assert "mean_distance" in metrics.read_text()


def use_rule(root: Path) -> None:
    save_images(root / "images")
    found = json.loads(run(root, *INGEST, "--set", "curation.rules.redness.max=0.5"))
    assert (found["kept"], found["dropped"]) == (12, 12)


def use_captioner(root: Path) -> None:
    save_images(root / "images")
    captioner = ("ingest.captioner.constant=a face", "ingest.captioner.version=v1")
    found = json.loads(run(root, *INGEST, *(word for setting in captioner for word in ("--set", setting))))
    assert (found["captions"]["requests"], found["captions"]["failed"]) == (24, 0)


def use_family(root: Path) -> None:
    save_images(root / "images")
    run(root, *INGEST)
    training = ("model.family=gaussian", "training.dataset=faces", "training.images=64", "training.batch_size=16")
    run(root, "train", "--local", *(word for setting in training for word in ("--set", setting)))
    [weights] = root.rglob("final.safetensors")
    run(root, "sample", "--model", str(weights), "--count", "2", "--out", "samples")
    assert (root / "samples" / "00000001.png").is_file()


def use_pipeline(root: Path) -> None:
    scheduler = diffusers.PNDMScheduler(num_train_timesteps=100)
    write_pipeline(root / "pndm", diffusers.PNDMPipeline(unet=unet_2d(), scheduler=scheduler))
    run(root, "model", "import", "pndm", "--out", "m.safetensors")
    run(root, "sample", "--model", "m.safetensors", "--count", "1", "--out", "samples", "--set", "sampling.steps=2")
    assert (root / "samples" / "00000000.png").is_file()


def use_command(root: Path) -> None:
    save_images(root / "images")
    run(root, *INGEST)
    assert json.loads(run(root, "data", "classes", "--dataset", "faces", "--json")) == {
        "classes": {"dark": 12, "red": 12}
    }


@pytest.mark.parametrize(
    ("heading", "cost", "use"),
    [
        ("Add a sampler", Cost(1, 0, 1), use_sampler),
        ("Add a source of images", Cost(1, 0, 1), use_source),
        ("Add a metric", Cost(1, 0, 1), use_metric),
        ("Add a rule of curation", Cost(0, 1, 0), use_rule),
        ("Add a captioner", Cost(0, 1, 1), use_captioner),
        pytest.param("Add a family of models", Cost(1, 0, 1), use_family, marks=pytest.mark.long),
        pytest.param("Add a pipeline of diffusers", Cost(1, 0, 1), use_pipeline, marks=pytest.mark.long),
        ("Add a command", Cost(0, 1, 0), use_command),
    ],
)
def test_example_is_one_place_and_works(heading: str, cost: Cost, use: Callable[[Path], None], copy: Path) -> None:
    assert apply(heading, copy) == cost
    use(copy)
