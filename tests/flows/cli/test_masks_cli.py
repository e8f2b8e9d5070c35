"""Masked loss from the command line: what it proposes, says, and refuses."""

from pathlib import Path

import pytest
import yaml

from diffusion.common.model_files import read_header
from tests.builders.command_line import CommandLine
from tests.builders.masked import write_watermarked

TRAINING = (
    *("--set", "training.images=64", "--set", "training.batch_size=16", "--set", "training.checkpoints=1"),
    *("--set", "model.width=16", "--set", "model.channel_mult=[1]", "--set", "model.blocks=1", "--local"),
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_line: CommandLine) -> CommandLine:
    write_watermarked(tmp_path / "marked", 48)
    monkeypatch.chdir(tmp_path)
    return command_line


@pytest.mark.slow
def test_proposed_masks_are_ingested_and_trained_with(tmp_path: Path, run: CommandLine) -> None:
    words = run("init", "marked")
    assert "48 × mask of an image" in words
    assert yaml.safe_load(Path("params.yaml").read_text())["ingest"]["masks"] == "files"
    assert "masks 48 of 48 images" in run("ingest", "--local")
    assert "48 images with one" in run("data", "show")
    result = run.json("train", "--set", "training.mask.min_weight=0.1", *TRAINING)
    header = read_header(Path(result["final"]))["model_header"]
    assert header["training"]["mask"] == {"min_weight": 0.1, "normalize_area": False}


def test_masks_without_effect_are_mistakes_of_one_line(run: CommandLine) -> None:
    run("init", "marked")
    words = run("ingest", "--local", "--set", "ingest.masks=null")
    assert "ignored: 48 × mask of an image, which ingest.masks=files uses" in words
    for option, fields in (("ingest.masks", TRAINING), ("training.mask", ("--set", "model={family: vae}", "--local"))):
        answer = run.answer("train", "--set", "training.mask={}", *fields)
        assert (answer.code, option in answer.err.splitlines()[-1]) == (2, True)
