"""Of several machines that begin the same training at the same time, all go on with one run."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any
from uuid import uuid4

import pytest
from mlflow.client import MlflowClient
from mlflow.entities import ViewType

from flows.storage.numbered_objects import Claims
from flows.storage.s3 import Store
from flows.tracking.runs import TRAIN_KEY, find_or_create_run, find_run
from tests.builders.model_versions import Killed

KEY = "0123" * 16


@pytest.fixture
def experiment(mlflow_client: MlflowClient, bucket: str) -> str:
    return f"e{uuid4().hex}"


def begun(client: MlflowClient, experiment: str) -> str:
    return str(find_or_create_run(client, experiment, TRAIN_KEY, KEY, "train").info.run_id)


def runs(client: MlflowClient, experiment: str, view: int = ViewType.ACTIVE_ONLY) -> set[str]:
    mlflow_experiment = client.get_experiment_by_name(experiment)
    return {run.info.run_id for run in client.search_runs([mlflow_experiment.experiment_id], run_view_type=view)}


@pytest.fixture
def before_it_claims(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Has whoever made a run do something before it is claimed."""

    def arm(act: Callable[[], Any]) -> None:
        claim = Claims.claim

        def acting(self: Claims, *arguments: Any) -> str:
            act()
            return claim(self, *arguments)

        monkeypatch.setattr(Claims, "claim", acting)

    return arm


def test_concurrent_starts_leave_one_run(
    mlflow_client: MlflowClient,
    experiment: str,
    before_it_claims: Callable[[Callable[[], Any]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mlflow_client.create_experiment(experiment)
    create, looked = MlflowClient.create_run, Barrier(3, timeout=240)

    def create_when_all_have_looked(*arguments: Any, **named: Any) -> Any:
        looked.wait()
        return create(*arguments, **named)

    monkeypatch.setattr(MlflowClient, "create_run", create_when_all_have_looked)
    before_it_claims(Barrier(3, timeout=240).wait)
    with ThreadPoolExecutor(3) as pool:
        [run_id] = set(pool.map(partial(begun, mlflow_client), [experiment] * 3))
    assert runs(mlflow_client, experiment) == {run_id}
    assert len(runs(mlflow_client, experiment, ViewType.ALL)) == 3
    run_ids = find_run(mlflow_client, experiment, TRAIN_KEY, KEY)
    assert run_ids.info.run_id == run_id


def test_unclaimed_run_of_a_killed_machine_is_reused_or_deleted(
    mlflow_client: MlflowClient,
    experiment: str,
    before_it_claims: Callable[[Callable[[], Any]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def die() -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Claims, "claim", lambda *_: die())
        with pytest.raises(Killed):
            begun(mlflow_client, experiment)
    [run] = runs(mlflow_client, experiment)
    assert begun(mlflow_client, experiment) == run
    # Another one that was killed there, when the first had looked and not claimed yet.
    where = mlflow_client.get_run(run).info.experiment_id
    mlflow_client.create_run(where, tags={TRAIN_KEY: KEY}, start_time=0)
    assert begun(mlflow_client, experiment) == run
    assert runs(mlflow_client, experiment) == {run}


def test_deleted_run_is_replaced_by_a_new_one(mlflow_client: MlflowClient, experiment: str, bucket: str) -> None:
    first = begun(mlflow_client, experiment)
    mlflow_client.set_tag(first, TRAIN_KEY, f"{KEY} (restarted)")
    second = begun(mlflow_client, experiment)
    mlflow_client.delete_run(second)
    assert find_run(mlflow_client, experiment, TRAIN_KEY, KEY) is None
    store = Store()
    for number, data in ((3, b"{}"), (4, b'{"made": "../x"}'), (6, b"[" * 5000)):
        store.put_once(bucket, f"claims/{experiment}/{KEY}/{number:08d}.json", data)
    third = begun(mlflow_client, experiment)
    assert len({first, second, third}) == 3
    assert begun(mlflow_client, experiment) == third
    assert sorted(store.list_keys(bucket, f"claims/{experiment}/{KEY}/"))[4].endswith("/00000005.json")
