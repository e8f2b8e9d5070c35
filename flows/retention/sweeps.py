"""Garbage collection of sampling batches, unfinished uploads, runs in MLflow and files on this machine.

A batch is first marked under ``deleted/``, and its objects are deleted when the grace period is over. The mark stays
for ``MARK_DAYS``, and sampling uses a prefix without one, so even a gc or a request that was suspended for long never
deletes a batch that was sampled later. Runs in MLflow are marked as deleted, and their artifacts are deleted later.
"""

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Literal

import mlflow
from botocore.exceptions import ClientError
from filelock import FileLock
from mlflow.client import MlflowClient
from mlflow.entities import LifecycleStage, LoggedModel, Run, ViewType
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.files import PARTIAL
from diffusion.common.model_files import read_header
from diffusion.evaluation.reports.html import format_count, format_size
from diffusion.training.run_folder import discard
from flows.config import RetentionConfig
from flows.registry import model_versions
from flows.registry.aliases import read_verified_history
from flows.registry.ledger import Ledger, NewestEntry
from flows.registry.model_versions import WEIGHTS
from flows.sampling.batch_format import MAX_BATCH_BYTES, RESUMED, SamplingBatch, parse_batch
from flows.storage.s3 import DELETED, USUAL, Location, Store
from flows.storage.s3_errors import get_status
from flows.storage.tags import parse_tags
from flows.tracking.console import align_columns
from flows.tracking.runs import IMPORTED, SWEEP, TRAIN_KEY

Action = Literal["keep", "set aside", "delete"]
"""Decision on an item; ``set aside`` items are unreferenced and go once ``retention.grace_hours`` have passed."""
ACTIONS: tuple[Action, ...] = ("delete", "set aside", "keep")
BATCH = re.compile(rf"({USUAL.pattern})/(.+)")
RESUMPTION = re.compile(rf"{RESUMED}/({USUAL.pattern})/[^/]+")
MARK_DAYS = timedelta(days=30)
"""How long a mark outlives the deleted batch: longer than any suspended request or process."""
STAGES = ("_SUCCESS", "manifest.parquet", "manifest/", "", "requests.parquet", "batch.json")
"""Order in which a batch's objects are deleted: after a kill the rest is not a finished batch and names its model."""
CONTENT = "darkroom.content_digest"
LEDGER = re.compile(r"ledger/([A-Za-z0-9][A-Za-z0-9_.-]*)/[0-9]{8}\.json")
SET_ASIDE = "darkroom.set_aside"  # tag of a run that ``darkroom gc`` has marked as deleted: the time in ISO 8601
ABANDONED_DAYS = 1.0  # days without a write after which an unfinished file counts as abandoned


class SweepItem(Config):
    """Candidate for deletion."""

    kind: str
    """Kind in the plural, such as ``runs``."""
    name: str
    bytes: int | None
    action: Action
    why: str


@dataclass(frozen=True)
class Sweep:
    """Items of one kind, with the function that applies each item's action if it still holds, and can be repeated."""

    items: list[SweepItem]
    act: Callable[[], None]


def is_older(moment: datetime, days: float | None, now: datetime) -> bool:
    """Whether ``moment`` lies ``days`` or more before ``now``; always false if ``days`` is None."""
    return days is not None and now - moment >= timedelta(days=days)


def format_age(moment: datetime, now: datetime) -> str:
    """Age of ``moment`` in words."""
    days = max(0.0, (now - moment).total_seconds() / 86400)
    return f"{days:.0f} days old" if days >= 2 else f"{days * 24:.0f} hours old"


def format_items(items: Iterable[SweepItem]) -> Iterator[str]:
    """Yield lines of a table: each item that goes or is set aside, and counts of those that stay by reason."""
    sorted_items = sorted(items, key=lambda item: (ACTIONS.index(item.action), item.kind, item.name))
    rows = [("action", "what", "size", "name", "why")]
    rows += [
        (item.action, item.kind, "" if item.bytes is None else format_size(item.bytes), item.name, item.why)
        for item in sorted_items
        if item.action != "keep"
    ]
    if len(rows) > 1:
        yield from align_columns(rows)
    keep_counts = Counter((item.kind, item.why) for item in sorted_items if item.action == "keep")
    for (kind, reason), number in sorted(keep_counts.items()):
        yield f"keep       {format_count(number)} {kind}: {reason}"
    deleted_count, aside_count, kept_count = (
        format_count(sum(item.action == action for item in sorted_items)) for action in ACTIONS
    )
    size = format_size(sum(item.bytes or 0 for item in sorted_items if item.action == "delete"))
    yield f"{deleted_count} deleted, {size}; {aside_count} set aside; {kept_count} kept"


