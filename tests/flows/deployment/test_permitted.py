"""What the parameters of a deployment may make a worker do, as its own environment says."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from diffusion.common.errors import UserError
from flows.config import Params
from flows.deployment.tasks import require_permitted

COMMAND = {"command": ["python", "caption.py", "{image}"], "environment": ["MODEL_KEY"]}
ENDPOINT = {"url": "http://127.0.0.1:8500/caption", "token_env": "CAPTIONER_TOKEN"}


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Inside a run that a worker started; Prefect names this variable for tests."""
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "00000000-0000-0000-0000-000000000001")
    return monkeypatch


def captioned(captioner: dict[str, Any]) -> Params:
    return Params.model_validate({"ingest": {"captioner": captioner | {"version": "one"}}})


OTHERS: list[dict[str, Any]] = [
    {"command": ["sh", "-c", "id"]},
    {"command": COMMAND["command"]},
    {**COMMAND, "command": [*COMMAND["command"], "more"]},
    {**COMMAND, "environment": ["MODEL_KEY", "AWS_SECRET_ACCESS_KEY"]},
    {"url": "http://169.254.169.254/", "token_env": "CAPTIONER_TOKEN"},
    {**ENDPOINT, "token_env": "AWS_SECRET_ACCESS_KEY"},
    {"url": ENDPOINT["url"] + "/"},
]


@pytest.mark.parametrize("captioner", OTHERS)
def test_a_deployed_run_uses_only_permitted_captioners(deployed: pytest.MonkeyPatch, captioner: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="DARKROOM_CAPTIONERS"):
        require_permitted(captioned(captioner))
    deployed.setenv("DARKROOM_CAPTIONERS", json.dumps([COMMAND, ENDPOINT]))
    with pytest.raises(UserError, match="DARKROOM_CAPTIONERS") as error:
        require_permitted(captioned(captioner))
    assert "\n" not in str(error.value)
    # What the message says is enough.
    addition = str(error.value).partition("add ")[2].rpartition(" to the list")[0]
    deployed.setenv("DARKROOM_CAPTIONERS", json.dumps([COMMAND, json.loads(addition)]))
    require_permitted(captioned(captioner))


@pytest.mark.parametrize("captioner", [COMMAND, ENDPOINT])
def test_a_deployed_run_uses_the_captioners_of_its_worker(
    deployed: pytest.MonkeyPatch, captioner: dict[str, Any]
) -> None:
    deployed.setenv("DARKROOM_CAPTIONERS", json.dumps([ENDPOINT, COMMAND]))
    require_permitted(captioned(captioner))


@pytest.mark.parametrize(
    "text", ["python caption.py", "{}", '[{"command": []}]', '[{"command": ["a"], "url": "http://b"}]']
)
def test_a_damaged_list_of_captioners_is_named(deployed: pytest.MonkeyPatch, text: str) -> None:
    deployed.setenv("DARKROOM_CAPTIONERS", text)
    with pytest.raises(UserError, match="DARKROOM_CAPTIONERS"):
        require_permitted(captioned(COMMAND))


def test_a_deployed_run_stays_out_of_other_folders(deployed: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for output in ("", ".", "runs/\0"):
        with pytest.raises(ValidationError):
            Params.model_validate({"training": {"output": output}})
    for output in (
        "../elsewhere",
        "/etc/cron.d",
        str(tmp_path.parent),
        str(tmp_path),
        "data/digits",
        ".darkroom",
        "runs",
    ):
        with pytest.raises(UserError, match=r"training\.output"):
            require_permitted(Params.model_validate({"training": {"output": output}}))
    for output in ("runs/other", str(tmp_path / "runs/digits")):
        require_permitted(Params.model_validate({"training": {"output": output}}))


@pytest.mark.parametrize("captioner", OTHERS)
def test_a_run_that_was_started_here_uses_any_captioner(captioner: dict[str, Any]) -> None:
    require_permitted(captioned(captioner))
