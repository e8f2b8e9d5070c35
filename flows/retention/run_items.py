"""Garbage collection of runs in MLflow and of files on this machine, with the references that keep them.

Runs in MLflow are first marked as deleted; their artifacts are deleted when the grace period is over.
"""

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from filelock import FileLock
from mlflow.client import MlflowClient
from mlflow.entities import LifecycleStage, LoggedModel, Run, ViewType
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from diffusion.checkpoints import read_header
from diffusion.common.errors import UserError
from diffusion.common.files import PARTIAL
from diffusion.training.train import discard
from flows.config import RetentionConfig
from flows.registry.aliases import verified
from flows.registry.ledger import Ledger, Newest
from flows.registry.model_versions import WEIGHTS
from flows.registry.takedown_marks import pages
from flows.retention.policy import Fate, Item, Sweep, age, older
from flows.sampling.sampling_batch import SamplingBatch
from flows.storage.s3 import Location, Store
from flows.tracking.runs import SWEEP, TRAIN_KEY

CONTENT = "darkroom.content_digest"
LEDGER = re.compile(r"ledger/([A-Za-z0-9][A-Za-z0-9_.-]*)/[0-9]{8}\.json")
SET_ASIDE = "darkroom.set_aside"
"""Tag of a run that ``darkroom gc`` has marked as deleted: the time in ISO 8601."""
ABANDONED_DAYS = 1.0
"""Days without a write after which an unfinished file counts as abandoned."""


@dataclass(frozen=True)
class References:
    """Referenced runs by ID and data set contents by digest, each with its reason; and weights in use."""

    runs: dict[str, str]
    contents: dict[str, str]
    weights: frozenset[str]
    """SHA-256 of the weights of registered versions."""
    unclear: str | None
    """Reason why references may be unknown, so that no run and no data set version may go; None if all are known."""


def find_references(
    client: MlflowClient,
    store: Store,
    bucket: str,
    kept: Iterable[SamplingBatch],
    unread: Mapping[tuple[str, int], str],
) -> References:
    """Find the runs and contents that registered versions, ledgers in ``bucket`` and ``kept`` batches refer to.

    ``unread`` holds the model versions of unreadable batches that stay, with the reason. Every registered version
    counts, whatever its aliases: each has been evaluated or will be. Raises UserError if a ledger is broken.
    """
    runs: dict[str, str] = {}
    contents: dict[str, str] = {}
    weights: set[str] = set()
    registered: set[tuple[str, int]] = set()
    for version in pages(client.search_model_versions):
        where = f"models:/{version.name}/{version.version}"
        registered.add((version.name, int(version.version)))
        weights.add(version.tags.get(WEIGHTS, ""))
        runs.setdefault(version.run_id or "", f"made {where}")
        contents.setdefault(version.tags.get(CONTENT, ""), f"{where} learned from it")
    for model, number, digest in _named_by_ledgers(client, store, bucket):
        if digest not in weights:
            # The version was deleted, but the ledger's evidence still refers to its run.
            runs |= dict.fromkeys(_logged_by(client, digest), f"the ledger names models:/{model}/{number}")
    for batch in kept:
        where = f"samples of models:/{batch.model}/{batch.version}"
        runs.setdefault(batch.run_id, f"made the model of {where}")
        contents.setdefault(batch.content_digest, f"{where} lead to it")
    # The references of a registered version are known, even if its batches are unreadable.
    unclear = next((words for version, words in unread.items() if version not in registered), None)
    return References(runs, contents, frozenset(weights), unclear)


def _named_by_ledgers(client: MlflowClient, store: Store, bucket: str) -> Iterator[tuple[str, int, str]]:
    """Yield model, number and SHA-256 of the weights of every version that a ledger names."""
    keys = store.list_keys(bucket, "ledger/")
    # Including ledgers of which only MLflow's record is left.
    models = {
        model.name
        for model in pages(client.search_registered_models)
        if (newest := Newest.of(model.name, model.tags)) and newest.place == f"s3://{bucket}/ledger/{model.name}"
    }
    for model in sorted(models | {found[1] for key in keys if (found := LEDGER.fullmatch(key))}):
        for entry in verified(client, Ledger(Location(bucket) / "ledger" / model, store)).entries:
            yield model, entry.version, entry.weights_sha256


def _logged_by(client: MlflowClient, digest: str) -> set[str]:
    """IDs of the runs that logged a model with these weights."""
    experiments = [each.experiment_id for each in pages(client.search_experiments)]
    found = client.search_logged_models(experiments, f"tags.`{WEIGHTS}` = '{digest}'") if experiments else []
    return {model.source_run_id for model in found if model.source_run_id}


