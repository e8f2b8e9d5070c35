"""What a retraining begins with: decided by ledger, network and data, and the same again after a kill."""

from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from mlflow.client import MlflowClient
from safetensors.torch import load_file

from diffusion.common.errors import UserError
from diffusion.common.files import sha256_file
from diffusion.data.manifest import read_manifest, write_manifest
from diffusion.process.samplers import sampling_config
from diffusion.training.train import train
from diffusion.training.warm_start import export_state
from flows.config import Params, load_params
from flows.registry.aliases import append
from flows.registry.dependencies import resolve_params
from flows.registry.ledger import Evidence, Ledger
from flows.registry.model_versions import Version, cached_checkpoint
from flows.registry.retraining_start import decide_start, preview_retraining_start, resolve_retraining_start
from tests.builders.model_versions import add_version
from tests.builders.small_autoencoders import autoencoder, colours, denoiser, latent
from tests.builders.small_models import CONFIG, write_model

CLASSES = {"even": 24, "odd": 24}
Judge = Callable[..., Version]


@pytest.fixture
def params(dataset: Path, mlflow_client: MlflowClient, bucket: str) -> Params:
    """Retrainings of ``dataset``, of a model of its own."""
    network = ",".join(f"{name}: {value}" for name, value in CONFIG.model_dump(mode="json", exclude_unset=True).items())
    return load_params(
        Path("params.yaml"),
        ["training.dataset=blobs", "training.images=320", f"model={{{network}}}", f"registry.model={bucket}"],
    )


@pytest.fixture
def judge(params: Params, mlflow_client: MlflowClient, tmp_path: Path) -> Judge:
    """Registers a new version, of the chain's warm start ``warm`` if that is given, with a verdict of the gate."""

    def judge(verdict: str = "promote", warm: int | None = None, **options: object) -> Version:
        number = len(mlflow_client.search_model_versions(f"name = '{params.model_name}'"))
        path = tmp_path / f"{number}.safetensors"
        write_model(path, number, images=1, **({"classes": CLASSES} | options))  # type: ignore[arg-type]
        tags = {} if warm is None else {"darkroom.warm_start": str(warm)}
        version = add_version(mlflow_client, tmp_path, params.model_name, data=path.read_bytes(), **tags)
        record_verdict(mlflow_client, version, verdict)
        return version

    return judge


def record_verdict(client: MlflowClient, version: Version, verdict: str = "promote") -> None:
    evidence = Evidence(verdict=verdict, reason="measured")  # type: ignore[arg-type]
    append(
        client,
        Ledger.of(version.model),
        lambda history: history.next_entry(
            verdict,
            version.number,
            version.weights_sha256,
            evidence=evidence,  # type: ignore[arg-type]
        ),
    )


def change_data(params: Params, content: str) -> None:
    manifest = read_manifest(params.dataset_folder)
    write_manifest(params.dataset_folder, manifest.model_copy(update={"content_digest": content * 64}))


def changed(params: Params, section: str, **fields: object) -> Params:
    return params.model_copy(update={section: getattr(params, section).model_copy(update=fields)})


def test_retraining_goes_on_from_the_champion_for_a_quarter_of_the_images(params: Params, judge: Judge) -> None:
    first = decide_start(params)
    assert (first.version, first.apply(params)) == (None, params)
    champion = judge()
    start = decide_start(params)
    assert start.version == champion.uri
    training = start.apply(params).training
    assert (training.init_from, training.warm_start, training.images) == (champion.uri, True, 80)
    assert training.learning_rate == params.retraining.learning_rate * params.training.learning_rate
    minutes = start.apply(changed(params, "training", images=None, minutes=8.0)).training
    assert (minutes.images, minutes.minutes) == (None, 2.0)


