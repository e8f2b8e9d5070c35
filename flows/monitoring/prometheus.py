"""``darkroom server metrics``: Prometheus metrics from Prefect, MLflow and the ledger, queried at each scrape."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Any, get_args
from urllib.parse import quote

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from diffusion.common.errors import DarkroomError, UserError
from flows.environment import Server, settings
from flows.local_stack.http_api import NotServing, WrongLogin, query_mlflow, query_prefect
from flows.registry.alarms import Alarms, Cause, NumberedAlarm
from flows.registry.ledger import History, Known, Ledger, Newest
from flows.storage.s3 import ListedObject, Location, Store, client

GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "darkroom_up": ("whether the server answers", ("server",)),
    "darkroom_flow_runs": ("unfinished flow runs", ("flow", "state")),
    "darkroom_flow_runs_last_day": ("flow runs that ended within 24 hours", ("flow", "state")),
    "darkroom_flow_runs_held_last_day": ("flow runs that ended within 24 hours at a limit", ("flow",)),
    "darkroom_flow_last_success_timestamp_seconds": ("end of the flow's last successful run", ("flow",)),
    "darkroom_flow_last_success_seconds": ("duration of that run", ("flow",)),
    "darkroom_samples_last_batch_images": ("images requested of the last finished sampling batch", ()),
    "darkroom_samples_last_batch_images_per_second": ("these images divided by the duration of the flow run", ()),
    "darkroom_workers_online": ("online workers of the work pool", ("pool",)),
    "darkroom_concurrency_limit": ("slots of the concurrency limit", ("limit",)),
    "darkroom_concurrency_active": ("occupied slots of the concurrency limit", ("limit",)),
    "darkroom_training_images": ("images seen by a running training", ("model", "run_id")),
    "darkroom_training_images_per_second": ("throughput of a running training", ("model", "run_id")),
    "darkroom_training_last_word_timestamp_seconds": ("last time that it logged a metric", ("model", "run_id")),
    "darkroom_champion_version": ("version number of the champion", ("model",)),
    "darkroom_champion_since_timestamp_seconds": ("time of its promotion", ("model",)),
    "darkroom_champion_figure": ("metrics of the champion", ("model", "figure")),
    "darkroom_drift_alarms": ("retrainings that drift requested", ("model", "cause")),
    "darkroom_drift_last_alarm_timestamp_seconds": ("time of the last of them", ("model",)),
    "darkroom_ledger_entries": ("verdicts and decisions in the ledger", ("model", "what")),
    "darkroom_ledger_intact": ("whether the ledger matches MLflow's record and has no foreign objects", ("model",)),
}

RUNNING = ("pending", "running", "paused", "cancelling")
ENDED = ("completed", "failed", "crashed", "cancelled")
PAGE = 200  # page size of Prefect's API
# As flows.tracking.runs.training_metric names them, whose module would import torch and take 300 MiB.
LOSS, RATE = "train/loss", "train/images_per_second"
MOST = 1000  # maximum number of models, experiments and running trainings
Sample = tuple[str, tuple[str, ...], float]  # name, label values and value of a metric


def serve(host: str, port: int) -> None:
    """Serve metrics on ``host`` and ``port`` until the process ends; raises UserError if the port is taken."""
    registry = CollectorRegistry()
    registry.register(Servers())
    try:
        start_http_server(port, host, registry)
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be listened on ({error}): give another --port") from error
    threading.Event().wait()


class Servers(Collector):
    """Collector that queries the servers of the environment at each scrape."""

    def __init__(self) -> None:
        # By model: a ledger is read again when its listing or MLflow's record of it changes.
        self.read: dict[str, LedgerRead] = {}
        # Alarms are written once: each is read once.
        self.alarms: dict[ListedObject, NumberedAlarm] = {}

    def describe(self) -> Iterable[Metric]:
        """Describe no metrics, so that registration queries no server."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Metrics of all servers that answer, and the availability of each."""
        sources: dict[Server, Callable[[], Iterator[Sample]]] = {
            "prefect": prefect_samples,
            "s3": lambda: chain(ledger_samples(self.read), alarm_samples(self.alarms)),
            "mlflow": mlflow_samples,
        }
        families = {name: GaugeMetricFamily(name, help_, labels=labels) for name, (help_, labels) in GAUGES.items()}
        for server, source in sources.items():
            try:
                samples = [*source(), ("darkroom_up", (server,), 1.0)]
            except DarkroomError:
                samples = [("darkroom_up", (server,), 0.0)]
            for name, labels, value in samples:
                families[name].add_metric(labels, value)
        yield from families.values()


