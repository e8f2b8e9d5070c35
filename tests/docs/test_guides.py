"""The guides do what they say, on small images."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

import diffusion
from flows.cli import app
from tests.builders import ROOT
from tests.builders.shapes import disc
from tests.builders.workspace import PARAMS, running
from tests.docs.pages import blocks, commands, of_program

DOCS = ROOT / "docs"
SMALL = PARAMS | {"training": PARAMS["training"] | {"images": 640, "checkpoints": 2, "dataset": "faces"}}


def scripts(page: Path) -> list[str]:
    """The blocks of ``page`` with nothing but commands of Darkroom."""
    found = [
        block
        for block in blocks(page, "sh")
        if all(command[0] in ("darkroom", "eval") for command in commands(block)) and "make " not in block
    ]
    assert found
    return found


def small_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        disc(number).save(folder / f"{number:03d}.png")


def test_work_without_servers_ends_with_the_named_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_images(tmp_path / "images", 96)
    disc(1000).save(tmp_path / "image.png")
    hole = np.zeros((8, 8), np.uint8)
    hole[2:6, 2:6] = 255
    Image.fromarray(hole).resize(disc(1000).size, Image.Resampling.NEAREST).save(tmp_path / "hole.png")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(SMALL))
    monkeypatch.chdir(tmp_path)
    for script in scripts(DOCS / "get-started" / "without-servers.md"):
        for words in of_program("darkroom", script):
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, (words, done.output, done.exception)
    for made in ("runs/blobs/final.safetensors", "reports/blobs/report.html", "exported/model_index.json"):
        assert (tmp_path / made).is_file()
    for folder, count in {"blobs": 16, "inpainted": 4, "variations": 4, "between": 5}.items():
        assert len(list((tmp_path / folder).glob("0*.png"))) == count
        assert (tmp_path / folder / "grid.png").is_file()
        assert (tmp_path / folder / "request.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_own_images_end_on_s3_and_a_champion_is_in_the_registry(tmp_path: Path) -> None:
    with running(tmp_path, SMALL, 0) as space:
        small_images(tmp_path / "path" / "to" / "faces", 96)
        program = tmp_path / "bin" / "darkroom"
        program.parent.mkdir()
        program.write_text(f"#!{sys.executable}\nfrom flows.cli import main\n\nmain()\n")
        program.chmod(0o755)
        variables = space.variables | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
        script = [*scripts(DOCS / "get-started" / "own-images.md"), *scripts(DOCS / "concepts" / "ledger.md")]
        done = subprocess.run(
            ["bash", "-euxc", "\n".join(script)],
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert space.json("model", "history", "--dataset", "faces")["champion"] == 1


@pytest.mark.skipif(not hasattr(diffusion, "load"), reason="the package has no load yet")
def test_the_python_of_the_readme_draws_a_face(tmp_path: Path) -> None:
    [code, *_] = blocks(ROOT / "README.md", "python")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=variables, check=True, timeout=120)
    assert Image.open(tmp_path / "face.png").size == (64, 64)