@dataclass
class StoredBatch:
    """Summary of a stored batch, without its keys, which may be millions."""

    place: Location
    newest: datetime
    """Time of its newest object or resumption."""
    bytes: int = 0
    described: bool = False
    finished: bool = False
    deleted: datetime | None = None
    action: Action = "keep"
    why: str = ""


def group_for_deletion(place: Location, keys: Iterable[str]) -> list[list[str]]:
    """Group the keys of the batch at ``place`` in the order in which they may be deleted."""

    def stage(key: str) -> int:
        name = key.removeprefix(place.key(""))
        return STAGES.index(name if name in STAGES else "manifest/" if name.startswith("manifest/") else "")

    return [list(group) for _, group in groupby(sorted(keys, key=stage), stage)]


class SamplingBatches:
    """Batches in ``bucket`` at their default place; batches elsewhere are not collected."""

    def __init__(self, store: Store, bucket: str, policy: RetentionConfig, now: datetime) -> None:
        self.store, self.bucket, self.policy, self.now = store, bucket, policy, now
        self.resumptions = list(store.list_objects(bucket, f"{RESUMED}/"))
        self.marks = {entry.key: entry.written for entry in store.list_objects(bucket, f"{DELETED}/")}
        batches: dict[str, StoredBatch] = {}
        for entry in store.list_objects(bucket, "samples/"):
            if match := BATCH.fullmatch(entry.key):
                batch = batches.setdefault(match[1], StoredBatch(Location(bucket, match[1]), entry.written))
                batch.bytes += entry.size
                batch.newest = max(batch.newest, entry.written)
                batch.described |= match[2] == "batch.json"
                batch.finished |= match[2] == "_SUCCESS"
        for entry in self.resumptions:
            if (match := RESUMPTION.fullmatch(entry.key)) and match[1] in batches:
                batches[match[1]].newest = max(batches[match[1]].newest, entry.written)
        self.batches = list(batches.values())
        for batch in self.batches:
            batch.deleted = self.marks.get(f"{DELETED}/{batch.place.prefix}")
            batch.action, batch.why = self._action(batch)

    def read_remaining_batches(self) -> tuple[list[SamplingBatch], dict[tuple[str, int], str]]:
        """Requests of the batches that stay; and for unreadable ones, model and version with the reason."""
        batches, errors = list[SamplingBatch](), dict[tuple[str, int], str]()
        for batch in self.batches:
            if batch.action == "keep" and batch.described:
                try:
                    data = self.store.get(self.bucket, batch.place.key("batch.json"), MAX_BATCH_BYTES)
                    batches.append(parse_batch(data, f"{batch.place}/batch.json"))
                except UserError as error:
                    _, model, version, _ = batch.place.prefix.split("/")
                    errors[model, int(version)] = str(error)
        return batches, errors

    def sweep(self) -> Sweep:
        """Sweep of batches and uploads."""
        days, client = self.policy.unfinished_days, self.store.client
        with self.store.explain_errors(self.bucket):
            # Of DVC or of other programs: Darkroom itself uploads nothing in parts, and MLflow's are not its to abort.
            pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket)
            uploads = [upload for page in pages for upload in page.get("Uploads", ())]
            own_uploads = [upload for upload in uploads if not upload["Key"].startswith("mlflow/")]
        old_uploads = [upload for upload in own_uploads if is_older(upload["Initiated"], days, self.now)]
        items = [
            SweepItem(
                kind="sampling batches", name=str(batch.place), bytes=batch.bytes, action=batch.action, why=batch.why
            )
            for batch in self.batches
        ]
        for upload in own_uploads:
            action: tuple[Action, str] = ("keep", f"begun within {days:g} days")
            if upload in old_uploads:
                action = "delete", f"{format_age(upload['Initiated'], self.now)}, without an end"
            name = f"s3://{self.bucket}/{upload['Key']}"
            items.append(SweepItem(kind="unfinished uploads", name=name, bytes=None, action=action[0], why=action[1]))

        def act() -> None:
            for batch in self.batches:
                if batch.action == "set aside":
                    self._set_aside(batch)
                if batch.action == "delete" or (batch.action == "set aside" and not self.policy.grace):
                    self._delete(batch)
            markers = {f"{DELETED}/{batch.place.prefix}" for batch in self.batches}
            keys = [key for key, time in self.marks.items() if key not in markers and self.now - time >= MARK_DAYS]
            keys += [entry.key for entry in self.resumptions if is_older(entry.written, days, self.now)]
            self.store.delete_many(self.bucket, keys)
            for upload in old_uploads:
                with self.store.explain_errors(self.bucket, upload["Key"]):
                    try:
                        client.abort_multipart_upload(
                            Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                        )
                    except ClientError as error:
                        if get_status(error) != 404:  # completed or aborted since
                            raise

        return Sweep(items, act)

    def _action(self, batch: StoredBatch) -> tuple[Action, str]:
        policy = self.policy
        if batch.deleted is not None:
            is_over = self.now - batch.deleted >= policy.grace
            return "delete" if is_over else "set aside", f"since {batch.deleted:%Y-%m-%d %H:%M} UTC"
        if is_older(batch.newest, policy.batch_days, self.now):
            return "set aside", f"{format_age(batch.newest, self.now)}, retention.batch_days is {policy.batch_days:g}"
        if batch.finished:
            return "keep", "finished" if policy.batch_days is None else f"within {policy.batch_days:g} days"
        if is_older(batch.newest, policy.unfinished_days, self.now):
            return (
                "set aside",
                f"unfinished, and nothing came for {format_age(batch.newest, self.now).removesuffix(' old')}",
            )
        return "keep", f"unfinished, within {policy.unfinished_days:g} days"

    def _set_aside(self, batch: StoredBatch) -> None:
        """Mark the batch as deleted unless a job has resumed it since it was listed."""
        prefixes = (batch.place.key(""), f"{RESUMED}/{batch.place.prefix}/")
        times = (entry.written for prefix in prefixes for entry in self.store.list_objects(self.bucket, prefix))
        if batch.deleted is None and not any(moment > batch.newest for moment in times):
            self.store.put_once(self.bucket, f"{DELETED}/{batch.place.prefix}", b"")

    def _delete(self, batch: StoredBatch) -> None:
        if not self.store.exists(self.bucket, f"{DELETED}/{batch.place.prefix}"):
            return
        # Twice, for objects of a job that had not seen the mark; the job finds the mark before it ends.
        for _ in range(2):
            for keys in group_for_deletion(batch.place, self.store.list_keys(self.bucket, batch.place.key(""))):
                self.store.delete_many(self.bucket, keys)


