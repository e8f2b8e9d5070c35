"""Work on a data set whose shards are on the remote alone: what reads them gets them."""

from contextlib import closing
from pathlib import Path

import pytest
import torch

from diffusion.data.dataset import Dataset
from diffusion.data.ingest.ingest import ingest
from flows.config import Params
from flows.datasets.remote_shards import RemoteShards
from flows.datasets.sync import require_shards
from tests.builders.catalogs import FOLDER, Place
from tests.builders.workspace import PARAMS, Workspace, running


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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_ingest_on_ray_is_followed_by_all_steps_of_a_retraining(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with running(tmp_path, PARAMS, 120) as space:
        on_ray = ("retrain", "images", "--count", "1", "--set", "ingest.runner=ray")
        streamed = space.json(*on_ray, "--set", "training.stream_bytes=10000000", "--set", "training.images=320")
        assert streamed["data"]["result"]["changed"]
        forget_shards(space)
        assert space.json(*on_ray)["run_id"] != streamed["run_id"]
        forget_shards(space)
        assert space.json("monitor")["figures"]


def forget_shards(space: Workspace) -> None:
    """As after an ingest on Ray."""
    assert (shards := list(space.folder.glob("data/blobs/shards/*")))
    for path in shards:
        path.unlink()
