"""Public summary of training content: what records know is filled in, and what they do not know is marked."""

from pathlib import Path

import pytest

from diffusion.checkpoints import read_model_header, save_tensors
from diffusion.common.model_files import read_header
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.manifest import read_manifest
from flows.provenance.training_content import TO_FILL_IN, summarize_training_content
from tests.builders.command_line import CommandLine
from tests.builders.model_cards import rows
from tests.builders.small_models import write_lora, write_model


@pytest.fixture
def model(dataset: Path, tmp_path: Path) -> Path:
    """A model that says that it was trained on ``dataset``."""
    from safetensors.torch import load_file

    path = write_model(tmp_path / "final.safetensors", 0, images=64)
    header = read_header(path)
    header["model_header"]["content_digest"] = read_manifest(dataset).content_digest
    save_tensors(path, load_file(path), header)
    return path


def test_records_fill_in_what_they_know(images: Path, dataset: Path, tmp_path: Path, model: Path) -> None:
    ingest(dataset, IngestConfig(source=str(images), size=8, held_out=0.33, licence="CC-BY-4.0"))
    data = read_manifest(dataset)
    text = summarize_training_content(model, data, "models:/blobs/3", "a, b", ["models:/blobs/2, trained on more"])
    general, sources, processing = (
        rows(text, name)
        for name in ("1. General information", "2. List of data sources", "3. Aspects of data processing")
    )
    assert general["Model"] == ["models:/blobs/3"]
    assert f"{data.counts['train']:,} images to train on" in general["Size of the training data"][0]
    assert "models:/blobs/2, trained on more" in general["Models that it is based on"][0]
    assert general["Modalities"] == ["image"]
    assert sources["Licence of the images"] == ["CC-BY-4.0"]
    assert sources["2.1 Publicly available data sets"] == ["none recorded"]
    assert TO_FILL_IN in sources["2.2 Private data sets of third parties"][0]
    assert processing["Takedowns"] == ["0 images taken down before training; since: a, b"]
    marked = sum(TO_FILL_IN in value for table in (general, sources, processing) for [value] in table.values())
    assert f"; {marked} entries are marked" in text


def test_public_sources_captioners_and_bases_are_named(dataset: Path, tmp_path: Path, model: Path) -> None:
    data = read_manifest(dataset)
    part = data.parts[0].model_copy(update={"source": "hf://datasets/a/b@" + "0" * 40, "captioners": {"m (1)": 7}})
    data = data.model_copy(update={"parts": [part]})
    lora = write_lora(tmp_path / "lora" / "final.safetensors", model, 1)
    text = summarize_training_content(lora, data)
    assert rows(text, "2. List of data sources")["2.1 Publicly available data sets"] == [f"`{part.source}`"]
    assert "captions by m (1) (7)" in rows(text, "2. List of data sources")["2.5 Synthetic data"][0]
    assert "blobs" in rows(text, "1. General information")["Models that it is based on"][0]
    assert read_model_header(lora).base is not None


def test_unknown_data_is_not_guessed(tmp_path: Path, model: Path) -> None:
    text = summarize_training_content(model, None)
    assert rows(text, "1. General information")["Size of the training data"] == ["unknown here"]
    assert rows(text, "3. Aspects of data processing")["Takedowns"][0].startswith("unknown here")


def test_command_prints_and_writes_it(
    dataset: Path, tmp_path: Path, model: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("model", "training-content", "--model", "final.safetensors", "--dataset", "blobs", "--out", "page.md")
    printed = command_line(*words)
    assert (tmp_path / "page.md").read_text() == printed
    assert f"{read_manifest(dataset).counts['train']:,} images to train on" in printed
