"""Weights of merged data sets: how often an epoch shows the images of each."""

from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from diffusion.common.errors import UserError
from diffusion.data.dataset import Dataset
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.ingest.merge import merge_versions
from diffusion.data.loader import count_repeats, make_order
from diffusion.data.manifest import read_manifest
from diffusion.data.versions.compact import compact
from diffusion.data.versions.merge_datasets import merge_datasets
from diffusion.data.versions.takedown import remove
from diffusion.data.versions.takedown_records import Selection
from diffusion.training.config import TrainingConfig
from diffusion.training.identity import data_digest
from tests.builders.shapes import blob

SHARES = {"faces": range(20), "emoji": range(15, 40), "cats": range(60, 70)}
"""Images of each data set; five are in two of them."""


def config(source: Path) -> IngestConfig:
    return IngestConfig(source=str(source), size=8, held_out=0.2, workers=1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, numbers in SHARES.items():
        (tmp_path / name).mkdir()
        for number in numbers:
            blob(number).save(tmp_path / name / f"{name}-{number}.png")
        ingest(tmp_path / "data" / name, config(tmp_path / name))
    return tmp_path / "data"


def merged(data: Path) -> Path:
    """The data set faces after cats was merged into emoji, and that into it."""
    merge_datasets(data / "emoji", [data / "cats"], config(data))
    merge_datasets(data / "faces", [data / "emoji"], config(data))
    return data / "faces"


def repeats_by_set(folder: Path, weights: dict[str, float] | None, mix: dict[str, float]) -> dict[str, set[int]]:
    with closing(Dataset.open(folder)) as dataset:
        names = [name.partition("-")[0] for name in dataset.sources(dataset.rows("train"))]
        repeats = count_repeats(dataset, weights, mix).tolist()
    return {name: {count for each, count in zip(names, repeats, strict=True) if each == name} for name in set(names)}


def test_parts_say_which_data_set_they_came_from(data: Path) -> None:
    folder, digest = merged(data), read_manifest(data / "faces").digest
    assert read_manifest(folder).datasets == {"faces": 20, "emoji": 20, "cats": 10}
    assert read_manifest(data / "cats").datasets == {"cats": 10}
    assert merge_datasets(folder, [data / "emoji"], config(data)).digest == digest
    with closing(Dataset.open(folder)) as dataset:
        (key,) = dataset.keys([int(np.flatnonzero([n.startswith("cats-6") for n in dataset.sources(range(50))])[0])])
    remove(folder, Selection(prefixes=[key]), "asked")
    for number in (100, 101):
        blob(number).save(data.parent / "faces" / f"faces-{number}.png")
        ingest(folder, config(data.parent / "faces"))
    compact(folder, config(data))
    assert read_manifest(folder).datasets == {"faces": 22, "emoji": 20, "cats": 9}


def test_a_union_of_two_lines_keeps_the_data_sets(data: Path) -> None:
    base = read_manifest(data / "faces")
    blob(200).save(data.parent / "faces" / "faces-200.png")
    ingest(data / "faces", config(data.parent / "faces"))
    remote, manifest = read_manifest(data / "faces"), (data / "faces" / "manifest.json")
    after = manifest.read_bytes()
    manifest.write_bytes((data / "faces" / "versions" / f"{base.digest[:16]}.json").read_bytes())
    saved = {path: path.read_bytes() for path in (data / "faces").rglob("*.parquet")}
    saved |= {path: path.read_bytes() for path in (data / "faces").rglob("*.tar")}
    merge_datasets(data / "faces", [data / "cats"], config(data))
    for path, content in saved.items():
        path.write_bytes(content)
    assert after != manifest.read_bytes()
    merge_versions(data / "faces", config(data), remote, base)
    assert read_manifest(data / "faces").datasets == {"faces": 21, "cats": 10}


def test_an_epoch_shows_images_as_often_as_their_data_set_says(data: Path) -> None:
    folder = merged(data)
    with closing(Dataset.open(folder)) as dataset:
        rows = dataset.rows("train")
        names = [name.partition("-")[0] for name in dataset.sources(rows)]
        for window in (None, 1):
            order = make_order(dataset, 3, 4, window, None, {"emoji": 0.5, "cats": 3})
            counts = Counter(order.rows(order.length, order.length).tolist())
            assert [counts[place] for place in range(len(rows))] == [
                {"faces": 2, "emoji": 1, "cats": 6}[n] for n in names
            ]
        again = make_order(dataset, 3, 4, None, None, {"cats": 3, "emoji": 0.5})
        plain, order = make_order(dataset, 3, 4), make_order(dataset, 3, 4, None, None, {"emoji": 0.5, "cats": 3})
        np.testing.assert_array_equal(again.rows(0, 500), order.rows(0, 500))
        equal = make_order(dataset, 3, 4, None, None, {"faces": 2, "emoji": 2, "cats": 2})
        np.testing.assert_array_equal(equal.rows(0, 500), plain.rows(0, 500))


def test_weights_of_names_and_of_data_sets_multiply(data: Path) -> None:
    folder = merged(data)
    assert repeats_by_set(folder, {"cats-*": 4}, {"cats": 0.5, "faces": 3}) == {"faces": {3}, "emoji": {1}, "cats": {2}}
    assert repeats_by_set(folder, None, {"cats": 7, "faces": 7}) == {"faces": {7}, "emoji": {1}, "cats": {7}}


def test_a_name_that_no_image_came_from_is_an_error(data: Path) -> None:
    with closing(Dataset.open(merged(data))) as dataset, pytest.raises(UserError, match="faces, emoji, cats"):
        make_order(dataset, 0, 4, None, None, {"emojis": 2})


def test_a_mix_is_part_of_the_identity_and_none_changes_nothing(data: Path) -> None:
    manifest = read_manifest(merged(data))
    plain, mixed = (TrainingConfig.model_validate({"images": 8} | each) for each in ({}, {"mix": {"emoji": 0.5}}))
    assert "mix" not in plain.model_dump()
    assert data_digest(manifest, plain) == manifest.content_digest
    assert data_digest(manifest, mixed) != manifest.content_digest
