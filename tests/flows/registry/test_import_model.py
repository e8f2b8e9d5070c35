"""Models that were not trained here become versions: once, with their origin, and their weights lie once."""

from pathlib import Path
from uuid import uuid4

import mlflow
import pandas as pd
import pytest
import torch
from mlflow.client import MlflowClient
from safetensors.torch import load_file

import diffusion
from diffusion.checkpoints import read_model_header, save_tensors
from diffusion.common.errors import UserError
from diffusion.common.files import sha256_file, write_bytes
from diffusion.common.model_files import read_header
from diffusion.diffusers_format.adapter import export_adapter
from diffusion.diffusers_format.import_model import import_file
from diffusion.generation.config import UNCONDITIONAL
from diffusion.process.samplers import sampling_config
from flows import sample
from flows.config import SamplingBatchConfig
from flows.environment import settings
from flows.provenance.trace import trace
from flows.registry import model_versions
from flows.registry.import_model import ImportedModel, find_parts, import_model
from flows.registry.takedown_marks import find_derived
from flows.retention.sweeps import find_references
from flows.sampling import generate_batch
from flows.storage.s3 import Store
from flows.tracking.runs import START
from tests.builders.adapters import write_adapter
from tests.builders.model_cards import rows, section
from tests.builders.model_versions import Killed, killed, numbers
from tests.builders.pipelines import MAKERS, ddpm, stable_diffusion
from tests.builders.small_models import write_lora, write_model
from tests.hub import Hub

SAMPLING = sampling_config(sampler="dpmpp_2m", steps=2, compute_batch=4)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    # Of each test another one: they share a registry, and equal weights are stored once.
    return write_model(tmp_path / "elsewhere.safetensors", seed=uuid4().int % 2**32, images=70)


def imported(file: Path, name: str) -> ImportedModel:
    return import_model(str(file), name, "CC-BY-4.0", SAMPLING)


