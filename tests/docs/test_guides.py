"""The guides do what they say, on small images."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
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
from tests.builders.small_models import write_model
from tests.builders.workspace import PARAMS, Workspace, running
from tests.docs.pages import blocks, commands, of_program

DOCS = ROOT / "docs"
SMALL = PARAMS | {"training": PARAMS["training"] | {"images": 640, "checkpoints": 2, "dataset": "faces"}}


def scripts(page: Path) -> list[str]:
    """The blocks of ``page`` with nothing but commands of Darkroom."""
    selection = [
        block
        for block in blocks(page, "sh")
        if all(command[0] in ("darkroom", "eval") for command in commands(block)) and "make " not in block
    ]
    assert selection
    return selection


def small_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        disc(number).save(folder / f"{number:03d}.png")


@pytest.mark.slow
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
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, (words, result.output, result.exception)
    for file in ("runs/blobs/final.safetensors", "reports/blobs/report.html", "exported/model_index.json"):
        assert (tmp_path / file).is_file()
    for folder, count in {"blobs": 16, "inpainted": 4, "variations": 4, "between": 5}.items():
        assert len(list((tmp_path / folder).glob("0*.png"))) == count
        assert (tmp_path / folder / "grid.png").is_file()
        assert (tmp_path / folder / "request.json").is_file()


@pytest.mark.slow
def test_the_guide_to_signing_ends_with_verified_exports_and_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("KEY", "CERTIFICATES"):
        monkeypatch.delenv(f"DARKROOM_SIGNING_{name}", raising=False)
    monkeypatch.setenv("DARKROOM_SIGNING_KEY_PASSPHRASE", "open sesame")
    write_model(tmp_path / "final.safetensors", seed=0, images=64)
    disc(0).save(tmp_path / "face.png")
    command = f"edit img2img face.png --model {tmp_path}/final.safetensors --set sampling.steps=2 --count 3"
    result = CliRunner().invoke(app, [*command.split(), "--out", "samples/variations"])
    assert result.exit_code == 0, (result.output, result.exception)
    page = DOCS / "how-to" / "sign-and-verify.md"
    [keys] = [block for block in blocks(page, "sh") if "openssl" in block]
    subprocess.run(["bash", "-euc", keys], input=b"open sesame\n", check=True, capture_output=True)
    ran = []
    for block in blocks(page, "sh"):
        for words in of_program("darkroom", block):
            if not any("s3://" in word or word in ("ledger-of-faces", "history") for word in words):
                words = ["final.safetensors" if word.startswith("models:/") else word for word in words]
                result = CliRunner().invoke(app, words)
                assert result.exit_code == 0, (words, result.output, result.exception)
                ran.append(words[0])
    assert ran == ["model", "verify", "sign", "verify"]
    verified = result.stdout.splitlines()
    assert len(verified) == 4
    assert all(line.startswith("verified") and "UNTRUSTED" not in line for line in verified)


def follow(space: Workspace, page: str, replaced: Mapping[str, str] = {}, without: str = "pip install") -> None:
    """Run a page's blocks of Darkroom's commands in the workspace, with names and numbers ``replaced``.

    Blocks that have the words ``without`` are left out.
    """
    script = "\n".join(block for block in scripts(DOCS / page) if without not in block)
    for placeholder, actual in replaced.items():
        assert placeholder in script, placeholder
        script = script.replace(placeholder, actual)
    process = subprocess.run(
        ["bash", "-euxc", script],
        cwd=space.folder,
        env=space.variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr[-4000:]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A local stack with a data set, a champion and a sampling batch, as the guide to own images leaves them."""
    folder = tmp_path_factory.mktemp("guides")
    with running(folder, SMALL, 0) as space:
        small_images(folder / "path" / "to" / "faces", 96)
        programs = folder / "bin"
        programs.mkdir()
        space.variables["PATH"] = f"{programs}:{os.environ['PATH']}"
        space.fork().write_program(programs / "darkroom")
        follow(space, "get-started/own-images.md")
        yield space


@pytest.mark.slow
@pytest.mark.timeout(1800)  # commands start slowly on a busy machine
def test_own_images_end_on_s3_and_a_champion_is_in_the_registry(stack: Workspace) -> None:
    assert stack.json("model", "history", "--dataset", "faces")["champion"] == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)  # commands start slowly on a busy machine
def test_guides_to_generation_can_be_followed(stack: Workspace) -> None:
    batch = stack.json("sample", "--dataset", "faces", "--count", "1000", "--seed", "7")["uri"].rstrip("/")
    placeholder = "s3://darkroom/samples/faces/3/seed7-count1000-dpmpp_2m_sde16-af14cd24"
    follow(stack, "how-to/trace.md", {placeholder: batch, "--count 100": "--count 8"})
    follow(stack, "how-to/choose-a-sampler.md")
    follow(stack, "how-to/sample-many-images.md", {"--count 100000": "--count 64", "workers=4": "workers=2"}, "birds")
    follow(stack, "how-to/evaluate.md", {"models:/faces/7": "models:/faces/1"}, "text_image_encoder")
    follow(stack, "operations/monitor.md")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1800)  # commands start slowly on a busy machine
def test_guides_to_versions_can_be_followed(stack: Workspace) -> None:
    second = ("--dataset", "faces", "--set", "training.seed=1", "--set", "training.output=runs/second")
    stack.json("train", *second)
    stack.json("evaluate", *second)
    stack.run("promote", *second, code=(0, 3))
    follow(stack, "how-to/approve-promotions.md", {"--to 3": "--to 2"})
    assert stack.json("model", "history", "--dataset", "faces")["champion"] == 1
    stack.json("promote", "--dataset", "faces", "--to", "2")
    follow(stack, "how-to/roll-back.md")
    follow(stack, "concepts/ledger.md")
    assert stack.json("model", "history", "--dataset", "faces")["champion"] == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)  # commands start slowly on a busy machine
def test_guides_to_data_sets_can_be_followed(stack: Workspace) -> None:
    for number in range(1000, 1008):
        disc(number).save(stack.folder / "path" / "to" / "faces" / f"{number}.png")
    stack.json("ingest", "path/to/faces", "--dataset", "faces")
    versions = [each["digest"] for each in stack.json("data", "log", "--dataset", "faces")["versions"]]
    digests = {"3f9c21d0": versions[0][:12], "a81b77e2": versions[1][:12]}
    follow(stack, "how-to/data-versions.md", digests)
    follow(stack, "how-to/take-images-down.md", {"alice/*": "100*"})
    follow(stack, "operations/garbage-collection.md")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(diffusion, "load"), reason="the package has no load yet")
def test_the_python_of_the_readme_generates_an_image(tmp_path: Path) -> None:
    [code, *_] = blocks(ROOT / "README.md", "python")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=variables, check=True, timeout=120)
    [image] = tmp_path.glob("*.png")
    assert Image.open(image).size == (64, 64)
