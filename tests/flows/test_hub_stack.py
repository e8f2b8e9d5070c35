"""From a private data set of the Hub to a model on it, on real servers: what it names, and where no token is."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import ModelCard

from tests.builders.shapes import disc
from tests.builders.workspace import PARAMS, Workspace, running
from tests.hub import TOKEN, Hub

pytestmark = [pytest.mark.long, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    with running(tmp_path_factory.mktemp("workspace"), PARAMS, 0) as space:
        yield space


def discs(count: int) -> bytes:
    images = []
    for number in range(count):
        disc(number).save(stream := io.BytesIO(), "PNG")
        images.append({"bytes": stream.getvalue(), "path": None})
    pq.write_table(pa.table({"image": images}), stream := io.BytesIO())
    return stream.getvalue()


def test_pushed_model_has_its_evidence_and_no_token(workspace: Workspace, hub: Hub) -> None:
    card = b"---\nlicense: cc-by-4.0\n---\n"
    commit = hub.dataset("me/discs", {"README.md": card, "a.parquet": discs(240)}, private=True).refs["main"]
    source = f"hf://datasets/me/discs@{commit}"
    workspace.variables |= {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1"}
    assert "HF_TOKEN" in workspace.run("ingest", "hf://datasets/me/discs", code=2)
    workspace.variables["HF_TOKEN"] = TOKEN
    workspace.fork()

    result = workspace.json("retrain", "hf://datasets/me/discs@main", "--count", "8", "-v")
    assert result["data"]["result"]["source"] == source
    assert workspace.json("data", "show")["sources"] == [source]
    before = len(hub.paths("parquet"))
    assert workspace.json("ingest", "hf://datasets/me/discs@main")["read"] == 0
    assert len(hub.paths("parquet")) == before

    export = ("model", "export", "--to", "diffusers", "--out", "exports/discs", "--push", "hf://me/discs-model")
    assert workspace.json(*export)["pushed"]["created"]
    assert not workspace.json(*export)["pushed"]["created"]
    repo = hub.repos["model", "me/discs-model"]
    about = ModelCard(repo.files["README.md"].decode())
    assert (about.data.license, about.data.datasets) == ("cc-by-4.0", ["me/discs"])
    results = {each.metric_type: each for each in about.data.eval_results or []}
    low, high = results["kid_efflite0"].metric_args["interval"]
    assert low < results["kid_efflite0"].metric_value < high
    assert repo.private
    assert [path for path in repo.files if re.fullmatch(r"samples/.*\.png", path)]

    # Logs, MLflow's and Prefect's databases, objects on S3, manifests, the pushed files.
    assert not [path for path in _files(workspace.folder) if TOKEN.encode() in path.read_bytes()]
    assert not [path for path, data in repo.files.items() if TOKEN.encode() in data]


def _files(folder: Path) -> list[Path]:
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(paths) > 50
    return paths