class Runs:
    """Darkroom's training and sweep runs in MLflow, including those marked as deleted."""

    def __init__(self, client: MlflowClient, live: References, policy: RetentionConfig, now: datetime) -> None:
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
        """Data set contents of the runs that do not go yet, each with one of these runs."""
        return {
            run.data.tags.get(CONTENT, ""): f"run {run.info.run_id} learned from it"
            for run in self.runs
            if not self._goes(run)
        }

    def gone(self) -> frozenset[str]:
        """Train keys that only runs that go have."""
        others = {run.data.tags.get(TRAIN_KEY, "") for run in self.runs if not self._goes(run)}
        return frozenset(run.data.tags.get(TRAIN_KEY, "") for run in self.runs) - others

    def sweep(self) -> Sweep:
        """Sweep of all runs, except for deleted ones without artifacts."""
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
                # A version was registered from it after all.
                self.client.restore_run(run_id)
                self.client.delete_tag(run_id, SET_ASIDE)
            if fate == "set aside" and not self._deleted(run):
                self.client.set_tag(run_id, SET_ASIDE, datetime.now(UTC).isoformat(timespec="seconds"))
                self.client.delete_run(run_id)
            if self._goes(run):
                self._empty(run)

    def _goes(self, run: Run) -> bool:
        """Whether its artifacts are to be deleted now; without a grace period also if it is only set aside."""
        fate, _ = self.fates[run.info.run_id]
        return fate == "goes" or (fate == "set aside" and not self.policy.grace and self.live.unclear is None)

    def _empty(self, run: Run) -> None:
        """Delete models and artifacts of ``run``; its database rows are left to ``mlflow gc`` on the server."""
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
        """Models that each run has logged."""
        experiments = sorted({run.info.experiment_id for run in self.runs})
        found: dict[str, list[LoggedModel]] = {}
        for model in pages(self.client.search_logged_models, experiment_ids=experiments) if experiments else ():
            found.setdefault(model.source_run_id or "", []).append(model)
        return found

    @staticmethod
    def _deleted(run: Run) -> bool:
        return bool(run.info.lifecycle_stage == LifecycleStage.DELETED)


def _heard_of(run: Run) -> datetime:
    """Time of the run's last report: a killed training is never marked as ended."""
    moments = [run.info.start_time, run.info.end_time or 0, *(metric.timestamp for metric in run.data._metric_objs)]
    return datetime.fromtimestamp(max(moments) / 1000, UTC)


class LocalFiles:
    """Files of this machine: the working folder, and the weights fetched into ``models``."""

    def __init__(
        self,
        models: Path,
        gone: Container[str],
        weights: Container[str],
        policy: RetentionConfig,
        now: datetime,
    ) -> None:
        self.models = models
        self.gone = gone
        """Train keys of runs that go in MLflow."""
        self.weights = weights
        """SHA-256 of the weights of registered versions, which running jobs may be reading."""
        self.policy = policy
        self.now = now

    def sweep(self) -> Sweep:
        """Sweep of run folders, fetched shards, fetched weights, and partial files of killed writers."""
        items = [*self._runs(), *self._fetched(), *self._partial()]

        def act() -> None:
            for item in items:
                if item.fate != "goes":
                    continue
                path = Path(item.name)
                if item.kind == "run folders":
                    discard(path)
                elif item.kind == "fetched shards":
                    # Processes that fetch shards count the folder's files under this lock.
                    with FileLock(path.parent / ".lock"):
                        path.unlink(missing_ok=True)
                else:
                    path.unlink(missing_ok=True)

        return Sweep(items, act)

    def _runs(self) -> Iterator[Item]:
        for final in sorted(Path("runs").glob("**/final.safetensors")):
            files = [path for path in final.parent.rglob("*") if path.is_file()]
            used = max(map(_touched, files))
            why = "finished, of runs that stay, or that MLflow does not know"
            try:
                going = read_header(final).get("train_key") in self.gone and older(used, self.policy.run_days, self.now)
            except UserError as error:
                going, why = False, str(error)
            yield Item(
                kind="run folders",
                name=str(final.parent),
                bytes=sum(path.stat().st_size for path in files),
                fate="goes" if going else "stays",
                why=f"{age(used, self.now)}, and its run goes" if going else why,
            )

    def _fetched(self) -> Iterator[Item]:
        days = self.policy.cache_days
        for path in sorted(Path("data", ".shards").glob("*.tar")):
            going = older(_touched(path), days, self.now)
            yield self._file("fetched shards", path, going, "used of late")
        for path in sorted(self.models.glob("*.safetensors")):
            going = path.stem not in self.weights and older(_touched(path), days, self.now)
            yield self._file("fetched weights", path, going, "used of late, or of registered versions")

    def _partial(self) -> Iterator[Item]:
        # Not data set folders: ingest cleans them, and they may hold millions of images.
        folders = [
            Path("runs"),
            Path("reports"),
            *Path("data").glob(".*"),
            self.models,
            self.models.parent / "requests",
        ]
        for path in sorted(path for folder in folders for path in folder.rglob(".*.partial")):
            # Files of active writers may disappear.
            with suppress(FileNotFoundError):
                if PARTIAL.fullmatch(path.name) and older(_touched(path), ABANDONED_DAYS, self.now):
                    why = f"{age(_touched(path), self.now)}, and never finished"
                    yield Item(kind="unfinished files", name=str(path), bytes=path.stat().st_size, fate="goes", why=why)

    def _file(self, kind: str, path: Path, going: bool, why: str) -> Item:
        if going:
            why = f"{age(_touched(path), self.now)}, and can be fetched again"
        return Item(kind=kind, name=str(path), bytes=path.stat().st_size, fate="goes" if going else "stays", why=why)


def _touched(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)
