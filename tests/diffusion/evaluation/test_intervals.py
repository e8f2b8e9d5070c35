"""Intervals in an evaluation, and real images that are looked at once for all runs."""

import json
from pathlib import Path

from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.evaluate import evaluate
from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.metrics.metric import SPLITS
from diffusion.process.samplers import sampling_config
from tests.builders.comparisons import Watcher, evaluate_one
from tests.builders.one_metric import compute_replicates
from tests.builders.small_models import write_model

CONFIG = EvaluationConfig(samples=20, extractor_size=32)
SAMPLING = sampling_config(steps=3, compute_batch=10, precision="fp32")


def test_halves_are_cut_once_and_are_those_of_the_features(dataset: Path, tmp_path: Path) -> None:
    path = write_model(tmp_path / "100.safetensors", seed=1, images=100)
    evaluator = Evaluator(dataset, CONFIG, SAMPLING, tmp_path / "cache")
    model = evaluator.model(path)
    replicates = evaluator.replicates([model])
    _, baseline = evaluator.real.real_baseline(CONFIG.seed, CONFIG.samples)
    expected = compute_replicates([model.features, baseline], evaluator.real.reference.features, SPLITS)
    for ours, theirs in zip(replicates, expected, strict=True):
        assert set(ours) == set(theirs) == {"fd", "kid", "precision", "recall", "density", "coverage"}
        for figure, each in theirs.items():
            assert ours[figure].estimate == each.estimate
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
