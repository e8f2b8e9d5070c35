"""``darkroom compare --local``: families trained and evaluated side by side, without any server."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from diffusion.checkpoints import read_model_header
from diffusion.common.errors import UserError
from flows.cli import app
from tests.builders.comparisons import discs

PARAMS = {
    "training": {"dataset": "discs", "images": 64, "checkpoints": 1},
    "sampling": {"compute_batch": 16, "steps": 2},
    "evaluation": {"samples": 16, "extractor_size": 32},
}
COMMAND = ["compare", "--local", "--family", "gan", "--family", "autoregressive", "--json"]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    discs(tmp_path / "data" / "discs", 80)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_families_train_in_separate_folders_with_one_ranking_report(workspace: Path) -> None:
    result = CliRunner().invoke(app, COMMAND, catch_exceptions=False)
    output = json.loads(result.stdout)
    ranking = output["ranking"]
    assert {each["name"] for each in ranking["models"]} == {"gan", "autoregressive"}
    for each in ranking["models"]:
        assert each["file"] == f"runs/discs-{each['name']}/final.safetensors"
        assert (each["images"], each["sampling"]["compute_batch"]) == (64, 16)
        assert read_model_header(Path(each["file"])).training["batch_size"] == 32
    assert json.loads((workspace / "reports" / "discs" / "comparison.json").read_text()) == ranking
    assert "Images of gan" in (workspace / "reports" / "discs" / "comparison.html").read_text()
    # Given again it finds all of it done.
    assert json.loads(CliRunner().invoke(app, COMMAND, catch_exceptions=False).stdout) == output


def test_a_run_of_other_settings_is_not_thrown_away(workspace: Path) -> None:
    CliRunner().invoke(app, COMMAND, catch_exceptions=False)
    with pytest.raises(UserError, match=r"runs/discs-gan holds a run that differs in training\.images"):
        CliRunner().invoke(app, [*COMMAND, "--set", "training.images=128"], catch_exceptions=False)


def test_a_teacher_in_the_registry_is_an_error_without_servers(workspace: Path) -> None:
    with pytest.raises(UserError, match=r"distillation\.teacher"):
        CliRunner().invoke(app, ["distill", "--local"], catch_exceptions=False)
