"""The page of a data set: written once for a version, and again if this Darkroom cannot read its summary."""

from pathlib import Path

import pytest

from diffusion.data.ingest.ingest import ingest
from flows.config import Params
from flows.ingest import dataset_page, find_page


def test_page_of_an_unreadable_summary_is_written_again(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    params = Params.model_validate({"training": {"dataset": "blobs"}, "ingest": {"source": str(images), "size": 8}})
    ingest(params.dataset_folder, params.ingest)
    page, summary = dataset_page(params)
    assert find_page(params) == (page, summary)
    for text in ('{"name": "blobs"}', "{", None):
        page.write_text("of another version of Darkroom")
        figures = page.with_suffix(".json")
        figures.unlink() if text is None else figures.write_text(text)
        assert find_page(params) == (page, None)
        assert dataset_page(params) == (page, summary)
        assert page.read_text() != "of another version of Darkroom"
