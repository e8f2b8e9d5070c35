"""``darkroom evaluate --model FILE``: any model file on a data set, without any server."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from diffusion.common.errors import UserError
from diffusion.common.files import sha256_file
from diffusion.evaluation.results import Evaluation
from flows.cli import app
from tests.builders.comparisons import discs
from tests.builders.small_models import write_model

PARAMS = {
    "training": {"dataset": "discs"},
    "sampling": {"compute_batch": 16, "steps": 2},
    "evaluation": {"samples": 16, "extractor_size": 32},
}
CLASSES = {"left": 60, "right": 60}
GUIDABLE = {"condition_dropout": 0.1}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    discs(tmp_path / "data" / "discs", 80)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_model_file_is_evaluated_with_its_own_guidance(workspace: Path) -> None:
    path = write_model(workspace / "elsewhere.safetensors", 1, 7, classes=CLASSES, training=GUIDABLE)
    result = CliRunner().invoke(app, ["evaluate", "--model", str(path), "--json"], catch_exceptions=False)
    folder = workspace / "reports" / "discs" / "models" / sha256_file(path)[:8]
    evaluation = Evaluation.read(folder / "evaluation.json")
    assert json.loads(result.stdout)["best"] == evaluation.best.model_dump(mode="json")
    assert (len(evaluation.checkpoints), evaluation.best.images, evaluation.guidance) == (1, 7, None)


def test_report_of_a_model_file_leaves_the_trainings_report(workspace: Path) -> None:
    (checkpoints := workspace / "runs" / "discs" / "checkpoints").mkdir(parents=True)
    checkpoint = write_model(checkpoints / "0000000009.safetensors", 1, 9, classes=CLASSES)
    (checkpoints.parent / "losses.csv").write_text("images\n")
    (checkpoints / f"{checkpoint.name}.sha256").write_text(f"{sha256_file(checkpoint)}\n")
    other = write_model(workspace / "other.safetensors", 2, 7, classes=CLASSES)
    evaluate = ["evaluate", "--local", "--json"]
    first = json.loads(CliRunner().invoke(app, evaluate, catch_exceptions=False).stdout)
    page = Path(first["report"]).read_bytes()
    second = json.loads(CliRunner().invoke(app, [*evaluate, "--model", str(other)], catch_exceptions=False).stdout)
    assert (first["best"]["images"], second["best"]["images"]) == (9, 7)
    assert Path(second["report"]).is_file()
    assert Path(first["report"]).read_bytes() == page
    assert Evaluation.read(workspace / "reports" / "discs" / "evaluation.json").best.images == 9


def test_a_model_of_another_size_is_rejected_before_it_generates(workspace: Path) -> None:
    path = write_model(workspace / "large.safetensors", 1, 7, size=16)
    with pytest.raises(UserError, match=r"ingest\.size=16"):
        CliRunner().invoke(app, ["evaluate", "--model", str(path)], catch_exceptions=False)
    assert not (workspace / "reports").exists()
    path = write_model(workspace / "colour.safetensors", 1, 7, channels=3)
    with pytest.raises(UserError, match=r"ingest\.mode=rgb$"):
        CliRunner().invoke(app, ["evaluate", "--model", str(path)], catch_exceptions=False)
