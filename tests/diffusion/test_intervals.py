"""Intervals in an evaluation, and real pictures that are looked at once for all runs."""

import json
from pathlib import Path

import pytest
import torch

from diffusion.config_sampling import SamplingConfig
from diffusion.evaluation.bootstrap import replicates
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.evaluate import evaluate
from diffusion.evaluation.intervals import HalvesKey, estimates
from diffusion.fingerprint import fingerprint
from tests.diffusion.small_models import write_model
from tests.diffusion.test_evaluate import Watcher
from tests.diffusion.trials import evaluate_one

CONFIG = EvaluationConfig(samples=20, extractor_size=32)
SAMPLING = SamplingConfig(steps=3, compute_batch=10, precision="fp32")
KEY = HalvesKey(model="m", conditions="c", fingerprint=fingerprint(64, "fp32", "cpu"))


def features(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def test_the_errors_are_those_of_halves_about_what_as_many_pictures_get(tmp_path: Path) -> None:
    drawn, floor, reference = features(40, 0) + 0.5, features(60, 1), features(50, 2)
    found = estimates(tmp_path, KEY, drawn, floor, reference)
    assert found is not None
    expected = replicates([drawn, floor], reference)
    for ours, theirs in zip((found.best, found.floor), expected, strict=True):
        assert set(ours) == set(theirs) == {"fd", "kid", "precision", "recall", "density", "coverage"}
        for figure, each in theirs.items():
            assert ours[figure].value == each.whole
            assert ours[figure].error == each.estimate.error
    # 40 of 8 features each are enough for the distance without its bias, which is another one than that on the page.
    assert expected[0]["fd"].extrapolated
    assert expected[0]["fd"].value != expected[0]["fd"].whole


@pytest.mark.parametrize("few", [0, 1, 2])
def test_too_few_pictures_have_no_intervals(few: int, tmp_path: Path) -> None:
    sizes = [11 if few == number else 12 for number in range(3)]
    assert estimates(tmp_path, KEY, *(features(size, number) for number, size in enumerate(sizes))) is None
    assert list(tmp_path.iterdir()) == []
    assert estimates(tmp_path, KEY, *(features(12, number) for number in range(3))) is not None


def test_halves_are_cut_once(tmp_path: Path) -> None:
    sets = [features(20, number) for number in range(3)]
    first, again = Watcher(), Watcher()
    found = estimates(tmp_path, KEY, *sets, first)
    assert estimates(tmp_path, KEY, *sets, again) == found
    assert first.seen
    assert again.seen == []


def test_an_evaluation_has_intervals_of_its_best_checkpoint_and_of_its_floor(dataset: Path, tmp_path: Path) -> None:
    path = write_model(tmp_path / "100.safetensors", seed=1, images=100)
    found = evaluate(dataset, [path], CONFIG, SAMPLING, tmp_path / "report")
    assert found.estimates is not None
    assert found.estimates.best["fd"].value == pytest.approx(found.best.scores.fd, rel=1e-4)
    assert found.estimates.floor["recall"].value == pytest.approx(found.floor.recall)
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_bytes())
    for name in ("kid", "fd", "precision", "recall", "density", "coverage"):
        interval = found.estimates.best[name].interval(0.95)
        assert metrics[f"{name}_low_efflite0"] == interval.low
        assert metrics[f"{name}_high_efflite0"] == interval.high
    # One below 12.
    few = evaluate(dataset, [path], CONFIG.model_copy(update={"samples": 11}), SAMPLING, tmp_path / "report")
    assert few.estimates is None


def test_another_run_on_the_same_data_set_looks_at_no_real_picture_again(dataset: Path, tmp_path: Path) -> None:
    path = write_model(tmp_path / "100.safetensors", seed=1, images=100)
    first, other = Watcher(), Watcher()
    evaluate(dataset, [path], CONFIG, SAMPLING, tmp_path / "report", progress=first)
    of_real = {"features of real pictures", "neighbours of real pictures"}
    assert of_real <= set(first.seen)
    another = write_model(tmp_path / "200.safetensors", seed=2, images=200)
    sampling = SAMPLING.model_copy(update={"steps": 4})
    evaluate(dataset, [another], CONFIG, sampling, tmp_path / "report", progress=other)
    assert other.drawn == {"200"}
    assert not of_real & set(other.seen)
    third = Watcher()
    evaluate_one(another, dataset, CONFIG, SAMPLING, tmp_path / "report", third)
    assert third.drawn == {"200"}
    assert not of_real & set(third.seen)