def test_start_stays_when_the_champion_changes(params: Params, judge: Judge) -> None:
    first = judge()
    assert resolve_retraining_start(params).version == first.uri
    second = judge(warm=1)
    assert resolve_retraining_start(params).version == first.uri
    assert decide_start(params).version == second.uri
    change_data(params, "1")
    assert resolve_retraining_start(params).version == second.uri
    assert resolve_params(resolve_retraining_start(params).apply(params)).warm_start == 2


def test_every_few_retrainings_begin_from_nothing(params: Params, judge: Judge) -> None:
    params = changed(params, "retraining", fresh_every=3)
    judge()
    for night in (1, 2):
        assert decide_start(params).version is not None
        last = judge(warm=night)
    assert decide_start(params).version is None
    assert decide_start(changed(params, "retraining", fresh_every=None)).version == last.uri
    judge("reject")  # that from nothing, which was worse
    assert decide_start(params).version == last.uri


def test_warm_starts_that_are_held_end_in_one_from_nothing(params: Params, judge: Judge) -> None:
    params = changed(params, "retraining", fresh_after_held=2)
    champion = judge()
    judge("hold", warm=1)
    assert decide_start(params).version == champion.uri
    judge("reject", warm=1)
    assert decide_start(params).version is None
    assert decide_start(changed(params, "retraining", fresh_after_held=None)).version == champion.uri
    judge("hold")
    assert decide_start(params).version == champion.uri


def test_takedown_ends_the_chain(params: Params, judge: Judge, mlflow_client: MlflowClient) -> None:
    first = judge()
    assert resolve_retraining_start(params).version == first.uri
    second = judge(warm=1)
    mlflow_client.set_model_version_tag(second.model, str(second.number), "darkroom.start", first.uri)
    mlflow_client.set_model_version_tag(first.model, str(first.number), "darkroom.takedown", "a")
    assert decide_start(params).version is None
    assert resolve_retraining_start(params).version is None


@pytest.mark.parametrize(
    ("options", "section", "fields"),
    [
        ({"config": CONFIG.model_copy(update={"width": 32})}, "training", {}),
        ({"classes": CLASSES | {"round": 1}}, "training", {}),
        ({}, "training", {"init_from": "champion"}),
        ({}, "training", {"init_from": "models:/other/1", "warm_start": True}),
        ({}, "retraining", {"warm_start": False}),
    ],
)
def test_retraining_begins_from_nothing_or_as_configured(
    params: Params, judge: Judge, options: dict[str, object], section: str, fields: dict[str, object]
) -> None:
    judge(**options)
    params = changed(params, section, **fields)
    start = decide_start(params)
    assert start.version is None
    assert start.apply(params) is params


def test_champion_of_the_same_data_is_not_trained_again(params: Params, judge: Judge) -> None:
    champion = judge()
    change_data(params, "0")
    assert decide_start(params).version is None
    assert preview_retraining_start(params, has_new_data=True).version == champion.uri


def test_preview_is_what_is_recorded_and_records_nothing(params: Params, judge: Judge) -> None:
    judge()
    assert preview_retraining_start(params, has_new_data=False).version is not None
    first = judge()
    assert resolve_retraining_start(params).version == first.uri
    second = judge()
    assert preview_retraining_start(params, has_new_data=False).version == first.uri
    assert preview_retraining_start(params, has_new_data=True).version == second.uri


def test_deleted_champion_is_named_with_ways_out(params: Params, judge: Judge, mlflow_client: MlflowClient) -> None:
    judge()
    champion = judge()
    mlflow_client.delete_model_version(champion.model, str(champion.number))
    with pytest.raises(UserError, match="promote --to 1"):
        decide_start(params)


def test_start_says_its_length_and_what_would_have_to_change(params: Params, judge: Judge) -> None:
    judge()
    assert "for 80 of 320 images" in decide_start(params).text
    judge(config=CONFIG.model_copy(update={"width": 32}))
    assert decide_start(params).text.endswith("to begin with it, give --set model.width=32")


