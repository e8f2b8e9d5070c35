"""Ranking of several trained models under equal conditions: families after the same training, or the runs of a sweep.

Families are ranked by the final model of a run instead of its best checkpoint, so that nothing is selected by the
images that it is ranked by.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, JsonValue
from torch import Tensor

from diffusion.common.config import Config, is_unset
from diffusion.common.errors import UserError
from diffusion.common.files import write_json
from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.shapes import Images
from diffusion.common.threads import cores
from diffusion.evaluation.bootstrap import difference
from diffusion.evaluation.cache import load_or_compute
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.estimate import CONFIDENCE, Estimate, MetricEstimate, holm
from diffusion.evaluation.evaluator import CACHE, Evaluator
from diffusion.evaluation.gate import deciding_distance
from diffusion.evaluation.metrics.held_out_loss import HeldOutLoss
from diffusion.evaluation.model_evaluator import ModelEvaluator, count_gflop
from diffusion.evaluation.model_metrics import Loss
from diffusion.evaluation.real_images import SHOWN
from diffusion.evaluation.results import Evaluation, EvaluationConditions, ModelScores, RealBaseline
from diffusion.generation.generate import sample
from diffusion.process.samplers import SamplingConfig, sampling_config

RANKING = "comparison.json"
"""File name of the ranking of families in the folder of the reports."""


class RankedModel(ModelScores):
    """A model in a ranking."""

    name: str
    file: str
    settings: dict[str, JsonValue] = Field({}, exclude_if=lambda settings: not settings)
    """Settings by dotted key, if the models differ in those alone."""
    run_id: str | None = Field(None, exclude_if=is_unset)
    """Id of its MLflow run."""
    value: float
    """Value of the ranking's metric."""
    error: float
    """Standard error of ``value``."""
    estimates: dict[str, MetricEstimate]
    """Distances and shares by name, such as kid_efflite0, with intervals; empty where there are too few images."""
    minutes: float | None = Field(None, exclude_if=is_unset)
    """Configured training time in minutes; None if configured in images."""
    parameters: int | None = Field(None, exclude_if=is_unset)
    held_out_loss: HeldOutLoss | None = Field(None, exclude_if=is_unset)
    likelihood: Literal["bound", "exact"] | None = Field(None, exclude_if=is_unset)
    """Whether its bits per dimension are an upper bound, or exact; None if it has no likelihood."""
    gflop: float | None = Field(None, exclude_if=is_unset)
    """Floating-point operations to generate one image, in 10⁹."""
    images_per_second: float | None = Field(None, exclude_if=is_unset)
    """Images per second with all cores, measured once; depends on the machine and its load."""
    sampling: SamplingConfig


class Lead(Config):
    """Lead of the best model over another one."""

    worse: str
    """Name of the other model."""
    difference: Estimate
    """Difference of the metrics, at least 0 as measured."""
    p_value: float = Field(ge=0, le=1)
    """Two-sided p-value of ``difference``, by Holm's correction over all pairs of the ranking."""

    @property
    def is_sure(self) -> bool:
        """Return whether the best model is significantly better: false of any in 5 % of rankings at most."""
        return self.p_value <= 1 - CONFIDENCE


def measure_leads(names: Sequence[str], compute_difference: Callable[[int, int], Estimate]) -> list[Lead]:
    """Compare the first of ``names``, the best as measured, with each other one, all sorted by the same measurement.

    ``compute_difference(i, j)`` estimates by how much number j is worse than number i. Which is the best was found by
    the same images, and the best of equals is always ahead of the others; so the p-values are corrected for all pairs,
    any of which might have been the best and another one.
    """
    pairs = list(combinations(range(len(names)), 2))
    differences = [compute_difference(i, j) for i, j in pairs]
    p_values = holm([min(2 * difference.p_value, 1.0) for difference in differences])
    leads = zip(names[1:], differences, p_values, strict=False)  # pairs (0, 1), (0, 2), … come first
    return [Lead(worse=name, difference=difference, p_value=p_value) for name, difference, p_value in leads]


