"""A champion that cannot be compared with is named before anything is trained, with ways out that work."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.client import MlflowClient
from safetensors.torch import save_file

from diffusion.checkpoints import read_tensors, save_tensors
from diffusion.common.errors import UserError
from diffusion.common.files import canonical_json
from diffusion.common.model_files import METADATA_KEY, read_header
from diffusion.process.samplers import sampling_config
from flows.config import Params
from flows.registry import champion, model_versions
from flows.registry.aliases import read_verified_history
from flows.registry.champion import champion_problem, require_champion
from flows.registry.ledger import Ledger
from flows.registry.model_versions import Version, resolve
from tests.builders.model_versions import add_version
from tests.builders.small_models import write_model


@pytest.fixture
def params(mlflow_client: MlflowClient, bucket: str) -> Params:
    return Params.model_validate({"training": {"dataset": "faces"}, "registry": {"model": bucket}})


@pytest.fixture
def versions(mlflow_client: MlflowClient, params: Params, tmp_path: Path) -> list[Version]:
    """Four of them, each at its number; 1 and then 2 were champion."""
    version_list = [add_version(mlflow_client, tmp_path / "registry", params.model_name) for _ in range(4)]
    require_champion.fn(params)
    for number in (1, 2):
        champion.promote(params.model_name, number)
    require_champion.fn(params)
    return [version_list[0], *version_list]


def test_a_reason_that_comes_too_late_is_not_dropped_silently(params: Params, versions: list[Version]) -> None:
    def entries() -> int:
        return len(Ledger.of(params.model_name).read().entries)

    before = entries()
    with pytest.raises(UserError, match="champion already"):
        champion.promote(params.model_name, 2, "the hands are better")
    assert champion.promote(params.model_name, 2).version.number == 2
    assert entries() == before
    # A command that was killed behind its entry, and is repeated, has the reason of the entry.
    for _ in range(2):
        champion.promote(params.model_name, 3, "the hands are better")
    assert entries() == before + 1


def delete_version(client: MlflowClient, version: Version) -> None:
    client.delete_model_version(version.model, str(version.number))


def weights(client: MlflowClient, version: Version) -> Path:
    source = client.get_model_version(version.model, str(version.number)).source or ""
    return Path(source.removeprefix("file://"), "artifacts", "weights.safetensors")


def delete_weights(client: MlflowClient, version: Version) -> None:
    weights(client, version).unlink()


def alter_weights(client: MlflowClient, version: Version) -> None:
    weights(client, version).write_bytes(b"others")


def problem(params: Params) -> str:
    """What is said before a training, which `history` says as well if it can be seen without the weights."""
    with pytest.raises(UserError) as error:
        require_champion.fn(params)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.slow
@pytest.mark.parametrize("strike", [delete_version, delete_weights, alter_weights])
def test_both_remedies_for_a_deleted_champion_are_named_and_work(
    mlflow_client: MlflowClient,
    params: Params,
    versions: list[Version],
    strike: Callable[[MlflowClient, Version], None],
) -> None:
    strike(mlflow_client, versions[2])
    message = problem(params)
    history = read_verified_history(mlflow_client, Ledger.of(params.model_name))
    assert champion_problem(mlflow_client, history) == message
    assert "`darkroom model rollback` makes version 1 champion" in message
    assert "`darkroom promote --to 4` makes version 4 champion" in message
    assert champion.roll_back(params.model_name).version.number == 1
    require_champion.fn(params)
    if strike is delete_version:
        # That rollback's champion as well, so that it looks as if it had been killed.
        strike(mlflow_client, versions[1])
        assert "rollback" not in problem(params)
        with pytest.raises(UserError, match=r"models:/.*@champion is not in the registry any more \(version 1\)"):
            resolve(mlflow_client, f"models:/{params.model_name}@champion")
    assert champion.promote(params.model_name, 4).version.number == 4
    require_champion.fn(params)


def test_a_deleted_champion_can_be_rolled_back(
    mlflow_client: MlflowClient, params: Params, versions: list[Version]
) -> None:
    champion.promote(params.model_name, 3)
    assert champion.roll_back(params.model_name).version.number == 2
    delete_version(mlflow_client, versions[2])
    assert "`darkroom model rollback` makes version 1 champion" in problem(params)
    assert champion.roll_back(params.model_name).version.number == 1
    require_champion.fn(params)


def test_only_working_remedies_are_named(mlflow_client: MlflowClient, params: Params, versions: list[Version]) -> None:
    mlflow_client.set_model_version_tag(params.model_name, "1", "darkroom.takedown", "0123abcd")
    delete_weights(mlflow_client, versions[4])
    delete_version(mlflow_client, versions[2])
    message = problem(params)
    assert re.findall(r"darkroom \w+[^`]*", message) == ["darkroom promote --to 3"]
    delete_version(mlflow_client, versions[3])
    message = problem(params)
    assert "`" not in message
    assert "registry.model=NAME" in message
    require_champion.fn(params.model_copy(update={"registry": params.registry.model_copy(update={"model": "other"})}))


@pytest.mark.parametrize("value", [float("nan"), 1.0], ids=["not finite", "altered"])
def test_damaged_weights_become_champion_in_no_way(
    mlflow_client: MlflowClient, params: Params, versions: list[Version], tmp_path: Path, value: float
) -> None:
    path = write_model(tmp_path / "model.safetensors", seed=9, images=9)
    tensors, header = read_tensors(path, ""), read_header(path)
    next(iter(tensors.values())).view(-1)[0] = value
    if value == 1.0:  # by something that knows nothing of digests
        save_file(tensors, path, {METADATA_KEY: canonical_json(header)})
    else:
        save_tensors(path, tensors, header)
    version = add_version(mlflow_client, tmp_path / "registry", params.model_name, data=path.read_bytes())
    with pytest.raises(UserError):
        champion.promote(params.model_name, version.number)
    with pytest.raises(UserError):
        model_versions.register(params.model_name, "0" * 32, path, sampling_config(), {}, 9)
    assert read_verified_history(mlflow_client, Ledger.of(params.model_name)).alias_numbers.champion == 2


def test_deleted_or_recreated_registered_model_is_reported(
    mlflow_client: MlflowClient, params: Params, versions: list[Version], tmp_path: Path
) -> None:
    mlflow_client.delete_registered_model(params.model_name)
    assert "is not in MLflow's registry any more" in problem(params)
    for seed in range(3):
        data = write_model(tmp_path / "other.safetensors", seed, images=seed).read_bytes()
        add_version(mlflow_client, tmp_path / "anew", params.model_name, data=data)
    message = problem(params)
    assert "has other weights under that number" in message
    assert "`darkroom promote --to 3`" in message
    assert champion.promote(params.model_name, 3).version.number == 3
    require_champion.fn(params)
