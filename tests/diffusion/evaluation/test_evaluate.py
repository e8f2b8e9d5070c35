"""Evaluate: computed once, computed again only if something changed, and the same end after a kill."""

import csv
import json
import shutil
from dataclasses import dataclass
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
from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.features.feature_extractor import EfficientNetLite0
from diffusion.evaluation.metrics.metric import SPLITS
from diffusion.evaluation.metrics.scores import compute_scores
from diffusion.evaluation.results import Evaluation, EvaluationConditions
from diffusion.generation.generate import sample
from diffusion.process.samplers import SamplingConfig, sampling_config
from tests.builders.comparisons import Watcher, evaluate_one
from tests.builders.html_pages import Page
from tests.builders.one_metric import compute_replicates
from tests.builders.shapes import blob
from tests.builders.small_datasets import ingest_blobs, write_blobs
from tests.builders.small_models import write_model

CONFIG = EvaluationConfig(samples=20, finalists=4, extractor_size=32)
SAMPLING = sampling_config(steps=3, compute_batch=10, precision="fp32")


@dataclass(frozen=True)
class Evaluated:
    """Three checkpoints evaluated on a data set; tests change nothing of it."""

    data: Path
    checkpoints: list[Path]
    folder: Path
    evaluation: Evaluation
    watcher: Watcher

    def copy(self, folder: Path) -> Path:
        """A copy of the report with its cache, which a test may change."""
        return Path(shutil.copytree(self.folder, folder))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    root, watcher = tmp_path_factory.mktemp("evaluated"), Watcher()
    data = ingest_blobs(write_blobs(root / "images"), root / "data" / "blobs")
    folder = root / "run" / "checkpoints"
    checkpoints = [write_model(folder / f"{images}.safetensors", images, images) for images in (300, 100, 200)]
    evaluation = evaluate(data, checkpoints, CONFIG, SAMPLING, root / "report", progress=watcher)
    return Evaluated(data, checkpoints, root / "report", evaluation, watcher)


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_scores_compare_generated_images_with_all_held_out_ones(evaluated: Evaluated) -> None:
    extractor, data = EfficientNetLite0(32), Dataset.open(evaluated.data)
    reference = extractor(data.images(data.rows("held_out")))
    for checkpoint in evaluated.evaluation.checkpoints:
        images = sample(load_model(Path(checkpoint.file)), range(20), CONFIG.seed, SAMPLING)
        expected = compute_scores(extractor(images), reference, "efflite0")
        assert checkpoint.scores.metrics() == pytest.approx(expected.metrics(), rel=1e-4, abs=1e-4)


def test_checkpoints_are_ordered_and_the_best_has_lowest_kid(evaluated: Evaluated) -> None:
    evaluation = evaluated.evaluation
    assert [each.images for each in evaluation.checkpoints] == [100, 200, 300]
    kids = {each.scores.kid for each in evaluation.checkpoints}
    assert len(kids) == 3
    assert evaluation.best.scores.kid == min(kids)


def test_real_baseline_uses_training_images_and_states_their_number(evaluated: Evaluated, tmp_path: Path) -> None:
    data, extractor = Dataset.open(evaluated.data), EfficientNetLite0(32)
    train, held_out = data.rows("train"), data.rows("held_out")
    config = CONFIG.model_copy(update={"samples": 100})
    evaluation = evaluate(evaluated.data, evaluated.checkpoints[:1], config, SAMPLING, tmp_path)
    baseline = evaluation.real_baseline.scores
    assert (baseline.samples, baseline.reference) == (len(train), len(held_out))
    expected = compute_scores(extractor(data.images(train)), extractor(data.images(held_out)), "x")
    assert baseline.fd == pytest.approx(expected.fd, rel=1e-3)
    assert evaluated.evaluation.real_baseline.scores.samples == 20


def test_stored_evaluation_equals_the_returned_one(evaluated: Evaluated) -> None:
    output, evaluation = evaluated.folder, evaluated.evaluation
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


