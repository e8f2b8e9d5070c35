"""The Python of the page about other training scripts reads a data set, and pushes it to a Hub on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.manifest import read_manifest
from tests.builders import ROOT
from tests.builders.shapes import disc
from tests.docs.pages import blocks
from tests.hub import TOKEN, Hub


def test_a_pushed_data_set_comes_back_as_the_same_images(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for number in range(40):
        name = ("cat", "dog")[number % 2]
        (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
        disc(number).save(tmp_path / "images" / name / f"{number}.png")
        (tmp_path / "images" / name / f"{number}.txt").write_text(f"number {number}")
    ingest(tmp_path / "data" / "faces", IngestConfig(source=str(tmp_path / "images"), size=12, held_out=0.3))
    code = "\n".join(blocks(ROOT / "docs" / "how-to" / "other-training-scripts.md", "python"))
    environment = os.environ | {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    repo = hub.repos["dataset", "me/faces"]
    assert repo.private
    ingest(tmp_path / "again", IngestConfig(source="hf://datasets/me/faces?split=all", size=12, held_out=0.3))
    assert read_manifest(tmp_path / "again").content_digest == read_manifest(tmp_path / "data/faces").content_digest
