"""Databases of a data set that another program has locked for longer than one waits."""

from pathlib import Path

import pytest

from diffusion.common.errors import TransientError
from diffusion.curation.config import CurationConfig
from diffusion.curation.curate import curate
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.manifest import work_folder
from diffusion.data.versions.takedown import remove
from diffusion.data.versions.takedown_records import Selection
from diffusion.evaluation.config import EvaluationConfig
from tests.builders.ingested import files_of
from tests.builders.locked import locked
from tests.builders.shapes import blob


@pytest.mark.parametrize(
    ("verb", "name"),
    [
        ("ingest", "index.sqlite"),
        ("ingest", "captions.sqlite"),
        ("curate", "index.sqlite"),
        ("remove", "captions.sqlite"),
    ],
)
def test_locked_databases_are_named_and_commands_can_be_repeated(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, name: str
) -> None:
    captioner = {"command": ["echo", "a blob"], "version": "one"}
    config = IngestConfig.model_validate({"source": str(images), "size": 8, "captioner": captioner})

    def run(folder: Path) -> object:
        if verb == "ingest":
            return ingest(folder, config)
        if verb == "curate":
            return curate(folder, CurationConfig(min_brightness=120), config, EvaluationConfig())
        return remove(folder, Selection(sources=["*/0*.png"]), "asked to")

    expected, folder = tmp_path / "expected" / "blobs", tmp_path / "data" / "blobs"
    for each in (expected, folder):
        ingest(each, config)
    blob(100).save(images / "late.png")
    run(expected)
    for module in ("captions", "index"):
        monkeypatch.setattr(f"diffusion.data.ingest.{module}.LOCK_TIMEOUT", 0.1)
    with locked(work_folder(folder) / name), pytest.raises(TransientError, match=rf"locked a database.*{name}"):
        run(folder)
    run(folder)
    assert files_of(folder) == files_of(expected)
