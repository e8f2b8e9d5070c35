"""Dashboard and alarms: they use what ``darkroom server metrics`` exports, and alarms go off when they should."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from flows.local_stack.server_process import choose_ports
from flows.monitoring import prometheus
from flows.monitoring.prometheus import (
    GAUGES,
    Servers,
    champion_samples,
    count_states,
    last_success_samples,
    training_samples,
)
from flows.registry.ledger import Evidence, History, LedgerEvent
from flows.storage.s3 import Store
from flows.tracking.runs import training_metric
from tests.builders.command_line import output_of
from tests.builders.http_server import serving
from tests.builders.installation import INFRA, ROOT, program

ALERTS = [
    rule
    for group in yaml.safe_load((INFRA / "prometheus" / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
PANELS = json.loads((INFRA / "grafana" / "darkroom.json").read_text())["panels"]
EXPRESSIONS = [rule["expr"] for rule in ALERTS] + [target["expr"] for panel in PANELS for target in panel["targets"]]


def selected(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Names of the figures that a PromQL expression asks for, each with the labels it chooses by."""

    def walk(node: Any) -> Iterator[Any]:
        if isinstance(node, promql_parser.VectorSelector):
            yield node
        for name in ("expr", "lhs", "rhs", "vector_selector", "args", "param"):
            below = getattr(node, name, None)
            for each in below if isinstance(below, list) else [below] if below is not None else []:
                yield from walk(each)

    for selector in walk(promql_parser.parse(expression)):
        yield selector.name, {matcher.name for matcher in selector.matchers.matchers}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_queried_metrics_exist_with_their_labels(expression: str) -> None:
    selectors = list(selected(expression))
    assert selectors
    for name, labels in selectors:
        assert name in GAUGES
        assert labels <= set(GAUGES[name][1])
    grouped = {label.strip() for labels in re.findall(r"by \(([^)]*)\)", expression) for label in labels.split(",")}
    assert grouped <= {label for name, _ in selectors for label in GAUGES[name][1]}


def test_every_metric_has_a_panel() -> None:
    metric_names = {name for panel in PANELS for target in panel["targets"] for name, _ in selected(target["expr"])}
    # When a training last spoke is for the alarm alone.
    assert GAUGES.keys() - metric_names == {"darkroom_training_last_word_timestamp_seconds"}


def test_panels_have_their_own_place_and_name() -> None:
    occupied_cells: set[tuple[int, int]] = set()
    for panel in PANELS:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not occupied_cells & cells, panel["title"]
        assert all(x < 24 for x, _ in cells)
        occupied_cells |= cells
    assert len({panel["id"] for panel in PANELS}) == len({panel["title"] for panel in PANELS}) == len(PANELS)


def test_every_alert_has_a_runbook_page() -> None:
    for rule in ALERTS:
        page = (ROOT / rule["annotations"]["runbook"]).read_text()
        assert rule["alert"] in page
        for heading in ("What it means", "Diagnose", "Fix", "Verify"):
            assert f"## {heading}" in page, f"{rule['annotations']['runbook']}: {heading}"


def test_pages_name_commands_that_exist() -> None:
    from typer.main import get_command

    from flows.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    commands |= {f"{name} {each}": None for name, group in commands.items() for each in getattr(group, "commands", ())}
    groups = "|".join(name for name, group in commands.items() if hasattr(group, "commands"))
    verbs = {
        verb
        for page in (ROOT / "docs" / "operations" / "runbook").glob("*.md")
        for verb in re.findall(
            rf"(?<!-n )\bdarkroom ((?:(?:{groups}) )?[a-z]+)\b",
            "".join(re.findall(r"`[^`]+`|```.*?```", page.read_text(), re.DOTALL)),
        )
    }
    assert verbs
    assert verbs <= commands.keys()


@pytest.mark.parametrize("check", [["check", "config", "prometheus.yaml"], ["test", "rules", "alerts_test.yaml"]])
def test_prometheus_accepts_the_rules_and_alerts_fire(check: list[str]) -> None:
    output_of([program("promtool", "Debian's prometheus"), *check], cwd=INFRA / "prometheus")


def test_every_alert_has_a_rule_test() -> None:
    rule_tests = (INFRA / "prometheus" / "alerts_test.yaml").read_text()
    assert all(f"alertname: {rule['alert']}\n" in rule_tests for rule in ALERTS)


