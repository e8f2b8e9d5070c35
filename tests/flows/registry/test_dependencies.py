"""The version that a training begins with: decided once, so that a champion never trains on itself for ever."""

from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.client import MlflowClient

from diffusion.common.errors import UserError
from diffusion.data.manifest import read_manifest, write_manifest
from flows.checks import check
from flows.config import Params, load_params, registered_initial_weights
from flows.registry import champion
from flows.registry.dependencies import require_versions_without_takedown, resolve_params, resolve_start
from tests.builders.model_versions import add_version
from tests.builders.small_models import write_model


@pytest.fixture
def params(dataset: Path, mlflow_client: MlflowClient, bucket: str) -> Params:
    """A training of ``dataset`` that begins with the champion, of a model of its own."""
    overrides = [
        "training.dataset=blobs",
        "training.images=320",
        "training.init_from=champion",
        f"registry.model={bucket}",
    ]
    return load_params(Path("params.yaml"), overrides)


@pytest.fixture
def promote_new(params: Params, mlflow_client: MlflowClient, tmp_path: Path) -> Callable[[], None]:
    """Registers a new version of the model of ``params``, and makes it champion."""

    def promote() -> None:
        number = len(mlflow_client.search_model_versions(f"name = '{params.model_name}'"))
        path = write_model(tmp_path / f"{number}.safetensors", number, images=1)
        version = add_version(mlflow_client, tmp_path, params.model_name, data=path.read_bytes())
        champion.promote(params.model_name, version.number)

    return promote


def begun(params: Params) -> str | None:
    version = resolve_start(params, registered_initial_weights(params) or "")
    return version and version.uri


def other(params: Params, **changes: object) -> Params:
    return params.model_copy(update={"training": params.training.model_copy(update=changes)})


def test_init_from_is_fixed_until_configuration_or_data_change(params: Params, promote_new: Callable[[], None]) -> None:
    name = params.model_name
    promote_new()
    assert begun(params) == f"models:/{name}/1"
    promote_new()
    assert begun(params) == f"models:/{name}/1"
    assert begun(other(params, batch_size=64)) == f"models:/{name}/1"  # the default, in numbers
    assert begun(other(params, seed=1)) == f"models:/{name}/2"
    manifest = read_manifest(params.dataset_folder)
    write_manifest(params.dataset_folder, manifest.model_copy(update={"content_digest": "0" * 64}))
    assert begun(params) == f"models:/{name}/2"


def test_init_from_is_random_without_a_champion(params: Params, promote_new: Callable[[], None]) -> None:
    ready = resolve_params(params)
    assert (ready.params.training.init_from, ready.start) == (None, None)
    assert ready.requested.training.init_from == "champion"
    promote_new()
    assert resolve_params(params).start is None
    assert resolve_params(other(params, images=640)).start == f"models:/{params.model_name}/1"


def test_init_from_weights_come_with_their_takedowns(
    params: Params, promote_new: Callable[[], None], mlflow_client: MlflowClient, tmp_path: Path
) -> None:
    promote_new()
    mlflow_client.set_model_version_tag(params.model_name, "1", "darkroom.takedown", "b,a")
    ready = resolve_params(other(params, init_from=f"models:/{params.model_name}/1"))
    assert ready.params.training.init_from is not None
    assert Path(ready.params.training.init_from).read_bytes() == (tmp_path / "0.safetensors").read_bytes()
    assert ready.takedown == "a,b"


def test_base_model_under_takedown_stops_a_retraining_before_its_ingest(
    params: Params, promote_new: Callable[[], None], mlflow_client: MlflowClient
) -> None:
    promote_new()
    mlflow_client.set_model_version_tag(params.model_name, "1", "darkroom.takedown", "b,a")
    with pytest.raises(UserError, match=r"takedown b,a"):
        check("retrain", other(params, init_from=f"models:/{params.model_name}/1"), connected=True)
    require_versions_without_takedown(params)  # a champion is replaced by random weights


def test_dry_run_does_not_fix_init_from(params: Params, promote_new: Callable[[], None]) -> None:
    promote_new()
    assert resolve_params(params, dry_run=True).start == f"models:/{params.model_name}/1"
    promote_new()
    assert begun(params) == f"models:/{params.model_name}/2"


def test_deleted_init_from_version_is_named_with_a_remedy(
    params: Params, promote_new: Callable[[], None], mlflow_client: MlflowClient
) -> None:
    promote_new()
    assert begun(params) == f"models:/{params.model_name}/1"
    promote_new()
    mlflow_client.delete_model_version(params.model_name, "1")
    with pytest.raises(UserError, match=r"begins with models:/.*/1, which is not in the registry any more"):
        begun(params)
    assert begun(other(params, seed=1)) == f"models:/{params.model_name}/2"


def test_missing_init_from_version_is_named(params: Params) -> None:
    with pytest.raises(UserError, match="models:/nothing/3 is not in the registry"):
        resolve_params(other(params, init_from="models:/nothing/3"))
