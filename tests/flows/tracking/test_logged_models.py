"""Judged checkpoints in MLflow: each once, ranked by their scores, whatever was killed before."""

from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import mlflow
import pytest
from mlflow.client import MlflowClient
from mlflow.entities import LoggedModel

from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.results import Evaluation
from flows.tracking.runs import CHECKPOINT, CHECKPOINT_SHA256, EVAL_KEY, EVALUATED, RunTracker, log_evaluation
from tests.builders import evaluations
from tests.builders.model_versions import CrashingClient, Killed

WRITES = ("create_logged_model", "finalize_logged_model", "set_logged_model_tags", "log_batch")
CONTENT = "c" * 64


@pytest.fixture
def client(no_servers: None, mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    return MlflowClient()


@pytest.fixture
def run_id(client: MlflowClient, tmp_path: Path) -> str:
    """A new run in an experiment of its own."""
    experiment = client.create_experiment(uuid4().hex, artifact_location=tmp_path.as_uri())
    return str(client.create_run(experiment).info.run_id)


def an_evaluation(kids: Sequence[float], behind: Sequence[float] = (), seed: int = 0) -> Evaluation:
    """Of checkpoints evaluated in full, and of such that were ``behind`` in a round."""
    evaluation = evaluations.an_evaluation([*kids, *behind], "blobs")
    conditions = evaluation.conditions.model_copy(update={"evaluation": EvaluationConfig(seed=seed)})
    checkpoints = evaluation.checkpoints[: len(kids)]
    preliminary = [
        each.model_copy(update={"scores": evaluations.scores(each.scores.kid, samples=125)})
        for each in evaluation.checkpoints[len(kids) :]
    ]
    best = min(checkpoints, key=lambda each: each.scores.kid)
    about = {"conditions": conditions, "eval_key": conditions.key, "preliminary": preliminary}
    return evaluation.model_copy(update={**about, "checkpoints": checkpoints, "best": best})


def ranked(client: MlflowClient, run_id: str) -> list[LoggedModel]:
    """As MLflow's documentation says one ranks models."""
    models: list[LoggedModel] = mlflow.search_logged_models(
        [client.get_run(run_id).info.experiment_id],
        order_by=[{"field_name": "metrics.eval/kid_efflite0", "ascending": True, "dataset_name": "blobs"}],
        output_format="list",
    )
    return models


def points(client: MlflowClient, run_id: str, name: str = "eval/kid_efflite0") -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, name)]


def test_mlflow_ranks_the_checkpoints_by_their_scores(client: MlflowClient, run_id: str) -> None:
    evaluation = an_evaluation([0.5, 0.2, 0.3])
    log_evaluation(RunTracker(client, run_id), evaluation)
    ranking = ranked(client, run_id)
    assert [model.tags[CHECKPOINT] for model in ranking] == [f"runs/{number}.safetensors" for number in (1, 2, 0)]
    best = ranking[0]
    assert best.source_run_id == run_id
    assert best.status == "READY"
    assert best.tags[CHECKPOINT_SHA256] == evaluation.best.sha256
    assert (best.tags[EVAL_KEY], best.tags[EVALUATED]) == (evaluation.eval_key, "in full")
    scores = {f"eval/{name}": value for name, value in evaluation.best.metrics().items()}
    assert {point.key: point.value for point in best.metrics} == scores
    assert {(point.dataset_name, point.dataset_digest, point.step) for point in best.metrics} == {
        ("blobs", CONTENT[:36], 2000)
    }
    # The run has its curve as well.
    assert points(client, run_id) == [(1000, 0.5), (2000, 0.2), (3000, 0.3)]


def test_partially_evaluated_checkpoints_rank_last(client: MlflowClient, run_id: str) -> None:
    log_evaluation(RunTracker(client, run_id), an_evaluation([0.5, 0.2], behind=[-0.1]))
    ranking = ranked(client, run_id)
    assert [model.tags[EVALUATED] for model in ranking] == ["in full", "in full", "preliminary"]
    assert {point.key: point.value for point in ranking[2].metrics} == {
        "eval/preliminary_kid_efflite0": -0.1,
        "eval/preliminary_samples": 125,
    }
    assert [step for step, _ in points(client, run_id)] == [1000, 2000]


def test_logging_models_twice_creates_no_duplicates(client: MlflowClient, run_id: str) -> None:
    evaluation = an_evaluation([0.5, 0.2], behind=[0.4])
    log_evaluation(RunTracker(client, run_id), evaluation)
    before = [(model.model_id, len(model.metrics)) for model in ranked(client, run_id)]
    log_evaluation(RunTracker(client, run_id), evaluation)
    assert [(model.model_id, len(model.metrics)) for model in ranked(client, run_id)] == before
    assert points(client, run_id) == [(1000, 0.5), (2000, 0.2)]


@pytest.mark.parametrize("life", range(6))
def test_logging_models_after_a_kill_creates_no_duplicates(client: MlflowClient, run_id: str, life: int) -> None:
    evaluation = an_evaluation([0.5, 0.2])
    with pytest.raises(Killed):
        log_evaluation(RunTracker(CrashingClient(life, WRITES, after=True), run_id), evaluation)
    log_evaluation(RunTracker(client, run_id), evaluation)
    ranking = ranked(client, run_id)
    assert [model.tags[CHECKPOINT_SHA256] for model in ranking] == [f"{number}" * 64 for number in (1, 0)]
    assert {model.status for model in ranking} == {"READY"}
    assert points(client, run_id) == [(1000, 0.5), (2000, 0.2)]


def test_reevaluated_checkpoint_keeps_its_logged_model(client: MlflowClient, run_id: str) -> None:
    log_evaluation(RunTracker(client, run_id), an_evaluation([0.5, 0.2]))
    anew = an_evaluation([0.1, 0.2], seed=1)
    log_evaluation(RunTracker(client, run_id), anew)
    ranking = ranked(client, run_id)
    assert [model.tags[CHECKPOINT_SHA256] for model in ranking] == [f"{number}" * 64 for number in (0, 1)]
    assert {model.tags[EVAL_KEY] for model in ranking} == {anew.eval_key}
    log_evaluation(RunTracker(client, run_id), an_evaluation([0.1, 0.2], behind=[0.4], seed=1))
    assert ranked(client, run_id)[2].tags[EVALUATED] == "preliminary"
    log_evaluation(RunTracker(client, run_id), an_evaluation([0.1, 0.2, 0.15], seed=1))
    assert [model.tags[EVALUATED] for model in ranked(client, run_id)] == ["in full"] * 3


def test_runs_have_separate_logged_models(client: MlflowClient, run_id: str) -> None:
    other = client.create_run(client.get_run(run_id).info.experiment_id).info.run_id
    for each in (run_id, other):
        log_evaluation(RunTracker(client, each), an_evaluation([0.5]))
    assert {model.source_run_id for model in ranked(client, run_id)} == {run_id, other}