class Ranking(Config):
    """Ranking of several models, the best first."""

    dataset: str
    """Name of the data set."""
    conditions: EvaluationConditions
    """Conditions of the best model; sampling may differ between models."""
    comparable: bool
    """Whether all were evaluated under equal conditions, but for sampling: none or all of them with captions."""
    metric: str
    """Metric of the ranking, such as kid_efflite0."""
    higher_is_better: bool
    models: list[RankedModel]
    leads: list[Lead]
    """Leads of the best over each other model, in their order; empty if there are too few images, or families were not
    ``comparable``."""
    real_baseline: RealBaseline

    @property
    def confidence(self) -> float:
        """Return the confidence of the interval of each lead with which all hold together (Bonferroni, all pairs)."""
        count = len(self.models)
        return 1 - (1 - CONFIDENCE) / max(1, count * (count - 1) // 2)


def rank_models(
    data: Path,
    models: Mapping[str, tuple[Path, SamplingConfig]],
    config: EvaluationConfig,
    output: Path,
    progress: Progress = ignore_progress,
) -> tuple[Ranking, dict[str, Images]]:
    """Rank model files, each with its sampling, by the distance of their images to held-out ones of ``data``.

    All generate image numbers 0 … ``config.samples`` − 1 of ``config.seed``. Expensive parts are cached in ``output``:
    the same call continues after a kill, and ``comparison.json`` is written last. Returns the ranking, and the first
    images of each model by name with held-out ones under ``real``, (N, C, H, W) uint8. Raises UserError for fewer than
    two models, a super-resolution model, other image shapes, or a data set too small.
    """
    if len(models) < 2:
        raise UserError(f"there is nothing to compare {', '.join(models) or 'nothing'} with: name two families or more")
    evaluator = Evaluator(data, config, sampling_config(), output / CACHE, progress)
    evaluators = {name: evaluator.model(path, sampling=options, name=name) for name, (path, options) in models.items()}
    *model_replicates, baseline = evaluator.replicates(list(evaluators.values()))
    replicates = dict(zip(evaluators, model_replicates, strict=True))
    figure = deciding_distance(config.samples, len(evaluator.real.compared))
    ranked_models = [
        RankedModel(
            **dict(model.compute_model_scores()),
            name=name,
            file=str(model.path),
            value=model.scores.get_metric(figure),
            error=figures[figure].estimate.error if figures else model.scores.kid_se if figure == "kid" else 0.0,
            estimates=evaluator.estimates(figures),
            minutes=model.header.training.get("minutes"),
            parameters=sum(parameter.numel() for parameter in model.model.network.parameters()),
            held_out_loss=Loss().compute(model),
            likelihood=model.header.model.likelihood,
            gflop=count_gflop(model.model, model.guided),
            images_per_second=_speed(model),
            sampling=model.guided,
        )
        for (name, model), figures in zip(evaluators.items(), model_replicates, strict=True)
    ]
    ranked_models.sort(key=lambda model: model.value)
    names = [model.name for model in ranked_models]
    # Captions of held-out images tell a model what these show.
    comparable = len({bool(model.conditions.prompts) for model in evaluators.values()}) == 1
    ranking = Ranking(
        dataset=evaluator.real.dataset.manifest.name,
        conditions=evaluator.conditions,
        comparable=comparable,
        metric=f"{figure}_{evaluator.conditions.extractor}",
        higher_is_better=False,
        models=ranked_models,
        leads=measure_leads(names, lambda i, j: difference(replicates[names[j]][figure], replicates[names[i]][figure]))
        if baseline and comparable
        else [],
        real_baseline=evaluator.real_baseline(baseline),
    )
    write_json(output / RANKING, json.loads(ranking.model_dump_json()))
    images = {model.name: evaluators[model.name].images[:SHOWN] for model in ranked_models}
    return ranking, images | {"real": evaluator.real.shown_images}


def rank_evaluations(
    evaluations: Sequence[Evaluation], settings: Sequence[Mapping[str, JsonValue]], run_ids: Sequence[str]
) -> Ranking:
    """Rank training runs that differ in ``settings`` by the selection metric of the best checkpoint of each."""
    runs = sorted(zip(evaluations, settings, run_ids, strict=True), key=lambda run: -run[0].best.selection_metric.rank)
    models = [
        RankedModel(
            **dict(evaluation.best),
            name=", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in setting.items()),
            settings=dict(setting),
            run_id=run_id,
            value=evaluation.best.selection_metric.value,
            error=evaluation.best.selection_metric.error,
            estimates=evaluation.estimates,
            sampling=evaluation.conditions.sampling,
        )
        for evaluation, setting, run_id in runs
    ]
    metrics = [evaluation.best.selection_metric for evaluation, _, _ in runs]
    return Ranking(
        dataset=runs[0][0].dataset,
        conditions=runs[0][0].conditions,
        comparable=len({evaluation.eval_key for evaluation in evaluations}) == 1,
        metric=metrics[0].name,
        higher_is_better=metrics[0].sign > 0,
        models=models,
        leads=measure_leads(
            [model.name for model in models], lambda i, j: metrics[i].estimate.subtract(metrics[j].estimate)
        ),
        real_baseline=runs[0][0].real_baseline,
    )


def _speed(model: ModelEvaluator) -> float:
    """Measure the images generated per second by all cores; cached."""
    count = 2 * cores() * model.sampling.compute_batch

    def work() -> dict[str, Tensor]:
        start = time.perf_counter()
        sample(model.model, range(count), model.config.seed, model.guided, model.progress, model.conditions)
        return {"images_per_second": torch.tensor(count / (time.perf_counter() - start), dtype=torch.float64)}

    key = {"kind": "speed", "format_version": 2, "generated": model.generated_key, "cores": cores()}
    return float(load_or_compute(model.folder, key, work)["images_per_second"])
