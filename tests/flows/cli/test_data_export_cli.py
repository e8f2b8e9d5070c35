"""``darkroom data export``: without a server, once, one line for each mistake."""

import shlex
from pathlib import Path

import pytest

from diffusion.data.manifest import read_manifest
from tests.builders.command_line import CommandLine


@pytest.fixture
def run(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_line: CommandLine) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    return command_line


def test_export_is_ingested_again_as_its_card_says(tmp_path: Path, run: CommandLine) -> None:
    words = ("data", "export", "--dataset", "blobs", "--to", "imagefolder", "--out", "exports/blobs")
    about = run.json(*words)
    manifest = read_manifest(tmp_path / "data" / "blobs")
    assert (about["images"], about["created"], about["content_digest"]) == (48, True, manifest.content_digest)
    assert "which were there already" in run(*words)
    card = (tmp_path / "exports" / "blobs" / "README.md").read_text()
    [command] = [line for line in card.splitlines() if line.startswith("darkroom ingest")]
    again = shlex.split(command.replace("FOLDER", "exports/blobs"))[1:]
    result = run.json(*again, "--dataset", "again", "--local")
    assert result["content_digest"] == manifest.content_digest


def test_mistakes_are_one_line(tmp_path: Path, run: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    words = ("data", "export", "--dataset", "blobs")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for more, message in (
        (("--to", "coco", "--out", "x"), "imagefolder, parquet, webdataset"),
        (("--to", "parquet"), "--out"),
        (("--to", "parquet", "--out", "full"), "not an export"),
        (("--to", "hf://me/blobs", "--out", "x"), "--out"),
        (("--to", "hf://me/blobs"), "HF_TOKEN"),
        (("--to", "parquet", "--out", "x", "--public"), "--public"),
        (("--to", "parquet", "--out", "x", "--dataset", "nosuch"), "nosuch"),
    ):
        assert message in run.mistake(*words, *more), more
    assert not (tmp_path / "x").exists()
