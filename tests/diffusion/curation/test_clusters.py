"""Pseudo-classes: that clusters are of images that look alike, and stay what they are while a data set changes."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffusion.common.errors import UserError
from diffusion.curation.config import CurationConfig
from diffusion.curation.curate import CurationResult, curate
from diffusion.curation.lists import ListChange
from diffusion.data.dataset import Dataset
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.manifest import read_manifest
from diffusion.data.versions.takedown import remove
from diffusion.data.versions.takedown_records import Selection
from diffusion.evaluation.config import EvaluationConfig
from tests.builders.ingested import records

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


def write(folder: Path, colour: str, numbers: range) -> None:
    """Write noisy images of one colour that a folder does not give away."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        noise = np.random.default_rng(number).integers(-30, 30, (8, 8, 3))
        Image.fromarray((np.array(COLOURS[colour]) + noise).astype(np.uint8)).save(folder / f"{colour}-{number}.png")


def config(source: Path) -> IngestConfig:
    return IngestConfig(source=str(source), size=8, held_out=0.3, workers=1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set of twenty images of each colour, without labels."""
    for place, colour in enumerate(COLOURS):
        write(tmp_path / "images", colour, range(20 * place, 20 * place + 20))
    ingest(tmp_path / "data" / "set", config(tmp_path / "images"))
    return tmp_path / "data" / "set"


def change(folder: Path, **fields: object) -> CurationResult:
    list_change = ListChange.model_validate({"name": "clusters"} | fields) if fields else None
    return curate(folder, CurationConfig(), config(folder), EvaluationConfig(), change=list_change)


def cluster(folder: Path, count: int) -> CurationResult:
    return change(folder, kind="clusters", clusters=count)


def labels(folder: Path) -> dict[str, str | None]:
    return {str(row["source"]): row["label"] for row in records(folder) if row["outcome"] == "kept"}


def colours_by_label(folder: Path) -> dict[str | None, Counter[str]]:
    result: dict[str | None, Counter[str]] = {}
    for source, label in labels(folder).items():
        result.setdefault(label, Counter())[source.split("-")[0]] += 1
    return result


def test_each_cluster_is_of_images_that_look_alike(data: Path) -> None:
    result = cluster(data, 3)
    assert result.relabelled == 60
    groups = colours_by_label(data)
    assert sorted(groups) == ["cluster-0", "cluster-1", "cluster-2"]
    assert sorted(map(dict, groups.values()), key=str) == sorted(({colour: 20} for colour in COLOURS), key=str)
    classes = Dataset.open(data).manifest.class_histogram
    assert classes == dict.fromkeys(sorted(groups), 20)


def test_clusters_stay_what_they_are_when_images_come(data: Path) -> None:
    cluster(data, 3)
    before, (about,) = labels(data), read_manifest(data).lists or ()
    write(data.parents[1] / "images", "green", range(100, 150))
    ingest(data, config(data.parents[1] / "images"))
    assert change(data).changed
    after = labels(data)
    assert {source: after[source] for source in before} == before
    assert {after[source] for source in after.keys() - before} == {before["green-20.png"]}
    assert read_manifest(data).lists == [about]


def test_repeated_it_makes_no_version(data: Path) -> None:
    first = cluster(data, 3)
    second = cluster(data, 3)
    assert (second.changed, second.digest) == (False, first.digest)
    assert not change(data).changed


def test_the_label_of_a_list_stays(data: Path, tmp_path: Path) -> None:
    table = tmp_path / "known.csv"
    table.write_text("source,label\nred-0.png,known\n")
    change(data, name="known", kind="label", table=table)
    cluster(data, 3)
    assert labels(data)["red-0.png"] == "known"
    assert Counter(labels(data).values()).total() == 60
    assert {labels(data)[f"red-{number}.png"] for number in range(1, 20)} < {"cluster-0", "cluster-1", "cluster-2"}


def test_withdrawn_clusters_leave_no_label(data: Path) -> None:
    before = read_manifest(data)
    cluster(data, 3)
    change(data, name="clusters")
    after = read_manifest(data)
    assert (after.content_digest, after.parts, after.lists) == (before.content_digest, before.parts, None)


def test_a_takedown_of_an_exemplar_leaves_nothing_of_it(data: Path) -> None:
    cluster(data, 3)
    (about,) = read_manifest(data).lists or ()
    keys = pq.read_table(data / about.table.name)["key"].to_pylist()
    source = next(str(row["source"]) for row in records(data) if row["key"] == keys[0])
    remove(data, Selection(prefixes=keys[:1]), "requested")
    (rest,) = read_manifest(data).lists or ()
    assert pq.read_table(data / rest.table.name)["key"].to_pylist() == keys[1:]
    change(data)
    colour = source.split("-")[0]
    groups = colours_by_label(data)
    assert len(groups) == 2
    assert sum(colours[colour] for colours in groups.values()) == 19


def test_too_few_images_for_so_many_clusters_are_a_users_mistake(data: Path) -> None:
    with pytest.raises(UserError):
        cluster(data, 7)
    assert read_manifest(data).lists is None
