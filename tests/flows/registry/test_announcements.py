"""Events of the ledger: one for each entry, whose words a person understands."""

from pathlib import Path

import pytest
from mlflow.client import MlflowClient

from flows.registry import champion
from flows.registry.announcements import ANNOUNCED, announce, make_event
from flows.registry.ledger import Ledger
from tests.builders.model_versions import add_version


@pytest.fixture
def ledger(name: str, mlflow_client: MlflowClient, tmp_path: Path) -> Ledger:
    """The ledger of a model whose second version was rolled back."""
    for _ in range(2):
        add_version(mlflow_client, tmp_path, name)
    champion.promote(name, 1)
    champion.promote(name, 2, "rounder")
    champion.roll_back(name, "three eyes")
    return Ledger.of(name)


def test_each_entry_has_one_event_with_words_and_a_page(ledger: Ledger) -> None:
    entries = ledger.read().entries
    events = [make_event(ledger, entry, "https://mlflow/comparison.html") for entry in entries]
    assert [event.id for event in events] == [make_event(ledger, entry, None).id for entry in entries]
    assert len({event.id for event in events}) == 3
    assert [event.event.rpartition(".")[2] for event in events] == ["promoted", "promoted", "rolled_back"]
    model = ledger.model
    for event, words in zip(
        events,
        (
            f"models:/{model}/1 is champion: ",
            f"models:/{model}/2 is champion instead of version 1: by hand, rounder",
            f"models:/{model}/1 is champion again, after a rollback of version 2: by hand, three eyes",
        ),
        strict=True,
    ):
        first, page, report = event.payload["text"].splitlines()
        assert first.startswith(words)
        assert f"models/{model}/versions/{event.payload['version']}" in page
        assert report == "https://mlflow/comparison.html"
        assert event.resource.id == f"darkroom.model.{model}"


def test_without_prefect_nothing_is_announced(ledger: Ledger, mlflow_client: MlflowClient) -> None:
    assert ANNOUNCED not in mlflow_client.get_registered_model(ledger.model).tags


@pytest.mark.slow
def test_a_prefect_that_is_away_is_one_warning(
    ledger: Ledger, mlflow_client: MlflowClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    [*_, newest] = ledger.read().entries
    announce(mlflow_client, ledger, newest)
    assert len([record for record in caplog.records if record.name == "flows.registry.announcements"]) == 1
    assert ANNOUNCED not in mlflow_client.get_registered_model(ledger.model).tags
