"""Metrics of other packages: found by their entry points, in metrics.json, the report and what is logged."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from diffusion.checkpoints import load_model
from diffusion.common import extensions
from diffusion.common.errors import UserError
from diffusion.data.dataset import Dataset
from diffusion.evaluation.comparison import COMPARISON, ChampionComparison, compare_with_champion
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.evaluate import evaluate
from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.features.feature_extractor import EfficientNetLite0
from diffusion.evaluation.gate import GateConfig
from diffusion.evaluation.metrics import load_metrics
from diffusion.evaluation.reports.comparison_report import ComparisonPage
from diffusion.evaluation.reports.html import format_signed
from diffusion.evaluation.results import Evaluation
from diffusion.generation.generate import sample
from diffusion.process.samplers import sampling_config
from flows.tracking.runs import RunTracker, log_evaluation
from tests.builders.html_pages import Page
from tests.builders.small_models import write_model

CODE = """
import torch
from diffusion.evaluation.metrics.metric import Figure, Metric
from diffusion.evaluation.model_metrics import ModelMetric

class MeanDistance(Metric):
    figures = (
        Figure("mean_distance", "distance of means", "Squared distance of mean features.", "How far means are.",
               interval="non-negative"),
    )

    def prepare(self, features, progress):
        return {"mean": features.double().mean(0)}

    def compute(self, samples, reference):
        mean = samples.features.double().mean(0)
        return {"mean_distance": float((mean - reference.statistics["mean"]).square().sum())}

class Contrast(Metric):
    figures = (Figure("range", "range of values", "Highest less lowest value.", "How wide.", lower_is_better=False),)

    def compute(self, samples, reference):
        values = torch.cat([torch.stack(list(piece)).flatten() for piece in samples.images()])
        return {"range": float(values.max()) - float(values.min())}

class Sharpness(ModelMetric):
    figures = (Figure("sharpness", "sharpness", "Difference of neighbours.", "How sharp.", lower_is_better=False),)

    def compute(self, model):
        images = model.images.double()
        return {"sharpness": float((images[..., 1:] - images[..., :-1]).abs().mean())}

class Nothing(Metric):
    figures = (Figure("nothing", "", ""),)

    def compute(self, samples, reference):
        return {"nothing": float("nan")}

class Taken(Metric):
    figures = (Figure("kid", "", ""),)

    def compute(self, samples, reference):
        return {}
"""
CONFIG = EvaluationConfig(samples=20, extractor_size=32, guidance=None)
SAMPLING = sampling_config(steps=2, compute_batch=10, precision="fp32")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Install a package of this version with metrics, name and class of each."""
    folder = tmp_path / "site"
    monkeypatch.syspath_prepend(str(folder))

    def install_package(version: str = "1.0", **metrics: str) -> None:
        info = folder / "sharp_metrics-1.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (folder / "sharp_metrics.py").write_text(CODE)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sharp-metrics\nVersion: {version}\n")
        lines = [f"{name} = sharp_metrics:{kind}" for name, kind in metrics.items()]
        (info / "entry_points.txt").write_text("\n".join(["[darkroom.metrics]", *lines]) + "\n")
        importlib.invalidate_caches()
        extensions._entries.cache_clear()

    yield install_package
    sys.modules.pop("sharp_metrics", None)
    extensions._entries.cache_clear()


def test_extensions_are_computed_reported_and_logged(dataset: Path, tmp_path: Path, install: MagicMock) -> None:
    model, output = write_model(tmp_path / "1.safetensors", 1, 100), tmp_path / "report"
    plain = evaluate(dataset, [model], CONFIG, SAMPLING, output)
    install(mean_distance="MeanDistance", contrast="Contrast")
    evaluation = evaluate(dataset, [model], CONFIG, SAMPLING, output)

    extractor, data = EfficientNetLite0(32), Dataset.open(dataset)
    images, real = sample(load_model(model), range(20), 0, SAMPLING), data.images(data.rows("held_out"))
    difference = extractor(images).double().mean(0) - extractor(real).double().mean(0)
    expected = {
        "mean_distance_efflite0": pytest.approx(float(difference.square().sum()), rel=1e-4),
        "range_efflite0": float(images.max()) - float(images.min()),
    }

    metrics = json.loads((output / "metrics.json").read_bytes())
    assert {name: metrics[name] for name in expected} == expected
    assert plain.metrics().items() <= metrics.items()
    assert metrics["real_baseline_mean_distance_efflite0"] > 0
    low, high = (metrics[f"mean_distance_efflite0_{end}"] for end in ("low", "high"))
    assert 0 <= low <= metrics["mean_distance_efflite0"] <= high

    page = Page((output / "report.html").read_text())
    assert "mean_distance_efflite0" in page.text
    assert "lower How far means are." in page.text
    assert "higher How wide." in page.text

    install()
    # The evaluation stays readable where the metric is missing.
    assert Evaluation.read(output / "evaluation.json") == evaluation

    client = MagicMock()
    log_evaluation(RunTracker(client, "run"), evaluation)
    logged = {point.key: point.value for point in client.log_batch.call_args.kwargs["metrics"]}
    assert {f"eval/{name}": value for name, value in expected.items()}.items() <= logged.items()


def test_metrics_of_models_are_compared_reported_and_stored(dataset: Path, tmp_path: Path, install: MagicMock) -> None:
    model, path = write_model(tmp_path / "1.safetensors", 1, 100), tmp_path / "page.html"
    install(sharpness="Sharpness")
    comparison, grids = compare_with_champion(model, None, dataset, CONFIG, SAMPLING, GateConfig(), tmp_path)
    images = sample(load_model(model), range(20), CONFIG.seed + 1, SAMPLING).double()
    expected = float((images[..., 1:] - images[..., :-1]).abs().mean())
    assert comparison.candidate.metrics()["sharpness"] == expected
    ComparisonPage(comparison, grids, "clothes", "fashion", "version 1").write(path)
    assert f"sharpness {format_signed(expected)} higher How sharp." in Page(path.read_text()).text
    install()
    stored = ChampionComparison.model_validate_json((tmp_path / COMPARISON).read_bytes())
    assert stored.candidate == comparison.candidate


def test_versions_of_extensions_are_conditions(dataset: Path, tmp_path: Path, install: MagicMock) -> None:
    keys = set()
    for version, metrics in (("1.0", {}), ("1.0", {"range": "Contrast"}), ("1.1", {"range": "Contrast"})):
        install(version, **metrics)
        conditions = Evaluator(dataset, CONFIG, SAMPLING, tmp_path).conditions
        assert conditions.extensions == dict.fromkeys(metrics, f"sharp-metrics {version}")
        keys.add(conditions.key)
    assert len(keys) == 3


def test_unusable_extensions_are_errors_that_name_them(dataset: Path, tmp_path: Path, install: MagicMock) -> None:
    install(again="Taken")
    with pytest.raises(UserError, match=r"again of darkroom.metrics computes 'kid', which is taken"):
        load_metrics()
    install(other="Figure")
    with pytest.raises(UserError, match=r"other of darkroom.metrics is not a class of .*Metric"):
        load_metrics()
    install(empty="Nothing")
    with pytest.raises(UserError, match="the metric empty computed nothing = nan"):
        evaluate(dataset, [write_model(tmp_path / "1.safetensors", 1, 100)], CONFIG, SAMPLING, tmp_path / "report")