@pytest.mark.parametrize("family", ["gan", "diffusers"])
def test_families_that_cannot_go_on_begin_from_nothing(family: str, params: Params) -> None:
    other = Params.parse({"model": {"family": family}, "training": {"dataset": "blobs"}})
    assert not other.may_continue
    assert family in decide_start(other).text


def test_rate_of_warm_starts_suits_the_optimizer() -> None:
    tree = {"training": {"optimizer": "prodigy", "learning_rate": 0.2}, "retraining": {"learning_rate": 0.25}}
    with pytest.raises(UserError, match=r"retraining\.learning_rate"):
        Params.parse(tree)
    assert not Params.parse(tree | {"retraining": {"learning_rate": 0.25, "warm_start": False}}).may_continue


def test_training_state_beside_the_weights_is_taken_over(
    params: Params, dataset: Path, mlflow_client: MlflowClient, tmp_path: Path
) -> None:
    short = params.training.model_copy(update={"images": 64, "batch_size": 16, "guide": None})
    run = train(dataset, tmp_path / "night", params.model, short, sampling_config(steps=2, compute_batch=36))
    checkpoint = max((run.output / "checkpoints").glob("*.safetensors"))
    version = add_version(mlflow_client, tmp_path, params.model_name, data=run.final.read_bytes())
    assert load_file(cached_checkpoint(version)).keys() == load_file(run.final).keys()
    state = tmp_path / version.weights_sha256 / "artifacts" / "state.safetensors"
    export_state(checkpoint, state)
    sha256 = sha256_file(state)
    mlflow_client.set_model_version_tag(version.model, "1", "darkroom.state_sha256", sha256)
    version = version.model_copy(update={"tags": version.tags | {"darkroom.state_sha256": sha256}})
    whole, expected = load_file(cached_checkpoint(version)), load_file(checkpoint)
    assert whole.keys() == expected.keys()
    assert all(torch.equal(whole[name], expected[name]) for name in expected)

    record_verdict(mlflow_client, version)
    change_data(params, "2")
    assert "with its optimizer state" in decide_start(params).reason
    assert "averaged weights alone" in decide_start(changed(params, "training", optimizer="adamw")).reason

    joined = cached_checkpoint(version)
    for damage in (joined.read_bytes()[:-4], b"\0" * 9):
        joined.write_bytes(damage)
        assert load_file(cached_checkpoint(version)).keys() == expected.keys()
    state.write_bytes(b"damaged")
    (joined.parent / f"{sha256}.safetensors").unlink()
    assert load_file(cached_checkpoint(version)).keys() == load_file(run.final).keys()
    assert "averaged weights alone" in decide_start(params).reason


def test_latent_model_goes_on_until_there_is_another_autoencoder(
    mlflow_client: MlflowClient, bucket: str, tmp_path: Path
) -> None:
    data, short = colours(tmp_path / "data" / "blobs"), {"images": 16, "checkpoints": 1, "warmup_images": 16}
    first, second = (autoencoder(data, tmp_path / f"{seed}", config=short | {"seed": seed}).final for seed in (1, 2))
    weights = latent(data, tmp_path / "latent", denoiser(first), config=short).final
    network = denoiser(f"models:/{bucket}-vae@champion").model_dump(mode="json", exclude_unset=True)
    training = {"dataset": "blobs", "images": 320, "batch_size": 16}
    params = Params.parse({"model": network, "training": training, "registry": {"model": bucket}})

    def promote(model: str, weights: Path, **tags: str) -> str:
        version = add_version(mlflow_client, tmp_path / model, model, data=weights.read_bytes(), **tags)
        record_verdict(mlflow_client, version)
        return version.uri

    with chdir(tmp_path):
        change_data(params, "1")
        encoder = promote(f"{bucket}-vae", first)
        champion = promote(bucket, weights, **{"darkroom.autoencoder": encoder})
        assert resolve_retraining_start(params).version == champion
        promote(f"{bucket}-vae", second)
        assert resolve_retraining_start(params).version is None
        assert decide_start(params).text.endswith(f"to begin with it, give --set model.autoencoder={encoder}")