def test_a_model_without_a_licence_is_rejected(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--licence"):
        import_file(str(file), tmp_path / "out" / "model.safetensors", None, tmp_path)
    assert not (tmp_path / "out").exists()
    result = import_file(str(file), tmp_path / "out" / "model.safetensors", "CC0-1.0", tmp_path)
    assert result.origin.licence == "CC0-1.0"
    assert result.sha256 == sha256_file(result.file)


def test_other_names_refer_to_the_weights_imported_once(mlflow_client: MlflowClient, name: str, file: Path) -> None:
    result = imported(file, name)
    version, digest = result.version, sha256_file(file)
    assert (version.uri, version.weights_sha256) == (f"models:/{name}/1", digest)
    assert imported(file, name).version == version
    assert numbers(mlflow_client, name) == [1]
    other = imported(file, f"{name}-2").version
    assert (other.number, other.run_id) == (1, version.run_id)
    models = model_versions.find_stored_models(digest)
    assert len(models) == 1
    assert mlflow_client.get_model_version(other.model, "1").source == models[0].model_uri
    assert model_versions.cached_weights(other) == result.file

    run = mlflow_client.get_run(version.run_id)
    assert (run.info.status, run.data.params["import.source"]) == ("FINISHED", file.name)
    text = mlflow_client.get_model_version(name, "1").description
    assert rows(text, "Origin")["licence"] == ["CC-BY-4.0"]
    assert f"evaluate --model models:/{name}/1" in section(text, "How to call it")


def test_models_of_killed_imports_are_deleted_beside_their_version(
    mlflow_client: MlflowClient, name: str, file: Path
) -> None:
    version = imported(file, name).version
    experiment = mlflow_client.get_run(version.run_id).info.experiment_id
    mlflow_client.create_logged_model(experiment, "ddpm", version.run_id, {model_versions.WEIGHTS: sha256_file(file)})
    assert imported(file, name).version == version
    [model] = mlflow_client.search_logged_models([experiment])
    assert mlflow_client.get_model_version(name, "1").source == model.model_uri


def test_an_import_deletes_what_a_killed_one_was_writing(name: str, file: Path) -> None:
    cut = settings().folder / "imports" / name / f".weights.safetensors.{uuid4().hex}.partial"
    write_bytes(cut, b"half")
    imported(file, name)
    assert not cut.exists()


def test_weights_trained_here_keep_their_lineage(mlflow_client: MlflowClient, name: str, file: Path) -> None:
    about = {"darkroom.dataset": "faces", "darkroom.content_digest": "c" * 64, START: "models:/other/1"}
    run_id = mlflow_client.create_run(mlflow_client.create_experiment(name), tags=about).info.run_id
    model_versions.register(name, run_id, file, SAMPLING, about, 70)
    other = imported(file, f"{name}-2").version
    assert other.run_id == run_id
    assert {tag: other.tags[tag] for tag in about} == about
    assert not {model_versions.ORIGIN, model_versions.LICENCE} & other.tags.keys()


def test_the_trace_of_an_imported_model_ends_at_its_origin(name: str, file: Path, bucket: str) -> None:
    version = imported(file, name).version
    weights, config = model_versions.cached_weights(version), SamplingBatchConfig()
    batch, place = sample.begin.fn(version, weights, SAMPLING, config, 4, 5, None, UNCONDITIONAL)
    for chunk in range(len(batch.chunks())):
        generate_batch.fetch_and_generate(batch, place, version, config, chunk)
    generate_batch.finish(Store(), batch, place)
    lineage = trace(f"{place}/00000003.png")
    assert (lineage.broken, lineage.data) == ([], None)
    [origin] = lineage.origins
    assert (origin.uri, origin.licence) == (version.uri, "CC-BY-4.0")
    assert origin.files == {file.name: sha256_file(file)}


@pytest.mark.parametrize("step", ["create_model_version", "finalize_logged_model", "update_model_version", "log_dict"])
def test_a_killed_import_is_completed_by_the_same_command(
    mlflow_client: MlflowClient, name: str, file: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, step, killed)
        with pytest.raises(Killed):
            imported(file, name)
    version = imported(file, name).version
    assert (numbers(mlflow_client, name), version.number) == ([1], 1)
    assert len(model_versions.find_stored_models(version.weights_sha256)) == 1
    experiment = mlflow_client.get_experiment_by_name(name)
    assert [run.info.run_id for run in mlflow_client.search_runs([experiment.experiment_id])] == [version.run_id]


def test_gc_keeps_the_weights_of_a_deleted_base(
    mlflow_client: MlflowClient, name: str, file: Path, bucket: str
) -> None:
    base = imported(file, name).version
    other = write_model(file.with_name("other.safetensors"), seed=uuid4().int % 2**32, images=70)
    tuned_version = imported(other, f"{name}-tuned").version
    mlflow_client.set_model_version_tag(tuned_version.model, "1", model_versions.BASES, base.weights_sha256)
    mlflow_client.delete_model_version(base.model, "1")
    references = find_references(mlflow_client, Store(), bucket, [], {})
    assert base.run_id in references.runs
    assert base.weights_sha256 in references.weights
    model_versions.cached_weights(
        model_versions.get_version(mlflow_client, tuned_version.model, 1), file.parent / "cache"
    )
    assert sha256_file(file.parent / "cache" / f"{base.weights_sha256}.safetensors") == base.weights_sha256


def test_a_version_is_served_and_fetched_with_its_base(
    mlflow_client: MlflowClient, name: str, file: Path, bucket: str
) -> None:
    adapter = write_lora(file.parent / "tuned" / "lora.safetensors", file, 1)
    header = read_header(adapter)
    header["model_header"]["content_digest"] = "1" * 64
    save_tensors(adapter, load_file(adapter), header)
    with pytest.raises(UserError, match="darkroom model import"):
        imported(adapter, f"{name}-tuned")
    base = imported(file, name).version
    version = imported(adapter, f"{name}-tuned").version
    assert version.tags[model_versions.BASES] == base.weights_sha256
    # A takedown of images that the base learned from finds it.
    assert version.tags[START] == base.uri
    assert version.tags[model_versions.BASE_LICENCE] == "CC-BY-4.0"
    content = base.tags["darkroom.content_digest"]
    derived = find_derived(base.tags["darkroom.dataset"], [content], [content], bucket)
    assert {base.uri, version.uri} <= {each.uri for each in derived.models}
    cached = model_versions.cached_weights(version, file.parent / "cache")
    expected = diffusion.load(adapter, compute_batch=4).generate(count=2, seed=7)
    assert [x.tobytes() for x in diffusion.load(cached, compute_batch=4).generate(count=2, seed=7)] == [
        x.tobytes() for x in expected
    ]
    served = mlflow.pyfunc.load_model(version.uri)
    pngs = served.predict(pd.DataFrame({"seed": [7], "count": [2]}), params={"steps": 4})["png"]
    assert len(pngs) == 2


@pytest.mark.slow
def test_a_lora_of_another_tool_is_a_version_based_on_the_pipeline(
    mlflow_client: MlflowClient, name: str, tmp_path: Path
) -> None:
    base = import_model(str(stable_diffusion(tmp_path / "pipeline")), name, None, SAMPLING)
    adapter = write_adapter(tmp_path / "run" / "final.safetensors", base.file)
    export_adapter(adapter, tmp_path / "zwx", file_format="kohya")
    parts = find_parts(base.version.uri, None)
    result = import_model(str(tmp_path / "zwx" / "zwx.safetensors"), f"{name}-zwx", None, SAMPLING, parts)
    assert result.version.tags[START] == base.version.uri
    assert result.version.tags[model_versions.LICENCE] == "openrail"
    header = read_model_header(model_versions.cached_weights(result.version))
    assert header.base is not None
    assert (header.base.sha256, header.base.version) == (base.version.weights_sha256, base.version.uri)
    again = import_model(str(tmp_path / "zwx" / "zwx.safetensors"), f"{name}-zwx", None, SAMPLING, parts)
    assert again.version == result.version


@pytest.mark.parametrize("kind", ["ddpm", "stable_diffusion"])
def test_a_pipeline_becomes_a_version_with_its_own_licence(
    mlflow_client: MlflowClient, name: str, tmp_path: Path, kind: str
) -> None:
    folder = MAKERS[kind](tmp_path / kind)
    # Of each test another one.
    (folder / "README.md").write_text(f"{(folder / 'README.md').read_text()}\n{name}\n")
    result = import_model(str(folder), name, None, SAMPLING)
    assert (result.family, result.origin.licence, result.source) == ("diffusers", "openrail", kind)
    assert result.version.tags[model_versions.LICENCE] == "openrail"
    assert "model_index.json" in result.origin.files
    assert "darkroom.content_digest" not in result.version.tags
    uri = result.version.uri
    requirements = mlflow.artifacts.load_text(f"{uri}/requirements.txt").splitlines()
    assert {"diffusers", "transformers"} <= {line.partition("==")[0] for line in requirements}
    request = {"seed": [7], "count": [2]} | ({} if kind == "ddpm" else {"prompt": ["a red circle"]})
    served = mlflow.pyfunc.load_model(uri).predict(pd.DataFrame(request), params={"steps": 2})
    assert len(served) == 2


def test_a_rejected_pipeline_leaves_nothing(mlflow_client: MlflowClient, name: str, tmp_path: Path) -> None:
    folder = ddpm(tmp_path / "pipeline")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(UserError, match="pickle"):
        import_model(str(folder), name, None, SAMPLING)
    assert mlflow_client.get_experiment_by_name(name) is None


def test_a_pipeline_of_the_hub_equals_its_folder(hub: Hub, tmp_path: Path) -> None:
    folder = stable_diffusion(tmp_path / "painter")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    commit = hub.model("someone/painter", files).refs["main"]
    here = import_file(str(folder), tmp_path / "here.safetensors", None, tmp_path)
    there = import_file("hf://someone/painter@main", tmp_path / "there.safetensors", None, tmp_path / "downloads")
    assert (there.origin.source, there.origin.revision) == ("hf://someone/painter", commit)
    assert there.source == f"hf://someone/painter@{commit}"
    assert (there.origin.licence, here.origin.licence) == ("openrail", "openrail")
    assert there.origin.files == here.origin.files
    remote, local = load_file(there.file), load_file(here.file)
    assert remote.keys() == local.keys()
    assert all(torch.equal(remote[name], local[name]) for name in local)
