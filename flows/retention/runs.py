"""Old runs in MLflow: marked as deleted first, and when the grace is over rid of all they hold."""

from datetime import UTC, datetime
from functools import cached_property

from mlflow.client import MlflowClient
from mlflow.entities import LifecycleStage, LoggedModel, Run, ViewType
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from flows.derived import pages
from flows.retention.config import RetentionConfig
from flows.retention.items import Fate, Item, Sweep, age, older
from flows.retention.live import CONTENT, Live
from flows.tracking import SWEEP, TRAIN_KEY

SET_ASIDE = "darkroom.set_aside"
"""Tag of a run that ``darkroom gc`` has marked as deleted: when, in ISO 8601."""


class Runs:
    """Trainings and sweeps that MLflow has on record, also those marked as deleted; nobody else's runs."""

    def __init__(self, client: MlflowClient, live: Live, policy: RetentionConfig, now: datetime) -> None:
        self.client = client
        self.live = live
        self.policy = policy
        self.now = now
        experiments = [each.experiment_id for each in pages(client.search_experiments)]
        found = pages(client.search_runs, experiment_ids=experiments, run_view_type=ViewType.ALL)
        self.runs: list[Run] = (
            [run for run in found if {TRAIN_KEY, SWEEP} & run.data.tags.keys()] if experiments else []
        )
        self.fates = {run.info.run_id: self._fate(run) for run in self.runs}

    def contents(self) -> dict[str, str]:
        """The contents of data sets that runs learned from which do not go yet, each with one of them."""
        return {
            run.data.tags.get(CONTENT, ""): f"run {run.info.run_id} learned from it"
            for run in self.runs
            if not self._goes(run)
        }

    def gone(self) -> frozenset[str]:
        """Train keys of runs that go, and of no other run."""
        others = {run.data.tags.get(TRAIN_KEY, "") for run in self.runs if not self._goes(run)}
        return frozenset(run.data.tags.get(TRAIN_KEY, "") for run in self.runs) - others

    def sweep(self) -> Sweep:
        """All of them; those that are deleted and hold nothing any more are no item."""
        items = [
            Item(kind="runs", name=f"runs:/{run.info.run_id}", bytes=None, fate=fate, why=why)
            for run in self.runs
            for fate, why in [self.fates[run.info.run_id]]
            if fate != "goes" or self._holds(run)
        ]
        return Sweep(items, self._act)

    def _act(self) -> None:
        for run in self.runs:
            run_id = run.info.run_id
            fate, _ = self.fates[run_id]
            if fate == "stays" and self._deleted(run) and SET_ASIDE in run.data.tags:
                # A version was made of it after all.
                self.client.restore_run(run_id)
                self.client.delete_tag(run_id, SET_ASIDE)
            if fate == "set aside" and not self._deleted(run):
                self.client.set_tag(run_id, SET_ASIDE, datetime.now(UTC).isoformat(timespec="seconds"))
                self.client.delete_run(run_id)
            if self._goes(run):
                self._empty(run)

    def _goes(self, run: Run) -> bool:
        """Whether what it holds is to be deleted now: where there is no grace, also if it is only set aside."""
        fate, _ = self.fates[run.info.run_id]
        return fate == "goes" or (fate == "set aside" and not self.policy.grace and self.live.unclear is None)

    def _empty(self, run: Run) -> None:
        """Delete what ``run`` holds; its lines in the database are for ``mlflow gc``, on the server."""
        for model in self._models.get(run.info.run_id, ()):
            get_artifact_repository(model.artifact_location).delete_artifacts()  # type: ignore[no-untyped-call]
            self.client.delete_logged_model(model.model_id)
        get_artifact_repository(run.info.artifact_uri).delete_artifacts()  # type: ignore[no-untyped-call]

    def _fate(self, run: Run) -> tuple[Fate, str]:
        policy, why = self.policy, self.live.runs.get(run.info.run_id)
        if self._deleted(run):
            aside = run.data.tags.get(SET_ASIDE)
            if aside is None:
                return "stays", "a person deleted them: `mlflow gc` is theirs to run"
            if why is not None:
                return "stays", f"{why}: brought back"
            try:
                since = datetime.fromisoformat(aside).astimezone(UTC)
            except (ValueError, OverflowError):
                return "stays", f"the tag {SET_ASIDE} of runs:/{run.info.run_id} is no time: delete the tag, or the run"
            if self.live.unclear is not None:
                return "set aside", self.live.unclear
            if self.now - since >= policy.grace:
                return "goes", f"set aside {since:%Y-%m-%d %H:%M} UTC"
            return "set aside", f"{since:%Y-%m-%d %H:%M} UTC"
        if why is not None:
            return "stays", why
        heard = _heard_of(run)
        if not older(heard, policy.run_days, self.now):
            return "stays", "all do" if policy.run_days is None else f"heard of within {policy.run_days:g} days"
        if self.live.unclear is not None:
            return "stays", self.live.unclear
        return "set aside", f"{age(heard, self.now)}, and no version was made of it"

    def _holds(self, run: Run) -> bool:
        return run.info.run_id in self._models or bool(self.client.list_artifacts(run.info.run_id))

    @cached_property
    def _models(self) -> dict[str, list[LoggedModel]]:
        """The models that each run has logged."""
        experiments = sorted({run.info.experiment_id for run in self.runs})
        found: dict[str, list[LoggedModel]] = {}
        for model in pages(self.client.search_logged_models, experiment_ids=experiments) if experiments else ():
            found.setdefault(model.source_run_id or "", []).append(model)
        return found

    @staticmethod
    def _deleted(run: Run) -> bool:
        return bool(run.info.lifecycle_stage == LifecycleStage.DELETED)


def _heard_of(run: Run) -> datetime:
    """When the run last said something: a training that was killed is never marked as ended."""
    moments = [run.info.start_time, run.info.end_time or 0, *(metric.timestamp for metric in run.data._metric_objs)]
    return datetime.fromtimestamp(max(moments) / 1000, UTC)