@dataclass(frozen=True)
class References:
    """Referenced runs by ID and data set contents by digest, each with its reason; and weights in use."""

    runs: dict[str, str]
    contents: dict[str, str]
    weights: frozenset[str]
    unclear: str | None
    """Reason why references may be unknown, so that no run and no data set version may go; None if all are known."""


def find_references(
    client: MlflowClient,
    store: Store,
    bucket: str,
    batches: Iterable[SamplingBatch],
    errors: Mapping[tuple[str, int], str],
) -> References:
    """Find the runs and contents that registered versions, ledgers in ``bucket`` and ``batches`` that stay refer to.

    ``errors`` holds the model versions of unreadable batches that stay, with the reason. Every registered version
    counts, whatever its aliases: each has been evaluated or will be. Raises UserError if a ledger is broken.
    """
    runs: dict[str, str] = {}
    contents: dict[str, str] = {}
    weights: set[str] = set()
    bases: dict[str, str] = {}
    registry_versions: set[tuple[str, int]] = set()
    for version in mlflow.search_model_versions():
        source = f"models:/{version.name}/{version.version}"
        registry_versions.add((version.name, int(version.version)))
        weights.add(version.tags.get(WEIGHTS, ""))
        bases |= dict.fromkeys(parse_tags(version.tags, source).base_digests, f"{source} is based on its weights")
        runs.setdefault(version.run_id or "", f"made {source}")
        contents.setdefault(version.tags.get(CONTENT, ""), f"{source} learned from it")
    for digest in bases.keys() - weights:  # of versions that were deleted
        for logged_model in model_versions.find_stored_models(digest):
            runs.setdefault(logged_model.source_run_id or "", bases[digest])
    # Including ledgers of which only MLflow's record is left.
    models = {
        model.name
        for model in mlflow.search_registered_models()
        if (record := NewestEntry.of(model.name, model.tags)) and record.place == f"s3://{bucket}/ledger/{model.name}"
    }
    models |= {match[1] for key in store.list_keys(bucket, "ledger/") if (match := LEDGER.fullmatch(key))}
    for model in sorted(models):
        for entry in read_verified_history(client, Ledger(Location(bucket) / "ledger" / model, store)).entries:
            if entry.weights_sha256 not in weights:
                # The version was deleted, but the ledger's evidence still refers to the runs that logged its weights.
                query = f"tags.`{WEIGHTS}` = '{entry.weights_sha256}'"
                for logged_model in _logged_models(
                    [experiment.experiment_id for experiment in mlflow.search_experiments()], query
                ):
                    runs[logged_model.source_run_id or ""] = f"the ledger names models:/{model}/{entry.version}"
    for batch in batches:
        source = f"samples of models:/{batch.model}/{batch.version}"
        runs.setdefault(batch.run_id, f"made the model of {source}")
        contents.setdefault(batch.content_digest, f"{source} lead to it")
    # The references of a registered version are known, even if its batches are unreadable.
    doubt = next((error for version, error in errors.items() if version not in registry_versions), None)
    return References(runs, contents, frozenset(weights | bases.keys()), doubt)


