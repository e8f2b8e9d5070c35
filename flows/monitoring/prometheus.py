"""``darkroom server metrics``: Prometheus metrics from Prefect, MLflow and the ledger, queried at each scrape."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from prometheus_client import CollectorRegistry, make_wsgi_app, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from diffusion.common.errors import DarkroomError, UserError
from flows.environment import Server, settings
from flows.local_stack.http_api import LoginRejectedError, NotServingError, query_mlflow, query_prefect, search_mlflow
from flows.local_stack.same_origin import refusal
from flows.registry.ledger import History, Known, Ledger, NewestEntry
from flows.storage.s3 import ListedObject, Location, Store, client

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "darkroom_up": ("whether the server answers", ("server",)),
    "darkroom_flow_runs": ("unfinished flow runs", ("flow", "state")),
    "darkroom_flow_runs_last_day": ("flow runs that ended within 24 hours", ("flow", "state")),
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
    "darkroom_ledger_entries": ("verdicts and decisions in the ledger", ("model", "what")),
    "darkroom_ledger_intact": ("whether the ledger matches MLflow's record and has no foreign objects", ("model",)),
}

RUNNING = ("pending", "running", "paused", "cancelling")
ENDED = ("completed", "failed", "crashed", "cancelled")
PAGE = 200  # page size of Prefect's API
# As flows.tracking.runs.training_metric names them, whose module would import torch and take 300 MiB.
LOSS, RATE = "train/loss", "train/images_per_second"
MAX_RESULTS = 1000  # experiments and running trainings
MetricSample = tuple[str, tuple[str, ...], float]  # name, label values and value of a metric


def serve(host: str, port: int) -> None:
    """Serve metrics on ``host`` and ``port`` until the process ends; raises UserError if the port is taken."""
    registry = CollectorRegistry()
    registry.register(Servers())
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be listened on ({error}): give another --port") from error
    if ip_address(str(server.server_address[0])).is_loopback:
        server.set_app(refuse_other_pages(make_wsgi_app(registry)))
    threading.Event().wait()


def refuse_other_pages(app: "WSGIApplication") -> "WSGIApplication":
    """Answer 403 instead of ``app`` to web pages of other origins, which reach every port of the loopback address."""

    def answer(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        headers = {
            name.removeprefix("HTTP_").replace("_", "-").lower(): text
            for name, text in environ.items()
            if name.startswith("HTTP_")
        }
        if (reason := refusal(environ["REQUEST_METHOD"], environ["PATH_INFO"], headers)) is None:
            return app(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{reason}\n".encode()]

    return answer


class Servers(Collector):
    """Collector that queries the servers of the environment at each scrape."""

    def __init__(self) -> None:
        # By model: a ledger is read again when its listing or MLflow's record of it changes.
        self.ledgers: dict[str, LedgerSnapshot] = {}

    def describe(self) -> Iterable[Metric]:
        """Describe no metrics, so that registration queries no server."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Metrics of all servers that answer, and the availability of each."""
        sources: dict[Server, Callable[[], Iterator[MetricSample]]] = {
            "prefect": prefect_samples,
            "s3": lambda: ledger_samples(self.ledgers),
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


def prefect_samples() -> Iterator[MetricSample]:
    """Metrics of flow runs, workers and concurrency limits; raises NotServingError."""
    flows = {flow["id"]: flow["name"] for flow in _pages("flows/filter", {})}
    now = datetime.now(UTC)
    start_query = {"expected_start_time": {"before_": now.isoformat()}}
    pending_query = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED", *map(str.upper, RUNNING)]}}, **start_query}}
    day = {"after_": (now - timedelta(days=1)).isoformat()}
    recent_query = {"flow_runs": {"state": {"type": {"any_": [*map(str.upper, ENDED)]}}, "end_time": day}}
    yield from count_states("darkroom_flow_runs", ("late", *RUNNING), flows, _pages("flow_runs/filter", pending_query))
    runs = list(_pages("flow_runs/filter", recent_query))
    yield from count_states("darkroom_flow_runs_last_day", ENDED, flows, runs)
    for flow_id, flow in flows.items():
        query = {"flows": {"id": {"any_": [flow_id]}}, "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
        for run in query_prefect("flow_runs/filter", query | {"sort": "END_TIME_DESC", "limit": 1}):
            yield from last_success_samples(flow, run)
    for pool in query_prefect("work_pools/filter", {"limit": PAGE}):
        workers = query_prefect(f"work_pools/{quote(pool['name'], safe='')}/workers/filter", {"limit": PAGE})
        yield "darkroom_workers_online", (pool["name"],), sum(worker["status"] == "ONLINE" for worker in workers)
    for limit in query_prefect("v2/concurrency_limits/filter", {"limit": PAGE}):
        yield "darkroom_concurrency_limit", (limit["name"],), limit["limit"]
        yield "darkroom_concurrency_active", (limit["name"],), limit["active_slots"]


def count_states(
    name: str, states: Iterable[str], flows: Mapping[str, str], runs: Iterable[Mapping[str, Any]]
) -> Iterator[MetricSample]:
    """Number of ``runs`` per flow (names by id) and state, zeros included; no worker started ``late`` ones in time."""
    counts = Counter[tuple[str, str]]()
    for run in runs:
        state = "late" if run["state_name"] == "Late" else run["state_type"].lower()
        counts[flows.get(run["flow_id"], "unknown"), state] += 1
    for flow in sorted({*flows.values(), *(flow for flow, _ in counts)}):
        for state in states:
            yield name, (flow, state), counts[flow, state]


def last_success_samples(flow: str, run: Mapping[str, Any]) -> Iterator[MetricSample]:
    """Metrics of the last successful run of a flow, with the throughput of sampling."""
    seconds = float(run["total_run_time"])
    yield "darkroom_flow_last_success_timestamp_seconds", (flow,), datetime.fromisoformat(run["end_time"]).timestamp()
    yield "darkroom_flow_last_success_seconds", (flow,), seconds
    count = run.get("parameters", {}).get("count")
    if flow == "sample" and isinstance(count, int) and seconds > 0:
        yield "darkroom_samples_last_batch_images", (), count
        yield "darkroom_samples_last_batch_images_per_second", (), count / seconds


@dataclass(frozen=True)
class LedgerSnapshot:
    """A parsed ledger, with the listing and MLflow record that it was read from."""

    listing: tuple[ListedObject, ...]
    known: Known
    history: History


def ledger_samples(cache: dict[str, LedgerSnapshot]) -> Iterator[MetricSample]:
    """Metrics of all ledgers, with those read before in ``cache``; without MLflow's answer, by its last records."""
    place, store = Location(settings().bucket) / "ledger", Store(client(attempts=1, read_timeout=5))
    try:
        # Before the ledgers are listed: entries are appended before they are recorded in MLflow.
        records = _query_records(str(place))
    except (NotServingError, LoginRejectedError):
        records = {model: entry.known for model, entry in cache.items()}
    keys = (key.removeprefix(place.key("")) for key in store.list_keys(place.bucket, place.key("")))
    for model in sorted({key.partition("/")[0] for key in keys if "/" in key} | records.keys()):
        try:
            if (record := records.get(model, {})) is None:
                raise UserError(f"MLflow's record of the ledger of {model} is invalid")
            ledger = Ledger(place / model, store)
            snapshot, objects = cache.get(model), ledger.list_objects()
            if snapshot is None or (snapshot.listing, snapshot.known) != (objects, record):
                cache[model] = snapshot = LedgerSnapshot(objects, record, ledger.read(record, objects))
            history = snapshot.history
        except UserError:
            yield "darkroom_ledger_intact", (model,), 0
            continue
        yield "darkroom_ledger_intact", (model,), float(not history.foreign)
        for event, count in Counter(entry.what for entry in history.entries).items():
            yield "darkroom_ledger_entries", (model, event), count
        yield from champion_samples(model, history)


def champion_samples(model: str, history: History) -> Iterator[MetricSample]:
    """Version of the champion, the time of its promotion, and its metrics in the gate's newest verdict on it."""
    champion = history.alias_numbers.champion
    dates = [entry.when for entry in history.entries if entry.changes_champion and entry.to_version == champion]
    if champion is None or not dates:
        return
    yield "darkroom_champion_version", (model,), champion
    yield "darkroom_champion_since_timestamp_seconds", (model,), dates[-1].timestamp()
    verdicts = [entry.evidence for entry in history.entries if entry.version == champion and entry.evidence is not None]
    for figure, value in verdicts[-1].figures.items() if verdicts else ():
        # Those of the champion that it was compared with.
        if not figure.startswith("champion_"):
            yield "darkroom_champion_figure", (model, figure), value


def _query_records(place: str) -> dict[str, Known | None]:
    """MLflow's records of the ledgers below ``place``, by model; None for an invalid record."""
    records: dict[str, Known | None] = {}
    for model in search_mlflow("registered-models"):
        name, tags = model["name"], {tag["key"]: tag["value"] for tag in model.get("tags", ())}
        try:
            record = NewestEntry.of(name, tags)
        except UserError:
            records[name] = None
            continue
        if record is not None and record.place == f"{place}/{name}":
            records[name] = {record.number: record.sha256}
    return records


def mlflow_samples() -> Iterator[MetricSample]:
    """Metrics of running trainings; raises NotServingError or LoginRejectedError."""
    entries = query_mlflow("experiments/search", {"max_results": MAX_RESULTS}).get("experiments", ())
    if experiments := {experiment["experiment_id"]: experiment["name"] for experiment in entries}:
        trainings = "attributes.status = 'RUNNING' and tags.`darkroom.train_key` != ''"
        question = {"experiment_ids": list(experiments), "filter": trainings, "max_results": MAX_RESULTS}
        for run in query_mlflow("runs/search", question).get("runs", ()):
            yield from training_samples(experiments[run["info"]["experiment_id"]], run)


def training_samples(model: str, run: Mapping[str, Any]) -> Iterator[MetricSample]:
    """Progress of a training, once it has logged any."""
    labels = model, run["info"]["run_id"]
    figures = {metric["key"]: metric for metric in run["data"].get("metrics", ())}
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
