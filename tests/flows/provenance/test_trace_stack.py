"""``darkroom trace`` and ``darkroom reproduce`` on a real stack: the right links, and an exit code for every break."""

import io
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mlflow.client import MlflowClient
from PIL import Image, ImageOps

from diffusion.common.device import device_name
from diffusion.common.files import sha256_bytes
from diffusion.data.manifest import read_manifest
from tests.builders.workspace import PARAMS, Workspace, objects, running

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

BRIEF = PARAMS | {"training": PARAMS["training"] | {"images": 640, "checkpoints": 2, "keep": 1}}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    folder = tmp_path_factory.mktemp("workspace")
    git(folder, "init", "--quiet")
    git(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--allow-empty", "--quiet", "-m", "first")
    with running(folder, BRIEF, 60) as space:
        yield space


@pytest.fixture(scope="module")
def batch(workspace: Workspace) -> str:
    """Address of twelve samples of a model that has just been trained."""
    return str(workspace.json("retrain", "images", "--count", "12", "--seed", "5")["samples"]["uri"])


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_sample_is_traced_to_its_shards_and_reproduced(workspace: Workspace, server: MlflowClient, batch: str) -> None:
    image = f"{batch}00000007.png"
    sample = objects(workspace, batch)["00000007.png"][1]

    lineage = workspace.json("trace", image)
    manifest = read_manifest(workspace.folder / "data" / "blobs")
    assert (lineage["broken"], lineage["takedowns"]) == ([], [])
    assert (lineage["image"]["sha256"], lineage["image"]["as_generated"]) == (sha256_bytes(sample), True)
    assert (lineage["place"], lineage["batch"]["count"], lineage["finished"]) == (batch, 12, True)
    version = server.get_model_version_by_alias("blobs", "champion")
    assert (lineage["model"]["uri"], lineage["model"]["aliases"]) == (f"models:/blobs/{version.version}", ["champion"])
    assert lineage["model"]["tags"] == version.tags
    assert lineage["run"]["run_id"] == version.run_id
    # DVC has staged its own configuration.
    commit = git(workspace.folder, "rev-parse", "HEAD")
    assert (lineage["run"]["git_commit"], lineage["run"]["git_dirty"]) == (commit, True)
    assert (lineage["data"]["version"], lineage["data"]["content_digest"]) == (manifest.digest, manifest.content_digest)
    assert lineage["data"]["dvc_digest"] == version.tags["darkroom.dvc_digest"]
    assert [shard["sha256"] for shard in lineage["data"]["shards"]] == [shard.sha256 for shard in manifest.shards]
    for shard in lineage["data"]["shards"]:
        ((_, data),) = objects(workspace, shard["where"]).values()
        assert (len(data), sha256_bytes(data)) == (shard["bytes"], shard["sha256"])
    lines = workspace.run("trace", "-v", image)
    assert all(name in lines for name in (image, version.run_id, manifest.digest, manifest.shards[0].sha256))

    again = workspace.json("reproduce", batch, "--out", "again")
    assert (again["images"], again["exact"], again["code"]) == (12, 12, "shipped")
    assert (again["differences"], again["largest_error"]) == ("", 0)
    assert (workspace.folder / "again" / "00000007.png").read_bytes() == sample


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="has no other arithmetic to go to")
def test_reproduction_on_another_fingerprint_is_nearly_equal(workspace: Workspace, batch: str) -> None:
    workspace.variables["ATEN_CPU_CAPABILITY"] = "default"
    try:
        other = workspace.json("reproduce", f"{batch}00000007.png")
    finally:
        del workspace.variables["ATEN_CPU_CAPABILITY"]
    usual = device_name(torch.device("cpu"))
    scalar = usual.replace(torch.backends.cpu.get_cpu_capability(), "DEFAULT")
    assert other["differences"] == f"device: {usual} → {scalar}"
    assert other["mean_error"] <= 2


def test_trace_exits_1_for_an_altered_sample_2_for_unknown(workspace: Workspace, batch: str) -> None:
    client = workspace.s3_client()
    copied = {name: data for name, (_, data) in objects(workspace, batch).items()}
    buffer = io.BytesIO()
    ImageOps.invert(Image.open(io.BytesIO(copied["00000003.png"]))).save(buffer, "PNG")
    for name, data in (copied | {"00000003.png": buffer.getvalue()}).items():
        client.put_object(Bucket="darkroom", Key=f"altered/{name}", Body=data)

    lineage = workspace.json("trace", "s3://darkroom/altered/00000003.png", code=1)
    assert (lineage["image"]["as_generated"], len(lineage["broken"]), len(lineage["data"]["shards"])) == (False, 1, 1)
    again = workspace.json("reproduce", "s3://darkroom/altered/", "--count", "5", code=1)
    assert (again["exact"], again["altered"]) == (5, ["00000003.png"])
    error = workspace.run("trace", f"{batch}00000012.png", code=2)
    assert "00000012.png does not exist" in error
    assert len(error.strip().splitlines()) == 1