def _logged_models(experiments: list[str], query: str | None = None) -> list[LoggedModel]:
    return list(mlflow.search_logged_models(experiments, query, output_format="list")) if experiments else []


class Runs:
    """Darkroom's training, import and sweep runs in MLflow, including those marked as deleted."""

    def __init__(self, client: MlflowClient, live: References, policy: RetentionConfig, now: datetime) -> None:
        self.client, self.live, self.policy, self.now = client, live, policy, now
        runs = mlflow.search_runs(search_all_experiments=True, run_view_type=ViewType.ALL, output_format="list")
        self.runs: list[Run] = [run for run in runs if {TRAIN_KEY, IMPORTED, SWEEP} & run.data.tags.keys()]
        self.actions = {run.info.run_id: self._action(run) for run in self.runs}

    def contents(self) -> dict[str, str]:
        """Data set contents of the runs that do not go yet, each with one of these runs."""
        return {
            run.data.tags.get(CONTENT, ""): f"run {run.info.run_id} learned from it"
            for run in self.runs
            if not self._is_deletable(run)
        }

    def list_deletable_train_keys(self) -> frozenset[str]:
        """Train keys that only runs that go have."""
        remaining_keys = {run.data.tags.get(TRAIN_KEY, "") for run in self.runs if not self._is_deletable(run)}
        return frozenset(run.data.tags.get(TRAIN_KEY, "") for run in self.runs) - remaining_keys

    def sweep(self) -> Sweep:
        """Sweep of all runs, except for deleted ones without artifacts."""
        items = []
        for run in self.runs:
            run_id, (action, reason) = run.info.run_id, self.actions[run.info.run_id]
            if action != "delete" or run_id in self._models or self.client.list_artifacts(run_id):
                items.append(SweepItem(kind="runs", name=f"runs:/{run_id}", bytes=None, action=action, why=reason))
        return Sweep(items, self._act)

    def _act(self) -> None:
        for run in self.runs:
            run_id, (action, _) = run.info.run_id, self.actions[run.info.run_id]
            if action == "keep" and _is_deleted(run) and SET_ASIDE in run.data.tags:
                # A version was registered from it after all.
                self.client.restore_run(run_id)
                self.client.delete_tag(run_id, SET_ASIDE)
            if action == "set aside" and not _is_deleted(run):
                self.client.set_tag(run_id, SET_ASIDE, datetime.now(UTC).isoformat(timespec="seconds"))
                self.client.delete_run(run_id)
            if self._is_deletable(run):
                # The rows in MLflow's database are left to ``mlflow gc`` on the server.
                for model in self._models.get(run_id, ()):
                    get_artifact_repository(model.artifact_location).delete_artifacts()  # type: ignore[no-untyped-call]
                    self.client.delete_logged_model(model.model_id)
                get_artifact_repository(run.info.artifact_uri).delete_artifacts()  # type: ignore[no-untyped-call]

    def _is_deletable(self, run: Run) -> bool:
        """Whether its artifacts are to be deleted now; without a grace period also if it is only set aside."""
        action, _ = self.actions[run.info.run_id]
        return action == "delete" or (action == "set aside" and not self.policy.grace and self.live.unclear is None)

    def _action(self, run: Run) -> tuple[Action, str]:
        policy, reason = self.policy, self.live.runs.get(run.info.run_id)
        if _is_deleted(run):
            if (mark := run.data.tags.get(SET_ASIDE)) is None:
                return "keep", "a person deleted them, and runs `mlflow gc`"
            if reason is not None:
                return "keep", f"{reason}: brought back"
            try:
                time = datetime.fromisoformat(mark).astimezone(UTC)
            except (ValueError, OverflowError):
                return (
                    "keep",
                    f"the tag {SET_ASIDE} of runs:/{run.info.run_id} is not a time: delete the tag, or the run",
                )
            if self.live.unclear is not None:
                return "set aside", self.live.unclear
            return "delete" if self.now - time >= policy.grace else "set aside", f"since {time:%Y-%m-%d %H:%M} UTC"
        if reason is not None:
            return "keep", reason
        # A killed training is never marked as ended: its last report counts.
        times = [run.info.start_time, run.info.end_time or 0, *(metric.timestamp for metric in run.data._metric_objs)]
        last_report = datetime.fromtimestamp(max(times) / 1000, UTC)
        if not is_older(last_report, policy.run_days, self.now):
            return "keep", "all do" if policy.run_days is None else f"heard of within {policy.run_days:g} days"
        if self.live.unclear is not None:
            return "keep", self.live.unclear
        return "set aside", f"{format_age(last_report, self.now)}, and no version was made of it"

    @cached_property
    def _models(self) -> dict[str, list[LoggedModel]]:
        models: dict[str, list[LoggedModel]] = {}
        for model in _logged_models(sorted({run.info.experiment_id for run in self.runs})):
            models.setdefault(model.source_run_id or "", []).append(model)
        return models