RUNS = [
    {"flow_id": "1", "state_type": "SCHEDULED", "state_name": "Late"},
    {"flow_id": "1", "state_type": "SCHEDULED", "state_name": "AwaitingRetry"},
    {"flow_id": "1", "state_type": "RUNNING", "state_name": "Running"},
    {"flow_id": "2", "state_type": "RUNNING", "state_name": "Running"},
    {"flow_id": "gone", "state_type": "RUNNING", "state_name": "Running"},
]


def test_unreachable_servers_export_only_up_0(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = choose_ports(1)
    for variable in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{port}")
    registry = CollectorRegistry()
    registry.register(Servers())
    lines = [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]
    assert lines == [f'darkroom_up{{server="{server}"}} 0.0' for server in ("prefect", "s3", "mlflow")]


def test_runs_are_counted_by_flow_and_state() -> None:
    counts = {
        labels: value
        for _, labels, value in count_states("n", ("late", "scheduled", "running"), {"1": "train", "2": "sample"}, RUNS)
    }
    assert counts == {
        ("train", "late"): 1,
        ("train", "scheduled"): 1,
        ("train", "running"): 1,
        ("sample", "late"): 0,
        ("sample", "scheduled"): 0,
        ("sample", "running"): 1,
        ("unknown", "late"): 0,
        ("unknown", "scheduled"): 0,
        ("unknown", "running"): 1,
    }


def test_sampling_rate_is_images_by_run_duration() -> None:
    run = {"total_run_time": 8.0, "end_time": "1970-01-01T00:01:40Z", "parameters": {"count": 40}}
    assert list(last_success_samples("sample", run)) == [
        ("darkroom_flow_last_success_timestamp_seconds", ("sample",), 100.0),
        ("darkroom_flow_last_success_seconds", ("sample",), 8.0),
        ("darkroom_samples_last_batch_images", (), 40),
        ("darkroom_samples_last_batch_images_per_second", (), 5.0),
    ]
    assert len(list(last_success_samples("train", run))) == 2
    assert len(list(last_success_samples("sample", run | {"parameters": {}}))) == 2


def test_training_without_logged_metrics_exports_none() -> None:
    info = {"run_id": "a1"}
    assert list(training_samples("faces", {"info": info, "data": {}})) == []
    loss = {"key": training_metric("loss"), "value": 0.5, "step": 640, "timestamp": 7000}
    logged = [loss, {"key": training_metric("images_per_second"), "value": 9.5}]
    assert list(training_samples("faces", {"info": info, "data": {"metrics": logged}})) == [
        ("darkroom_training_images", ("faces", "a1"), 640.0),
        ("darkroom_training_last_word_timestamp_seconds", ("faces", "a1"), 7.0),
        ("darkroom_training_images_per_second", ("faces", "a1"), 9.5),
    ]


def test_champion_figures_are_those_of_the_newest_verdict_on_it() -> None:
    history = History("faces")
    moves: list[tuple[LedgerEvent, int, float | None]] = [("promote", 1, 0.3), ("promote", 2, 0.2), ("reject", 3, 0.9)]
    moves += [("rollback", 1, None)]
    for what, version, kid in moves:
        figures = {} if kid is None else {"kid_efflite0": kid, "champion_kid_efflite0": 0.5}
        gate_evidence = None if kid is None else Evidence(verdict="promote", reason="lower", figures=figures)
        entry = history.next_entry(what, version, "0" * 64, evidence=gate_evidence)
        history = replace(history, entries=(*history.entries, entry))
    samples = {(name, *labels): value for name, labels, value in champion_samples("faces", history)}
    assert samples.pop(("darkroom_champion_since_timestamp_seconds", "faces")) > 0
    assert samples == {
        ("darkroom_champion_version", "faces"): 1,
        ("darkroom_champion_figure", "faces", "kid_efflite0"): 0.3,
    }


def test_a_wrong_password_of_mlflow_is_no_failure_of_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

    monkeypatch.setattr(prometheus, "client", lambda **_: None)
    monkeypatch.setattr(Store, "list_keys", lambda *_: iter(()))
    with serving(Refusing) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        assert list(prometheus.ledger_samples({})) == []
