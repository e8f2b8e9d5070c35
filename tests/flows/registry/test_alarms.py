"""Drift alarms: each raised once, and no more often than the limits allow, whoever monitors and whenever it dies."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from mlflow.client import MlflowClient
from prefect.events import Event

from diffusion.common.errors import UserError
from diffusion.common.files import sha256_bytes
from flows.config import MonitorConfig, Params
from flows.monitor import MonitorResult, conclude, make_drift_event
from flows.monitoring.prometheus import alarm_samples
from flows.registry.alarms import Alarm, Alarms, NumberedAlarm, RetrainingHold
from flows.storage.s3 import ListedObject, Location, Object, Store

START = datetime(2026, 11, 2, tzinfo=UTC)
LIMITS = MonitorConfig(cooldown_hours=24, retrainings_per_week=2)


@pytest.fixture
def alarms(store: Store, bucket: str) -> Alarms:
    return Alarms(Location(bucket, "alarms/faces"), store)


def alarm(name: str, hours: float = 0) -> Alarm:
    return Alarm(
        model="faces",
        key=sha256_bytes(name.encode()),
        when=START + timedelta(hours=hours),
        who="me@here",
        version="models:/faces/1",
        dataset="faces",
        content_digest="0" * 64,
        causes=("class_shares",),
        reason="new images differ",
    )


def raised(alarms: Alarms, requested: Alarm, limits: MonitorConfig = LIMITS) -> NumberedAlarm:
    decision = alarms.request(requested, limits)
    assert isinstance(decision, NumberedAlarm)
    return decision


def holding_limit(alarms: Alarms, requested: Alarm) -> str:
    decision = alarms.request(requested, LIMITS)
    assert isinstance(decision, RetrainingHold)
    return decision.limit


def test_an_alarm_is_raised_once_within_the_limits(alarms: Alarms) -> None:
    first = raised(alarms, alarm("a"))
    assert first.number == 1
    # Again by any process, at any time, it is the same one.
    assert alarms.request(alarm("a", 500), LIMITS) == first
    assert holding_limit(alarms, alarm("b", 23.9)) == "cooldown"
    raised(alarms, alarm("b", 24))
    assert [holding_limit(alarms, alarm("c", hours)) for hours in (49, 100, 167)] == ["week"] * 3
    raised(alarms, alarm("c", 168))
    assert [each.number for each in alarms.all()] == [1, 2, 3]


def test_of_many_monitors_at_once_the_limits_let_one_through(alarms: Alarms) -> None:
    with ThreadPoolExecutor(8) as pool:
        decisions = list(pool.map(lambda name: alarms.request(alarm(name), LIMITS), map(str, range(16))))
    assert sum(isinstance(each, NumberedAlarm) for each in decisions) == 1
    assert len(alarms.all()) == 1


def test_a_foreign_object_does_not_count_as_an_alarm(alarms: Alarms) -> None:
    alarms.store.put_many(alarms.place.bucket, [Object(alarms.place.key("00000001.json"), b"{}")])
    assert raised(alarms, alarm("a")).number == 2
    with pytest.raises(UserError):
        alarms.read(1)
    with pytest.raises(UserError):
        alarms.read(7)


def test_an_object_too_large_for_an_alarm_is_not_read(alarms: Alarms) -> None:
    alarms.store.put_many(alarms.place.bucket, [Object(alarms.place.key("00000001.json"), b" " * 2**20)])
    with pytest.raises(UserError, match="1048576 bytes"):
        alarms.read(1)


def test_scrapes_read_each_alarm_once(alarms: Alarms, monkeypatch: pytest.MonkeyPatch) -> None:
    alarms.store.put_many(alarms.place.bucket, [Object(alarms.place.key("00000001.json"), b"{}")])
    reads: list[int] = []
    read = Alarms.read
    monkeypatch.setattr(Alarms, "read", lambda self, number: (reads.append(number), read(self, number))[1])
    known: dict[ListedObject, NumberedAlarm] = {}
    limits = MonitorConfig(cooldown_hours=0, retrainings_per_week=9)
    for number in (2, 3):
        decision = raised(alarms, alarm(str(number), number), limits)
        alarms.mark_announced(decision)
        reads.clear()
        scrapes = [list(alarm_samples(known)) for _ in range(2)]
        # The foreign object is looked at again and again.
        assert sorted(reads) == [1, 1, number]
        assert scrapes[0] == scrapes[1]
        assert ("darkroom_drift_alarms", ("faces", "class_shares"), number - 1) in scrapes[0]
        assert ("darkroom_drift_last_alarm_timestamp_seconds", ("faces",), decision.when.timestamp()) in scrapes[0]


def test_one_flow_run_answers_an_alarm(alarms: Alarms) -> None:
    decision = raised(alarms, alarm("a"))
    assert alarms.answer(decision, "run-1") == "run-1"
    assert alarms.answer(decision, "run-2") == "run-1"
    assert alarms.answer(decision, "run-1") == "run-1"


def test_an_event_has_one_id_and_names_the_reason(alarms: Alarms) -> None:
    decision = raised(alarms, alarm("a"))
    event = make_drift_event(decision, alarms)
    assert event.id == make_drift_event(decision, alarms).id
    assert event.resource.id == "darkroom.model.faces"
    assert (event.payload["alarm"], event.payload["reason"]) == (1, "new images differ")
    assert event.payload["causes"] == ["class_shares"]


def test_the_next_monitor_emits_the_event_of_a_killed_one(
    mlflow_client: MlflowClient, store: Store, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "flows.registry.model_versions.resolve", lambda _, uri: SimpleNamespace(uri=uri, model="faces", number=1)
    )
    tagged: list[str] = []
    monkeypatch.setattr(MlflowClient, "set_model_version_tag", lambda *args: tagged.append(args[-1]))
    params = Params.model_validate({"training": {"dataset": "faces"}})
    about = {"model": "models:/faces/1", "content_digest": "0" * 64, "key": "1" * 64, "figures": {}, "before": {}}
    result = MonitorResult.model_validate(about | {"causes": ["quality"], "summary": "worse", "skipped": False})
    events: list[Event] = []

    def dies(event: Event) -> None:
        events.append(event)
        raise KeyboardInterrupt

    monkeypatch.setattr("flows.monitor.emit", dies)
    with pytest.raises(KeyboardInterrupt):
        conclude.fn(params, result)
    assert not tagged
    monkeypatch.setattr("flows.monitor.emit", events.append)
    outcome = conclude.fn(params, result)
    assert [event.id for event in events] == [events[0].id] * 2
    assert conclude.fn(params, result).alarm == outcome.alarm
    assert len(events) == 2
    assert (outcome.alarm.number, outcome.alarm.causes, outcome.state) == (1, ("quality",), "Drifted")
    assert tagged == ["1" * 64] * 2
    # One that is held is looked at again by the next run: it is not marked as done.
    other = result.model_copy(update={"key": "2" * 64})
    never = params.model_copy(update={"monitor": MonitorConfig(retrainings_per_week=0)})
    full = params.model_copy(update={"monitor": MonitorConfig(retrainings_per_week=1)})
    assert [conclude.fn(each, other).state for each in (params, full, never)] == ["Drifted", "Held", "Drifted"]
    assert tagged[2:] == ["2" * 64]
    assert len(events) == 2
