"""Evaluate: computed once, computed again only if something changed, and the same end after a kill."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from diffusion.checkpoints import load_model, read_model_header, save_tensors
from diffusion.common.errors import UserError
from diffusion.common.image_grids import make_grid
from diffusion.data.dataset import Dataset
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.manifest import read_manifest
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.evaluate import evaluate
from diffusion.evaluation.features.feature_extractor import EfficientNetLite0
from diffusion.evaluation.metrics.scores import compute_scores
from diffusion.evaluation.results import Evaluation, EvaluationConditions
from diffusion.generation.generate import sample
from diffusion.process.samplers import SamplingConfig, sampling_config
from tests.builders.comparisons import Watcher, evaluate_one
from tests.builders.html_pages import Page
from tests.builders.shapes import blob
from tests.builders.small_models import write_model

CONFIG = EvaluationConfig(samples=20, finalists=4, extractor_size=32)
SAMPLING = sampling_config(steps=3, compute_batch=10, precision="fp32")


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "run" / "checkpoints"
    return [write_model(folder / f"{images}.safetensors", images, images) for images in (300, 100, 200)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_scores_compare_generated_images_with_all_held_out_ones(
    dataset: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    evaluation = evaluate(dataset, checkpoints, CONFIG, SAMPLING, tmp_path / "report")
    extractor, data = EfficientNetLite0(32), Dataset.open(dataset)
    reference = extractor(data.images(data.rows("held_out")))
    for checkpoint in evaluation.checkpoints:
        images = sample(load_model(Path(checkpoint.file)), range(20), CONFIG.seed, SAMPLING)
        expected = compute_scores(extractor(images), reference, "efflite0")
        assert checkpoint.scores.metrics() == pytest.approx(expected.metrics(), rel=1e-4, abs=1e-4)


def test_checkpoints_are_ordered_and_the_best_has_lowest_kid(
    dataset: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    evaluation = evaluate(dataset, checkpoints, CONFIG, SAMPLING, tmp_path)
    assert [each.images for each in evaluation.checkpoints] == [100, 200, 300]
    kids = {each.scores.kid for each in evaluation.checkpoints}
    assert len(kids) == 3
    assert evaluation.best.scores.kid == min(kids)


def test_real_baseline_uses_training_images_and_states_their_number(
    dataset: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    data, extractor = Dataset.open(dataset), EfficientNetLite0(32)
    train, held_out = data.rows("train"), data.rows("held_out")
    config = CONFIG.model_copy(update={"samples": 100})
    baseline = evaluate(dataset, checkpoints[:1], config, SAMPLING, tmp_path).real_baseline.scores
    assert (baseline.samples, baseline.reference) == (len(train), len(held_out))
    expected = compute_scores(extractor(data.images(train)), extractor(data.images(held_out)), "x")
    assert baseline.fd == pytest.approx(expected.fd, rel=1e-3)
    few = evaluate(dataset, checkpoints[:1], CONFIG, SAMPLING, tmp_path).real_baseline.scores
    assert few.samples == 20


def test_stored_evaluation_equals_the_returned_one(dataset: Path, checkpoints: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "report"
    evaluation = evaluate(dataset, checkpoints, CONFIG, SAMPLING, output)
    assert Evaluation.model_validate_json((output / "evaluation.json").read_bytes()) == evaluation
    metrics = json.loads((output / "metrics.json").read_bytes())
    assert metrics["kid_efflite0"] == evaluation.best.scores.kid
    assert metrics["real_baseline_fd_efflite0"] == evaluation.real_baseline.scores.fd
    assert metrics["samples"] == 20
    assert all(isinstance(value, int | float) for value in metrics.values())
    with (output / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["images"]) for row in rows] == [100, 200, 300]
    kids = [each.scores.kid for each in evaluation.checkpoints]
    assert [float(row["kid_efflite0"]) for row in rows] == kids


def test_grids_show_the_first_generated_and_held_out_images(
    dataset: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "report"
    (output / "grids").mkdir(parents=True)
    (output / "grids" / "of-an-earlier-run.png").write_bytes(b"")
    evaluate(dataset, checkpoints[:1], CONFIG, SAMPLING, output)
    expected_grid = make_grid(sample(load_model(checkpoints[0]), range(20), CONFIG.seed, SAMPLING))
    data = Dataset.open(dataset)
    real = make_grid(data.images(data.rows("held_out")[:64]))
    paths = sorted((output / "grids").iterdir())
    assert [path.name[:10] for path in paths] == ["0000000300", "held_out.p"]
    for path, expected in zip(paths, (expected_grid, real), strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(expected))


def test_reevaluation_samples_nothing_and_changes_no_byte(
    dataset: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    first, again = Watcher(), Watcher()
    evaluation = evaluate(dataset, checkpoints, CONFIG, SAMPLING, tmp_path / "report", progress=first)
    before = files_of(tmp_path / "report")
    assert first.sampled_models == {"100", "200", "300"}
    assert evaluate(dataset, checkpoints, CONFIG, SAMPLING, tmp_path / "report", progress=again) == evaluation
    assert again.seen == []
    assert files_of(tmp_path / "report") == before


CHANGES: list[dict[str, Any]] = [
    {"seed": 1},
    {"samples": 30},
    {"extractor_size": 64},
    {"reference": 12},
    {"sampling": {"steps": 4}},
    {"sampling": {"sampler": "ddim"}},
]


def changed(change: dict[str, Any]) -> tuple[EvaluationConfig, SamplingConfig]:
    fields = {name: value for name, value in change.items() if name != "sampling"}
    # Options of one sampler alone do not go with another.
    common = SAMPLING.model_dump(include={"steps", "compute_batch", "precision"})
    return CONFIG.model_copy(update=fields), sampling_config(**common | change.get("sampling", {}))


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_changed_condition_triggers_reevaluation(
    change: dict[str, Any], dataset: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    first = evaluate_one(checkpoints[0], dataset, CONFIG, SAMPLING, tmp_path / "report")
    watcher = Watcher()
    other = evaluate_one(checkpoints[0], dataset, *changed(change), tmp_path / "report", watcher)
    # Images are generated again only for what decides them.
    assert watcher.sampled_models == (set() if change.keys() <= {"extractor_size", "reference"} else {"300"})
    assert other.scores != first.scores


def test_the_key_of_the_conditions_changes_with_each_of_them() -> None:
    def key(evaluation: EvaluationConfig, sampling: SamplingConfig, content: str = "a", weights: str = "b") -> str:
        return EvaluationConditions(
            content_digest=content,
            extractor="efflite0",
            extractor_digest=weights,
            preprocessing="32 pixels",
            evaluation=evaluation,
            sampling=sampling,
        ).key

    keys = [key(CONFIG, SAMPLING), key(CONFIG, SAMPLING, content="c"), key(CONFIG, SAMPLING, weights="c")]
    keys += [key(*changed(change)) for change in CHANGES]
    assert len(set(keys)) == len(keys)
    assert key(CONFIG, SAMPLING) == key(CONFIG, SAMPLING)


def test_changed_weights_are_evaluated_again(dataset: Path, checkpoints: list[Path], tmp_path: Path) -> None:
    first = evaluate(dataset, checkpoints, CONFIG, SAMPLING, tmp_path / "report")
    write_model(checkpoints[0], seed=7, images=300)
    watcher = Watcher()
    other = evaluate(dataset, checkpoints, CONFIG, SAMPLING, tmp_path / "report", progress=watcher)
    assert watcher.sampled_models == {"300"}
    assert other.eval_key == first.eval_key
    assert other.checkpoints[:2] == first.checkpoints[:2]
    assert other.checkpoints[2].scores != first.checkpoints[2].scores


def test_another_data_set_means_other_scores_of_the_same_images(
    dataset: Path, checkpoints: list[Path], images: Path, tmp_path: Path
) -> None:
    first = evaluate(dataset, checkpoints[:1], CONFIG, SAMPLING, tmp_path / "report")
    blob(1000).save(images / "odd" / "new.png")
    ingest(dataset, IngestConfig(source=str(images), size=8, held_out=0.33))
    watcher = Watcher()
    other = evaluate(dataset, checkpoints[:1], CONFIG, SAMPLING, tmp_path / "report", progress=watcher)
    assert watcher.sampled_models == set()
    assert other.eval_key != first.eval_key


def test_interrupted_run_evaluation_resumes_to_the_same_result(
    dataset: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    evaluate(dataset, checkpoints, CONFIG, SAMPLING, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        evaluate(dataset, checkpoints, CONFIG, SAMPLING, tmp_path / "cut", progress=Watcher("100: images sampled"))
    assert not (tmp_path / "cut" / "report.html").exists()
    watcher = Watcher()
    evaluate(dataset, checkpoints, CONFIG, SAMPLING, tmp_path / "cut", progress=watcher)
    assert watcher.sampled_models == {"100", "200"}
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_damaged_cached_result_is_replaced(dataset: Path, checkpoints: list[Path], tmp_path: Path) -> None:
    evaluate(dataset, checkpoints, CONFIG, SAMPLING, tmp_path / "report")
    before = files_of(tmp_path / "report")
    for path in (tmp_path / "report" / "evaluations").glob("*.safetensors"):
        damaged_bytes = bytearray(path.read_bytes())
        damaged_bytes[-1] ^= 1
        path.write_bytes(damaged_bytes)
    evaluate(dataset, checkpoints, CONFIG, SAMPLING, tmp_path / "report")
    assert files_of(tmp_path / "report") == before


def test_model_scores_do_not_depend_on_other_models(dataset: Path, checkpoints: list[Path], tmp_path: Path) -> None:
    evaluation = evaluate(dataset, checkpoints, CONFIG, SAMPLING, tmp_path / "report")
    watcher = Watcher()
    alone = evaluate_one(checkpoints[0], dataset, CONFIG, SAMPLING, tmp_path / "other", watcher)
    assert alone == evaluation.checkpoints[2]
    assert watcher.sampled_models == {"300"}
    watcher = Watcher()
    assert evaluate_one(checkpoints[0], dataset, CONFIG, SAMPLING, tmp_path / "report", watcher) == alone
    assert watcher.seen == []


@pytest.mark.parametrize("same_version", [True, False])
def test_a_model_of_another_data_version_gets_a_warning(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, same_version: bool
) -> None:
    manifest = read_manifest(dataset)
    path = write_model(tmp_path / "model.safetensors", 0, 100)
    header = read_model_header(path).model_copy(update={"dataset": manifest.name})
    if same_version:
        header = header.model_copy(update={"content_digest": manifest.content_digest})
    save_tensors(path, load_file(path), {"model_header": header.model_dump(mode="json")})
    evaluate(dataset, [path], CONFIG, SAMPLING, tmp_path / "report")
    assert ("ingest.held_out" in caplog.text) is not same_version
    assert ("which training never saw" in Page((tmp_path / "report" / "report.html").read_text()).text) is same_version


def test_a_run_without_checkpoints_is_rejected(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint to evaluate: train first"):
        evaluate(dataset, [], CONFIG, SAMPLING, tmp_path)


def test_a_missing_model_is_rejected(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model at .*gone\.safetensors"):
        evaluate(dataset, [tmp_path / "gone.safetensors"], CONFIG, SAMPLING, tmp_path)


def test_a_model_of_other_images_is_rejected(dataset: Path, tmp_path: Path) -> None:
    path = write_model(tmp_path / "rgb.safetensors", seed=0, images=1, channels=3, size=16)
    with pytest.raises(UserError, match=r"rgb\.safetensors generates images of 3×16×16 and .* holds 1×8×8"):
        evaluate(dataset, [path], CONFIG, SAMPLING, tmp_path)


def test_too_few_held_out_images_are_rejected(images: Path, checkpoints: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "data" / "few"
    ingest(folder, IngestConfig(source=str(images), size=8, held_out=0.02))
    with pytest.raises(UserError, match=r"few has \d held-out images?, and evaluation needs 10"):
        evaluate(folder, checkpoints, CONFIG, SAMPLING, tmp_path)