def test_grids_show_the_first_generated_and_held_out_images(evaluated: Evaluated, tmp_path: Path) -> None:
    output, checkpoint = evaluated.copy(tmp_path / "report"), evaluated.checkpoints[0]
    # Grids of the other checkpoints go.
    evaluate(evaluated.data, [checkpoint], CONFIG, SAMPLING, output)
    expected_grid = make_grid(sample(load_model(checkpoint), range(20), CONFIG.seed, SAMPLING))
    data = Dataset.open(evaluated.data)
    real = make_grid(data.images(data.rows("held_out")[:64]))
    paths = sorted((output / "grids").iterdir())
    assert [path.name[:10] for path in paths] == ["0000000300", "held_out.p"]
    for path, expected in zip(paths, (expected_grid, real), strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(expected))


def test_reevaluation_samples_nothing_and_changes_no_byte(evaluated: Evaluated, tmp_path: Path) -> None:
    assert evaluated.watcher.sampled_models == {"100", "200", "300"}
    output, watcher = evaluated.copy(tmp_path / "report"), Watcher()
    evaluation = evaluate(evaluated.data, evaluated.checkpoints, CONFIG, SAMPLING, output, progress=watcher)
    assert evaluation == evaluated.evaluation
    assert watcher.seen == []
    assert files_of(output) == files_of(evaluated.folder)


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
def test_changed_condition_triggers_reevaluation(change: dict[str, Any], evaluated: Evaluated, tmp_path: Path) -> None:
    output, watcher = evaluated.copy(tmp_path / "report"), Watcher()
    other = evaluate_one(evaluated.checkpoints[0], evaluated.data, *changed(change), output, watcher)
    # Images are generated again only for what decides them.
    assert watcher.sampled_models == (set() if change.keys() <= {"extractor_size", "reference"} else {"300"})
    assert other.scores != evaluated.evaluation.checkpoints[2].scores


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


def test_changed_weights_are_evaluated_again(evaluated: Evaluated, tmp_path: Path) -> None:
    output, first, watcher = evaluated.copy(tmp_path / "report"), evaluated.evaluation, Watcher()
    changed_model = write_model(tmp_path / "300.safetensors", seed=7, images=300)
    checkpoints = [changed_model, *evaluated.checkpoints[1:]]
    other = evaluate(evaluated.data, checkpoints, CONFIG, SAMPLING, output, progress=watcher)
    assert watcher.sampled_models == {"300"}
    assert other.eval_key == first.eval_key
    assert other.checkpoints[:2] == first.checkpoints[:2]
    assert other.checkpoints[2].scores != first.checkpoints[2].scores


def test_another_data_set_means_other_scores_of_the_same_images(evaluated: Evaluated, tmp_path: Path) -> None:
    output, watcher = evaluated.copy(tmp_path / "report"), Watcher()
    images = write_blobs(tmp_path / "images")
    blob(1000).save(images / "odd" / "new.png")
    other_data = ingest_blobs(images, tmp_path / "data" / "blobs")
    other = evaluate(other_data, evaluated.checkpoints[:1], CONFIG, SAMPLING, output, progress=watcher)
    assert watcher.sampled_models == set()
    assert other.eval_key != evaluated.evaluation.eval_key


def test_interrupted_run_evaluation_resumes_to_the_same_result(evaluated: Evaluated, tmp_path: Path) -> None:
    arguments = evaluated.data, evaluated.checkpoints, CONFIG, SAMPLING, tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        evaluate(*arguments, progress=Watcher("100: images sampled"))
    assert not (tmp_path / "cut" / "report.html").exists()
    watcher = Watcher()
    evaluate(*arguments, progress=watcher)
    assert watcher.sampled_models == {"100", "200"}
    assert files_of(tmp_path / "cut") == files_of(evaluated.folder)


def test_damaged_cached_result_is_replaced(evaluated: Evaluated, tmp_path: Path) -> None:
    output = evaluated.copy(tmp_path / "report")
    for path in (output / "evaluations").glob("*.safetensors"):
        damaged_bytes = bytearray(path.read_bytes())
        damaged_bytes[-1] ^= 1
        path.write_bytes(damaged_bytes)
    evaluate(evaluated.data, evaluated.checkpoints, CONFIG, SAMPLING, output)
    assert files_of(output) == files_of(evaluated.folder)


def test_model_scores_do_not_depend_on_other_models(evaluated: Evaluated, tmp_path: Path) -> None:
    arguments = evaluated.checkpoints[0], evaluated.data, CONFIG, SAMPLING
    watcher = Watcher()
    alone = evaluate_one(*arguments, tmp_path / "other", watcher)
    assert alone == evaluated.evaluation.checkpoints[2]
    assert watcher.sampled_models == {"300"}
    watcher = Watcher()
    assert evaluate_one(*arguments, evaluated.copy(tmp_path / "report"), watcher) == alone
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


