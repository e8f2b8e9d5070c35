"""``darkroom compare --local``: families trained and evaluated side by side, without any server."""

import json
import os
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from diffusion.checkpoints import read_model_header
from diffusion.common.errors import UserError
from flows.cli import app
from flows.cli.command import hide_prefect_log
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
    for options in ([], ["--dry-run"]):
        words = [*COMMAND, "--set", "training.images=128", *options]
        with pytest.raises(UserError, match=r"runs/discs-gan holds a run that differs in training\.images") as raised:
            CliRunner().invoke(app, words, catch_exceptions=False)
        # A comparison takes no other folder.
        assert "training.output" not in str(raised.value)


def test_a_teacher_in_the_registry_is_an_error_without_servers(workspace: Path) -> None:
    with pytest.raises(UserError, match=r"distillation\.teacher"):
        CliRunner().invoke(app, ["distill", "--local"], catch_exceptions=False)


def test_student_of_other_settings_is_kept_without_restart(workspace: Path) -> None:
    def run(*words: str) -> None:
        CliRunner().invoke(app, [*words, "--local", "--set", "model.width=16"], catch_exceptions=False)

    run("train")
    teacher = ("distill", "--set", "distillation.teacher=runs/discs/final.safetensors")
    student = workspace / "runs" / "discs-student" / "final.safetensors"
    run(*teacher, "--set", "distillation.images=64")
    first = student.read_bytes()
    with pytest.raises(UserError, match=r"training\.images.*--restart"):
        run(*teacher, "--set", "distillation.images=128")
    assert student.read_bytes() == first
    run(*teacher, "--set", "distillation.images=128", "--restart")
    assert read_model_header(student).images == 128


def test_training_on_too_few_images_warns_and_goes_on(workspace: Path) -> None:
    discs(workspace / "data" / "few", 20)
    words = ["train", "--local", "--dataset", "few", "--set", "model.width=16", "--set", "training.images=1024"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert next(line for line in done.stderr.splitlines() if "ingest.held_out" in line).startswith("warning: ")
    assert done.stderr.count("ingest.held_out") == 1
    assert done.stdout.startswith("1,024 images seen")
    done = CliRunner().invoke(app, [*words, "--dataset", "discs"], catch_exceptions=False)
    assert "ingest.held_out" not in done.stderr


def test_prefect_repeats_no_log_line(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "")
    monkeypatch.delenv("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL")
    hide_prefect_log()
    assert os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] == "CRITICAL"