def prefect_samples() -> Iterator[Sample]:
    """Metrics of flow runs, workers and concurrency limits; raises NotServing."""
    flows = {flow["id"]: flow["name"] for flow in _pages("flows/filter", {})}
    now = datetime.now(UTC)
    due = {"expected_start_time": {"before_": now.isoformat()}}
    waiting = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED", *map(str.upper, RUNNING)]}}, **due}}
    day = {"after_": (now - timedelta(days=1)).isoformat()}
    ended = {"flow_runs": {"state": {"type": {"any_": [*map(str.upper, ENDED)]}}, "end_time": day}}
    yield from count_states("darkroom_flow_runs", ("late", *RUNNING), flows, _pages("flow_runs/filter", waiting))
    runs = list(_pages("flow_runs/filter", ended))
    yield from count_states("darkroom_flow_runs_last_day", ENDED, flows, runs)
    held = Counter(flows.get(run["flow_id"], "unknown") for run in runs if run["state_name"] == "Held")
    yield from (("darkroom_flow_runs_held_last_day", (flow,), held[flow]) for flow in sorted({*flows.values(), *held}))
    for flow_id, flow in flows.items():
        completed = {"flows": {"id": {"any_": [flow_id]}}, "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
        for run in query_prefect("flow_runs/filter", completed | {"sort": "END_TIME_DESC", "limit": 1}):
            yield from last_success_samples(flow, run)
    for pool in query_prefect("work_pools/filter", {"limit": PAGE}):
        workers = query_prefect(f"work_pools/{quote(pool['name'], safe='')}/workers/filter", {"limit": PAGE})
        yield "darkroom_workers_online", (pool["name"],), sum(worker["status"] == "ONLINE" for worker in workers)
    for limit in query_prefect("v2/concurrency_limits/filter", {"limit": PAGE}):
        yield "darkroom_concurrency_limit", (limit["name"],), limit["limit"]
        yield "darkroom_concurrency_active", (limit["name"],), limit["active_slots"]


def count_states(
    name: str, states: Iterable[str], flows: Mapping[str, str], runs: Iterable[Mapping[str, Any]]
) -> Iterator[Sample]:
    """Number of ``runs`` per flow (names by id) and state, zeros included; no worker started ``late`` ones in time."""
    found = Counter[tuple[str, str]]()
    for run in runs:
        state = "late" if run["state_name"] == "Late" else run["state_type"].lower()
        found[flows.get(run["flow_id"], "unknown"), state] += 1
    for flow in sorted({*flows.values(), *(flow for flow, _ in found)}):
        for state in states:
            yield name, (flow, state), found[flow, state]


def last_success_samples(flow: str, run: Mapping[str, Any]) -> Iterator[Sample]:
    """Metrics of the last successful run of a flow, with the throughput of sampling."""
    seconds = float(run["total_run_time"])
    yield "darkroom_flow_last_success_timestamp_seconds", (flow,), datetime.fromisoformat(run["end_time"]).timestamp()
    yield "darkroom_flow_last_success_seconds", (flow,), seconds
    count = run.get("parameters", {}).get("count")
    if flow == "sample" and isinstance(count, int) and seconds > 0:
        yield "darkroom_samples_last_batch_images", (), count
        yield "darkroom_samples_last_batch_images_per_second", (), count / seconds


@dataclass(frozen=True)
class LedgerRead:
    """A parsed ledger, with the listing and MLflow record that it was read from."""

    listed: tuple[ListedObject, ...]
    known: Known
    history: History


def ledger_samples(read: dict[str, LedgerRead]) -> Iterator[Sample]:
    """Metrics of all ledgers, with the cache ``read``; while MLflow does not answer, with its last known records."""
    place, store = Location(settings().bucket) / "ledger", Store(client(attempts=1, read_timeout=5))
    try:
        # Before the ledgers are listed: entries are appended before they are recorded in MLflow.
        known = _on_record(str(place))
    except (NotServing, WrongLogin):
        known = {model: each.known for model, each in read.items()}
    keys = (key.removeprefix(place.key("")) for key in store.list_keys(place.bucket, place.key("")))
    for model in sorted({key.partition("/")[0] for key in keys if "/" in key} | known.keys()):
        try:
            if (on_record := known.get(model, {})) is None:
                raise UserError(f"MLflow's record of the ledger of {model} is invalid")
            ledger = Ledger(place / model, store)
            before, listed = read.get(model), ledger.listed()
            if before is None or (before.listed, before.known) != (listed, on_record):
                read[model] = before = LedgerRead(listed, on_record, ledger.read(on_record, listed))
            history = before.history
        except UserError:
            yield "darkroom_ledger_intact", (model,), 0
            continue
        yield "darkroom_ledger_intact", (model,), float(not history.foreign)
        for what, count in Counter(entry.what for entry in history.entries).items():
            yield "darkroom_ledger_entries", (model, what), count
        yield from champion_samples(model, history)


def alarm_samples(read: dict[ListedObject, NumberedAlarm]) -> Iterator[Sample]:
    """Metrics of the drift alarms of all models, with the cache ``read``."""
    place, store = Location(settings().bucket) / "alarms", Store(client(attempts=1, read_timeout=5))
    found: dict[str, list[NumberedAlarm]] = {}
    for listed in store.list_objects(place.bucket, place.key("")):
        model, slash, _ = listed.key.removeprefix(place.key("")).partition("/")
        if not slash:
            continue
        own, alarms = Alarms(place / model, store), found.setdefault(model, [])
        if number := own.number(listed):
            with suppress(UserError):  # a foreign object
                alarms.append(read.get(listed) or read.setdefault(listed, own.read(number)))
    for model, alarms in found.items():
        for cause in get_args(Cause):
            yield "darkroom_drift_alarms", (model, cause), sum(cause in alarm.causes for alarm in alarms)
        if alarms:
            last = max(alarm.when for alarm in alarms)
            yield "darkroom_drift_last_alarm_timestamp_seconds", (model,), last.timestamp()


def champion_samples(model: str, history: History) -> Iterator[Sample]:
    """Version of the champion, the time of its promotion, and its metrics in the gate's newest verdict on it."""
    champion = history.standing.champion
    since = [entry.when for entry in history.entries if entry.moves and entry.to_version == champion]
    if champion is None or not since:
        return
    yield "darkroom_champion_version", (model,), champion
    yield "darkroom_champion_since_timestamp_seconds", (model,), since[-1].timestamp()
    verdicts = [entry.evidence for entry in history.entries if entry.version == champion and entry.evidence is not None]
    for figure, value in verdicts[-1].figures.items() if verdicts else ():
        # Those of the champion that it was compared with.
        if not figure.startswith("champion_"):
            yield "darkroom_champion_figure", (model, figure), value


def _on_record(place: str) -> dict[str, Known | None]:
    """MLflow's records of the ledgers below ``place``, by model; None for an invalid record."""
    found: dict[str, Known | None] = {}
    token = ""
    while True:
        answer = query_mlflow(f"registered-models/search?max_results={MOST}&page_token={quote(token)}")
        for model in answer.get("registered_models", ()):
            name, tags = model["name"], {tag["key"]: tag["value"] for tag in model.get("tags", ())}
            try:
                newest = Newest.of(name, tags)
            except UserError:
                found[name] = None
                continue
            if newest is not None and newest.place == f"{place}/{name}":
                found[name] = {newest.number: newest.sha256}
        if not (token := answer.get("next_page_token", "")):
            return found


def mlflow_samples() -> Iterator[Sample]:
    """Metrics of running trainings; raises NotServing or WrongLogin."""
    found = query_mlflow("experiments/search", {"max_results": MOST}).get("experiments", ())
    if experiments := {each["experiment_id"]: each["name"] for each in found}:
        trainings = "attributes.status = 'RUNNING' and tags.`darkroom.train_key` != ''"
        question = {"experiment_ids": list(experiments), "filter": trainings, "max_results": MOST}
        for run in query_mlflow("runs/search", question).get("runs", ()):
            yield from training_samples(experiments[run["info"]["experiment_id"]], run)


def training_samples(model: str, run: Mapping[str, Any]) -> Iterator[Sample]:
    """Progress of a training, once it has logged any."""
    labels = model, run["info"]["run_id"]
    figures = {each["key"]: each for each in run["data"].get("metrics", ())}
    if LOSS in figures:
        yield "darkroom_training_images", labels, float(figures[LOSS]["step"])
        yield "darkroom_training_last_word_timestamp_seconds", labels, int(figures[LOSS]["timestamp"]) / 1000
    if RATE in figures:
        yield "darkroom_training_images_per_second", labels, float(figures[RATE]["value"])


def _pages(path: str, question: dict[str, Any]) -> Iterator[Mapping[str, Any]]:
    offset = 0
    while True:
        page = query_prefect(path, {"limit": PAGE, "offset": offset} | question)
        yield from page
        if len(page) < PAGE:
            return
        offset += PAGE