def test_what_cannot_be_evaluated_is_an_error(evaluated: Evaluated, tmp_path: Path) -> None:
    few = tmp_path / "data" / "few"
    ingest(few, IngestConfig(source=str(write_blobs(tmp_path / "images")), size=8, held_out=0.02))
    colours = write_model(tmp_path / "rgb.safetensors", seed=0, images=1, channels=3, size=16)
    for data, checkpoints, words in (
        (evaluated.data, [], "no checkpoint to evaluate: train first"),
        (evaluated.data, [tmp_path / "gone.safetensors"], r"no model at .*gone\.safetensors"),
        (evaluated.data, [colours], r"rgb\.safetensors generates images of 3×16×16 and .* holds 1×8×8"),
        (few, evaluated.checkpoints, r"few has \d held-out images?, and evaluation needs 10"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate(data, checkpoints, CONFIG, SAMPLING, tmp_path / "report")


def test_halves_are_cut_once_and_are_those_of_the_features(dataset: Path, tmp_path: Path) -> None:
    path = write_model(tmp_path / "100.safetensors", seed=1, images=100)
    evaluator = Evaluator(dataset, CONFIG, SAMPLING, tmp_path / "cache")
    model = evaluator.model(path)
    replicates = evaluator.replicates([model])
    _, baseline = evaluator.real.real_baseline(CONFIG.seed, CONFIG.samples)
    expected = compute_replicates([model.features, baseline], evaluator.real.reference.features, SPLITS)
    for actual, side in zip(replicates, expected, strict=True):
        assert set(actual) == set(side) == {"fd", "kid", "precision", "recall", "density", "coverage"}
        for figure, each in side.items():
            assert actual[figure].estimate == each.estimate
    watcher = Watcher()
    again = Evaluator(dataset, CONFIG, SAMPLING, tmp_path / "cache", watcher)
    assert [
        {name: each.estimate for name, each in figures.items()} for figures in again.replicates([again.model(path)])
    ] == [{name: each.estimate for name, each in figures.items()} for figures in replicates]
    assert watcher.seen == []


def test_evaluation_has_intervals_of_best_checkpoint_and_baseline(dataset: Path, tmp_path: Path) -> None:
    path = write_model(tmp_path / "100.safetensors", seed=1, images=100)
    evaluation = evaluate(dataset, [path], CONFIG, SAMPLING, tmp_path / "report")
    assert evaluation.estimates["fd_efflite0"].value == evaluation.best.scores.fd
    assert evaluation.real_baseline.estimates["recall_efflite0"].value == evaluation.real_baseline.scores.recall
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_bytes())
    for name in ("kid", "fd", "precision", "recall", "density", "coverage"):
        interval = evaluation.estimates[f"{name}_efflite0"].interval
        assert metrics[f"{name}_efflite0"] == evaluation.best.scores.get_metric(name)
        assert metrics[f"{name}_efflite0_low"] == interval.low
        assert metrics[f"{name}_efflite0_high"] == interval.high
    # One below 12.
    few = evaluate(dataset, [path], CONFIG.model_copy(update={"samples": 11}), SAMPLING, tmp_path / "report")
    assert (few.estimates, few.real_baseline.estimates) == ({}, {})


def test_another_run_on_the_data_set_reuses_real_features(dataset: Path, tmp_path: Path) -> None:
    path = write_model(tmp_path / "100.safetensors", seed=1, images=100)
    first, other = Watcher(), Watcher()
    evaluate(dataset, [path], CONFIG, SAMPLING, tmp_path / "report", progress=first)
    of_real = {"features of real images", "neighbours of real images"}
    assert of_real <= set(first.seen)
    another = write_model(tmp_path / "200.safetensors", seed=2, images=200)
    sampling = SAMPLING.model_copy(update={"steps": 4})
    evaluate(dataset, [another], CONFIG, sampling, tmp_path / "report", progress=other)
    assert other.sampled_models == {"200"}
    assert not of_real & set(other.seen)
    third = Watcher()
    evaluate_one(another, dataset, CONFIG, SAMPLING, tmp_path / "report", third)
    assert third.sampled_models == {"200"}
    assert not of_real & set(third.seen)
