"""Work on a data set whose shards are on the remote alone: what reads them gets them."""

from contextlib import closing
from pathlib import Path

import pytest
import torch

from diffusion.api import engine
from diffusion.data.dataset import Dataset
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.ingest.preview import preview
from diffusion.data.manifest import read_manifest
from flows.config import Params
from flows.datasets.dvc import record_data
from flows.datasets.remote_shards import RemoteShards
from flows.ingest import make_dataset, require_shards
from tests.builders.catalogs import FOLDER, Place
from tests.builders.command_line import CommandLine
from tests.builders.shapes import blob
from tests.builders.workspace import PARAMS, running


@pytest.fixture
def params(place: Place) -> Params:
    """A data set that was made without shards here, recorded, pushed and published."""
    sections = {"ingest": {"source": str(place.images), "size": 8, "held_out": 0.33}, "training": {"dataset": "blobs"}}
    params = Params.model_validate(sections)
    ingest(FOLDER, params.ingest, fan_out=map, remote=RemoteShards(FOLDER, place.source))
    place.publish()
    return params


def images_of(folder: Path) -> torch.Tensor:
    with closing(Dataset.open(folder)) as dataset:
        return dataset.images(range(len(dataset)))


def test_missing_shards_are_fetched(params: Params, tmp_path: Path) -> None:
    ingest(other := tmp_path / "other" / "blobs", params.ingest)
    assert not list(FOLDER.glob("shards/*"))
    require_shards(params)
    assert torch.equal(images_of(FOLDER), images_of(other))


def test_curation_hashes_images_of_the_remote(params: Params, place: Place, tmp_path: Path) -> None:
    ingest(other := tmp_path / "data" / "other", params.ingest)

    def hashing(dataset: str) -> Params:
        source = params.ingest.model_dump() | {"near_duplicates": 8}
        rules = {"max_brightness": 135, "max_dropped": 1}
        return Params.model_validate({"ingest": source, "curation": rules, "training": {"dataset": dataset}})

    there = engine.curate(hashing("blobs"), remote=RemoteShards(FOLDER, place.source))
    here = engine.curate(hashing(other.name))
    assert there.dropped > 0
    assert [image.key for image in there.images] == [image.key for image in here.images]


def test_a_dry_run_needs_no_shard_that_was_never_hashed(params: Params) -> None:
    blob(100).save(Path(params.ingest.source) / "odd" / "100.png")
    forecast = preview(FOLDER, params.ingest.model_copy(update={"near_duplicates": 8})).forecast
    assert forecast is not None
    assert forecast.kept == 1


@pytest.mark.slow
def test_what_rules_would_drop_is_said_of_images_of_the_remote(
    params: Params, place: Place, command_line: CommandLine
) -> None:
    Path("params.yaml").write_text(params.model_dump_json())
    rules = ("--set", "curation.max_brightness=135", "--set", "curation.max_dropped=1")
    dry_run = command_line.json("data", "curate", "--dry-run", *rules)
    assert 0 < dry_run["dropped"] < dry_run["kept"] + dry_run["dropped"]
    page = command_line.json("data", "curate", "--report", "page.html", *rules)
    assert page["dropped"] == dry_run["dropped"]
    assert Path("page.html").is_file()
    assert not list(FOLDER.glob("shards/*"))


def test_a_recorded_shard_that_was_never_pushed_is_uploaded(place: Place, tmp_path: Path) -> None:
    ingest(FOLDER, IngestConfig(source=str(place.images), size=8))
    record_data(FOLDER, None)
    (entry,) = read_manifest(FOLDER).shards
    RemoteShards(FOLDER, place.source).only(entry).fetch(entry, tmp_path / "shard")
    assert (tmp_path / "shard").read_bytes() == (FOLDER / entry.name).read_bytes()


def test_a_retry_after_the_first_manifest_reads_no_image_again(params: Params) -> None:
    before = read_manifest(FOLDER).digest
    images = Path(params.ingest.source)
    blob(100).save(images / "odd" / "100.png")
    require_shards(params)
    ingest(FOLDER, params.ingest)
    result = make_dataset.fn(params, before, rebuild="always")
    assert (result.read, result.changed) == (0, True)
    assert make_dataset.fn(params, read_manifest(FOLDER).digest, rebuild="always").read > 0


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_an_ingest_on_ray_is_followed_by_all_steps_of_a_retraining(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with running(tmp_path, PARAMS, 120) as space:
        settings = ("--set", "ingest.runner=ray", "--set", "training.images=320")
        assert space.json("retrain", "images", "--count", "1", *settings)["data"]["result"]["changed"]
        for verb in ("evaluate", "monitor"):
            for path in space.folder.glob("data/blobs/shards/*"):
                path.unlink()
            space.json(verb, *settings)
            assert list(space.folder.glob("data/blobs/shards/*")), verb
