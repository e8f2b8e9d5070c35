"""A pickle is a program. One is planted wherever Darkroom reads what somebody else could have written; none may run."""

import ast
import io
import pickle
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.client import MlflowClient
from mlflow.exceptions import MlflowException

from diffusion.checkpoints import load_model
from diffusion.common.errors import UserError
from diffusion.common.files import sha256_bytes, sha256_file
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.manifest import read_manifest
from diffusion.evaluation.cache import load_or_compute
from diffusion.training.checkpointing import Checkpoints
from flows.registry.model_versions import WEIGHTS, cached_weights, resolve
from tests.builders import ROOT
from tests.builders.reading_sources import png


class Planted:
    """Touches a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.trace,)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """The file that is there once a planted pickle has run; the fixture has seen that it would."""
    path = tmp_path / "ran"
    pickle.loads(pickle.dumps(Planted(path)))  # noqa: S301 (it is the test's own)
    path.unlink()
    return path


@pytest.fixture
def planted(trace: Path) -> bytes:
    """Of both kinds that torch.load knows the newer one is a zip with such bytes in it."""
    return pickle.dumps(Planted(trace))


@pytest.fixture
def planted_by_torch(trace: Path) -> bytes:
    file = io.BytesIO()
    torch.save(Planted(trace), file)
    return file.getvalue()


@pytest.mark.parametrize("ending", ["pyd", "pickle", "pkl", "pth", "pt", "npy", "npz", "cls", "json", "txt"])
def test_pickle_in_webdataset_shards_is_never_loaded(
    tmp_path: Path, trace: Path, planted: bytes, planted_by_torch: bytes, ending: str
) -> None:
    with tarfile.open(tmp_path / "000.tar", "w") as tar:
        for number in range(4):
            bad = planted_by_torch if ending in ("pth", "pt") else planted
            for name, data in ((f"{number:03d}.png", png(number)), (f"{number:03d}.{ending}", bad)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    config = IngestConfig(source=f"wds:{tmp_path / '000.tar'}", size=8, max_quarantined=1)
    with suppress(UserError):  # where the file says what an image is, nothing may be left to take in
        ingest(tmp_path / "data" / "set", config)
    assert not trace.exists()


def test_pickle_among_images_or_in_parquet_is_never_loaded(tmp_path: Path, trace: Path, planted: bytes) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(png(number))
    (folder / "bad.png").write_bytes(planted)
    result = ingest(tmp_path / "data" / "folder", IngestConfig(source=str(folder), size=8))
    assert (result.kept, [Path(each.source).name for each in result.quarantined]) == (4, ["bad.png"])
    pq.write_table(pa.table({"image": [*(png(number) for number in range(4)), planted]}), tmp_path / "x.parquet")
    result = ingest(tmp_path / "data" / "parquet", IngestConfig(source=str(tmp_path / "x.parquet"), size=8))
    assert (result.kept, len(result.quarantined)) == (4, 1)
    assert not trace.exists()


def test_pickle_instead_of_a_manifest_or_shard_is_never_loaded(dataset: Path, trace: Path, planted: bytes) -> None:
    shard = dataset / read_manifest(dataset).shards[0].name
    shard.write_bytes(planted)
    (dataset / "manifest.json").write_bytes(planted)
    with pytest.raises(UserError):
        read_manifest(dataset)
    assert not trace.exists()


def test_pickle_instead_of_a_checkpoint_is_never_loaded(
    tmp_path: Path, trace: Path, planted: bytes, planted_by_torch: bytes
) -> None:
    for data in (planted, planted_by_torch):
        path = tmp_path / "0000000640.safetensors"
        path.write_bytes(data)
        Path(f"{path}.sha256").write_text(f"{sha256_bytes(data)}\n")
        with pytest.raises(UserError, match=r"is not a model|something else than a model"):
            Checkpoints(tmp_path).newest()
        with pytest.raises(UserError, match=r"is not a model|something else than a model"):
            load_model(path)
    assert not trace.exists()


def test_pickle_in_the_feature_cache_is_never_loaded(tmp_path: Path, trace: Path, planted_by_torch: bytes) -> None:
    load_or_compute(tmp_path, {"number": 1}, lambda: {"features": torch.ones(2)})
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(planted_by_torch)
    path.with_suffix(".sha256").write_bytes(f"{sha256_file(path)}\n".encode())
    with pytest.raises(UserError, match=r"is not a model|something else than a model"):
        load_or_compute(tmp_path, {"number": 1}, lambda: {"features": torch.ones(2)})
    assert not trace.exists()


class Harmful(mlflow.pyfunc.PythonModel):
    """A model whose state is a program."""

    def __init__(self, trace: Path) -> None:
        self.planted = Planted(trace)

    def predict(self, model_input: list[str]) -> list[str]:
        """The input, as it came."""
        return model_input


def test_pickle_in_a_registered_model_is_never_loaded(
    mlflow_client: MlflowClient, tmp_path: Path, trace: Path, planted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(planted)
    monkeypatch.chdir(tmp_path)
    name = "harmful"
    with mlflow.start_run():
        info = mlflow.pyfunc.log_model(
            name="model", python_model=Harmful(trace), artifacts={"weights": str(weights)}, pip_requirements=[]
        )
    mlflow.register_model(info.model_uri, name, tags={WEIGHTS: sha256_file(weights)})
    version = resolve(mlflow_client, f"models:/{name}/1")
    with pytest.raises(UserError, match=r"is not a model|something else than a model"):
        load_model(cached_weights(version, tmp_path / "models"))
    # As flows.environment sets it for every command, and infra/compose.yaml for every service.
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    with pytest.raises(MlflowException, match=r"(?i)pickle"):
        mlflow.pyfunc.load_model(version.uri)
    assert not trace.exists()


ITS_OWN = ROOT / "diffusion" / "data" / "fan_out.py"
"""Pickles what it sends to processes that it started, as multiprocessing does, without files for torch's tensors."""
FORBIDDEN = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}


@pytest.mark.parametrize("package", ["diffusion", "flows"])
def test_no_module_uses_unpickling_functions(package: str) -> None:
    for path in {*(ROOT / package).rglob("*.py")} - {ITS_OWN}:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not FORBIDDEN & {alias.name.partition(".")[0] for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in FORBIDDEN, path
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if called == "torch.load":
                    assert arguments.get("weights_only") == "True", f"{path}:{node.lineno}"
                assert arguments.get("allow_pickle", "False") == "False", f"{path}:{node.lineno}"
                assert called not in ("yaml.load", "yaml.unsafe_load", "eval", "exec"), f"{path}:{node.lineno}"