def _is_deleted(run: Run) -> bool:
    return bool(run.info.lifecycle_stage == LifecycleStage.DELETED)


def sweep_local_files(
    models: Path, train_keys: Container[str], weights: Container[str], policy: RetentionConfig, now: datetime
) -> Sweep:
    """Sweep of this machine: run folders, fetched shards and weights, and partial files of killed writers.

    ``models`` is the folder of fetched weights, ``train_keys`` holds the train keys of runs that go in MLflow, and
    ``weights`` the SHA-256 of the weights of registered versions, which running jobs may be reading.
    """
    items: list[SweepItem] = []

    def add(
        kind: str, path: Path, last_use: datetime, size: int, is_stale: bool, stale_reason: str, keep_reason: str
    ) -> None:
        text = f"{format_age(last_use, now)}, {stale_reason}" if is_stale else keep_reason
        items.append(
            SweepItem(kind=kind, name=str(path), bytes=size, action="delete" if is_stale else "keep", why=text)
        )

    for final in sorted(Path("runs").glob("**/final.safetensors")):
        files = [path for path in final.parent.rglob("*") if path.is_file()]
        last_use, size = max(map(_read_last_use, files)), sum(path.stat().st_size for path in files)
        reason = "finished, of runs that stay, or that MLflow does not know"
        try:
            is_stale = read_header(final).get("train_key") in train_keys and is_older(last_use, policy.run_days, now)
        except UserError as error:
            is_stale, reason = False, str(error)
        add("run folders", final.parent, last_use, size, is_stale, "and its run goes", reason)
    for kind, paths, registry_digests, reason in (
        ("fetched shards", Path("data", ".shards").glob("*.tar"), (), "used of late"),
        ("fetched weights", models.glob("*.safetensors"), weights, "used of late, or of registered versions"),
    ):
        for path in sorted(paths):
            last_use = _read_last_use(path)
            is_stale = path.stem not in registry_digests and is_older(last_use, policy.cache_days, now)
            add(kind, path, last_use, path.stat().st_size, is_stale, "and can be fetched again", reason)
    # Not data set folders: ingest cleans them, and they may hold millions of images.
    folders = [Path("runs"), Path("reports"), *Path("data").glob(".*"), models, models.parent / "requests"]
    for path in sorted(path for folder in folders for path in folder.rglob(".*.partial")):
        # Files of active writers may disappear.
        with suppress(FileNotFoundError):
            last_use, size = _read_last_use(path), path.stat().st_size
            if PARTIAL.fullmatch(path.name) and is_older(last_use, ABANDONED_DAYS, now):
                add("unfinished files", path, last_use, size, True, "and never finished", "")

    def act() -> None:
        for item in items:
            path = Path(item.name)
            if item.action != "delete":
                continue
            if item.kind == "run folders":
                discard(path)
                continue
            # Processes that fetch shards count the folder's files under this lock.
            with FileLock(path.parent / ".lock") if item.kind == "fetched shards" else nullcontext():
                path.unlink(missing_ok=True)

    return Sweep(items, act)


def _read_last_use(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)
