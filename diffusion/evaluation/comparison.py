"""Comparison of a candidate with the champion under equal conditions, and the gate's decision.

Both generate the same image numbers of one seed, but none by which the checkpoint was selected, because the best of
many looks too good on these. What the evaluation generated beyond them is shared. The held-out images are the same in
both.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion.checkpoints import read_model_header
from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.escaping import pluralize
from diffusion.common.files import write_json
from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.shapes import Images
from diffusion.evaluation.bootstrap import difference
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.estimate import Estimate, paired_difference
from diffusion.evaluation.evaluator import CACHE, Evaluator, MetricReplicates
from diffusion.evaluation.gate import GateConfig, GateDecision, decide, deciding_distance
from diffusion.evaluation.gate_metrics import (
    ClassAgreement,
    ComparisonMetrics,
    Cost,
    Headline,
    OwnMetric,
    PromptAgreement,
)
from diffusion.evaluation.metrics.per_group import PerClass
from diffusion.evaluation.metrics.scores import MIN_FOR_ERRORS, Scores
from diffusion.evaluation.metrics.text_image_agreement import describe_agreement, mean_over_prompts
from diffusion.evaluation.model_evaluator import ModelEvaluator
from diffusion.evaluation.model_metrics import evaluate_in_full
from diffusion.evaluation.real_images import SHOWN
from diffusion.evaluation.results import EvaluationConditions, ModelEvaluation, RealBaseline
from diffusion.families.config import effective_sampling
from diffusion.generation.super_resolution import task_of
from diffusion.process.samplers import SamplingConfig

COMPARISON = "champion_comparison.json"
"""File name of the result in the folder of the evaluation."""
Side = tuple[ModelEvaluator, ModelEvaluation]


class ChampionComparison(Config):
    """Comparison of a candidate with the champion, and the gate's decision."""

    conditions: EvaluationConditions
    key: str
    """``conditions.key``; metrics are comparable only where it is equal."""
    gate: GateConfig
    candidate: ModelEvaluation
    champion: ModelEvaluation | None
    """The champion's evaluation; None if there is no champion, or it could not be evaluated."""
    real_baseline: RealBaseline
    compared: ComparisonMetrics
    """Metrics that the gate decided on."""
    look: int
    """Number of the look that decided, from 1."""
    confidence: float
    """Confidence that a promotion took at it: above ``gate.confidence`` if there might have been several looks."""
    decision: GateDecision

    @property
    def reason(self) -> str:
        """Return the reasons for the verdict as one text."""
        return "; ".join(self.decision.reasons)

    @property
    def shortage(self) -> str | None:
        """How many images the verdict is short of; None unless all that holds the candidate is want of images."""
        return self.decision.describe_shortage(self.compared)

    def metrics(self) -> dict[str, float]:
        """Return the candidate's metrics by name, the champion's and the real baseline's under prefixes."""
        metrics = self.candidate.metrics()
        if self.champion is not None:
            metrics |= {f"champion_{name}": value for name, value in self.champion.metrics().items()}
        return metrics | {f"real_baseline_{name}": value for name, value in self.real_baseline.metrics().items()}


@dataclass(frozen=True)
class SampleGrids:
    """Images for the report on a comparison, each (C, H, W) uint8."""

    real: Images
    """Held-out images; for super-resolution models the ones that they upscaled."""
    candidate: Images
    champion: Images | None
    """The first images that each generated."""
    nearest_generated: Images
    nearest_training: Images
    """The candidate's images nearest to training images, and these, in the order of ``memorization.pairs``."""
    duplicates: list[Images]
    """The candidate's images that are duplicates of one another, in the order of ``duplicates.groups``."""
    captions: tuple[list[str], list[str]]
    """Prompt or class of each image of candidate and champion; empty if they have none."""
    classes: Mapping[str, tuple[Images, Images]]
    """Held-out images and as many generated ones of the candidate's worst classes by name, the worst first."""


def compare_with_champion(
    candidate: Path,
    champion: Path | None,
    data: Path,
    config: EvaluationConfig,
    sampling: SamplingConfig,
    gate: GateConfig,
    output: Path,
    progress: Progress = ignore_progress,
    choosing_samples: int | None = None,
) -> tuple[ChampionComparison, SampleGrids]:
    """Compare two model files on the data set in ``data`` and apply the gate.

    A champion that cannot be compared (of another family, shape or task, where only one of the two has captions, of
    classes that the candidate does not know, or one that cannot sample as configured), and sets too small for errors,
    hold the candidate with the reason. Where more images may decide, both generate twice as many, ``gate.looks`` times
    at most. Expensive parts are cached: the same call after a kill continues, and the
    champion's images are generated again only if something differs. ``config`` is how the candidate's checkpoint was
    selected, and ``choosing_samples`` are the images of ``config.seed`` by which it was, after which those of the
    comparison begin; None, unknown: the comparison generates with ``config.seed`` + 1. ``output`` is the folder of
    ``champion_comparison.json``, written last, and of the cache.

    Raises UserError if the candidate cannot be evaluated.
    """
    evaluator = _evaluator(candidate, data, config, sampling, output, progress, choosing_samples)
    # A distance that changed between looks would be tested twice.
    metric = deciding_distance(config.samples, len(evaluator.real.compared))
    max_samples = config.samples * 2 ** (gate.looks - 1)
    for look in range(1, gate.looks + 1):
        sides, baseline, compared = _compare(
            evaluator, candidate, champion, gate, config.samples * 2 ** (look - 1), metric
        )
        can_repeat = compared.has_champion and compared.basis == "generated" and evaluator.real.small is None
        looks = gate.looks if can_repeat else 1
        decision = decide(compared, gate, look if can_repeat else 1, looks)
        if not can_repeat or look == looks or not decision.worth_another_look(max_samples):
            break
    (model, evaluation), (champion_model, champion_evaluation) = sides
    result = ChampionComparison(
        conditions=evaluator.conditions,
        key=evaluator.conditions.key,
        gate=gate,
        candidate=evaluation,
        champion=champion_evaluation,
        real_baseline=evaluator.real_baseline(baseline),
        compared=compared,
        look=look,
        confidence=gate.promotion_confidence(look, looks),
        decision=decision,
    )
    write_json(output / COMPARISON, json.loads(result.model_dump_json()))
    return result, _sample_grids(model, champion_model, evaluation)


def _compare(
    evaluator: Evaluator,
    candidate_path: Path,
    champion_path: Path | None,
    gate: GateConfig,
    samples: int,
    metric: Literal["kid", "fd"],
) -> tuple[tuple[Side, Side | tuple[None, None]], MetricReplicates, ComparisonMetrics]:
    """Compare two model files on ``samples`` images of each; None: no champion, or it could not be evaluated.

    Also returns the metrics of the real baseline on halves.
    """
    candidate = evaluator.model(candidate_path, samples, name="candidate")
    evaluation = evaluate_in_full(candidate)
    champion: Side | tuple[None, None] = None, None
    incomparable = None
    if champion_path is not None:
        try:
            opened = _open_champion(evaluator, candidate, champion_path, gate, samples)
            champion = opened, evaluate_in_full(opened)
        except UserError as error:
            incomparable = f"the champion cannot be evaluated beside it: {error}"
    replicates = evaluator.replicates([candidate] if champion[0] is None else [candidate, champion[0]])
    families = {model.header.model.family for model in (candidate, champion[0] or candidate)}
    # Else both are autoencoders.
    generated = len(families) > 1 or candidate.header.model.evaluated_by == "samples"
    if champion[0] is not None and generated and not replicates[-1]:
        incomparable = (
            f"too few images to tell the two apart: {len(candidate.features)} generated and "
            f"{len(candidate.real.compared)} held out, and errors need {MIN_FOR_ERRORS} of either: generate more with "
            "evaluation.samples, or hold more out with ingest.held_out"
        )
    own: dict[str, Any] = {}
    if generated and champion_path is None:
        own = own_metrics(evaluator, evaluation.scores, evaluation.per_class, *replicates)
    metrics = ComparisonMetrics(
        basis="generated" if generated else "reconstructed",
        samples=len(candidate.features) if generated else len(candidate.real.held_out),
        reference=len(candidate.real.compared),
        has_champion=champion_path is not None,
        incomparable=incomparable,
        **own,
        memorized=evaluation.memorization.copy_share if generated else None,
        agreement=_agreement(candidate, champion[0] if incomparable is None else None),
    )
    if champion[0] is not None and incomparable is None:
        differences: dict[str, object] = {"headline": psnr_headline(candidate.psnr, champion[0].psnr)}
        if generated:
            differences = _differences((candidate, evaluation), champion, replicates, metric)
        metrics = metrics.model_copy(update=differences)
    evaluation = evaluation.model_copy(update={"estimates": evaluator.estimates(replicates[0])})
    if champion[0] is not None:
        estimates = evaluator.estimates(replicates[1])
        champion = champion[0], champion[1].model_copy(update={"estimates": estimates})
    return ((candidate, evaluation), champion), replicates[-1], metrics


def _open_champion(
    evaluator: Evaluator, candidate: ModelEvaluator, path: Path, gate: GateConfig, samples: int
) -> ModelEvaluator:
    """Open the champion as it is to be sampled; raises UserError if it cannot be compared with the candidate."""
    # Not the candidate's sampling, which has its own guidance.
    family, sampling, header = candidate.header.model.family, evaluator.sampling, read_model_header(path)
    if header.model.family != family:
        if not gate.across_families:
            raise UserError(
                f"it is a {header.model.family} and the candidate a {family}, which the gate compares only with "
                "gate.across_families"
            )
        # Sampling that does not apply to its family is replaced by that family's defaults.
        sampling = effective_sampling(header.model, sampling)
    if header.guide_images is None:
        sampling = sampling.with_changes({"autoguidance": None})
    champion = evaluator.model(path, samples, sampling, name="champion")
    require_same_requests(candidate, champion)
    return champion


def _differences(
    candidate: Side, champion: Side, replicates: Sequence[MetricReplicates], metric: Literal["kid", "fd"]
) -> dict[str, object]:
    """Return fields of ``ComparisonMetrics`` on the differences between the generated images of the two."""
    (model, evaluation), (champion_model, champion_evaluation) = candidate, champion
    first, second, baseline = replicates
    return {
        "headline": distance_headline(first, second, baseline, evaluation.scores.extractor, metric),
        "recall": difference(first["recall"], second["recall"]),
        "cost": Cost(candidate=evaluation.gflop, champion=champion_evaluation.gflop, unit="GFLOP"),
        "unlike": tuple(_describe_differences(model, champion_model)),
        "class_conditional": all(side.model.classes for side in (model, champion_model)),
    }


def own_metrics(
    evaluator: Evaluator,
    scores: Scores,
    per_class: PerClass | None,
    replicates: MetricReplicates,
    baseline: MetricReplicates,
) -> dict[str, Any]:
    """Return what a first version is decided on, as fields of ``ComparisonMetrics``: its own metrics, and real ones.

    ``scores``, ``per_class`` and ``replicates`` are the model's, ``baseline`` is the real baseline's.
    """
    own, own_real = dict[OwnMetric, Estimate](), dict[OwnMetric, Estimate]()
    sides = scores, evaluator.real_baseline(baseline).scores
    names: tuple[Literal["precision", "recall", "coverage"], ...] = ("precision", "recall", "coverage")
    for name in names:
        # Sets that are too small for errors are decided on as measured.
        own[name], own_real[name] = (
            halves[name].estimate if halves else Estimate(value=each.get_metric(name))
            for halves, each in zip((replicates, baseline), sides, strict=True)
        )
    if per_class is None:
        return {"own": own, "own_real": own_real, "class_conditional": False}
    if (agreements := per_class.agreements) is not None:
        own["class agreement"], own_real["class agreement"] = agreements
    classes = tuple(
        ClassAgreement(name=each.name, candidate=each.agreements[0], real=each.agreements[1])
        for each in per_class.classes
    )
    return {"own": own, "own_real": own_real, "classes": classes}


def require_same_requests(candidate: ModelEvaluator, champion: ModelEvaluator) -> None:
    """Raise UserError if only one of the two has prompts, or the candidate lacks a class of the champion.

    Images of captions come nearer to the held-out images whose captions these are, which says nothing of a model
    without captions. A model without classes is compared as a whole.
    """
    has_prompts = [bool(model.conditions.prompts) for model in (candidate, champion)]
    if has_prompts[0] != has_prompts[1]:
        with_prompts, without = ("candidate", "champion") if has_prompts[0] else ("champion", "candidate")
        raise UserError(
            f"the {with_prompts} generates from the captions of the held-out images and the {without} knows none "
            "(model.text): look at both, and decide with `darkroom promote --to`"
        )
    classes = candidate.model.classes
    lost_classes = [name for name in champion.model.classes if name not in classes]
    if classes and lost_classes:
        raise UserError(
            f"it generates {pluralize(len(lost_classes), 'class', 'classes')} that the candidate does not know, "
            f"{lost_classes[0]!r} among them: look at both, and decide with `darkroom promote --to`"
        )


def _describe_differences(candidate: ModelEvaluator, champion: ModelEvaluator) -> Iterator[str]:
    """Describe what differs between the conditions of the two."""
    families = [model.header.model.family for model in (candidate, champion)]
    if families[0] != families[1]:
        yield f"the candidate is a {families[0]} and the champion a {families[1]}"
    if all("noise_levels" in model.header.model.abilities for model in (candidate, champion)):
        samplings = [
            f"{x.sampler}, {x.steps} steps, guidance {x.guidance_text}" for x in (candidate.guided, champion.guided)
        ]
        if samplings[0] != samplings[1]:
            yield f"the candidate is sampled by {samplings[0]} and the champion by {samplings[1]}"
    classes = [model.model.classes for model in (candidate, champion)]
    if bool(classes[0]) != bool(classes[1]):
        yield f"only the {'candidate' if classes[0] else 'champion'} has classes: no class is compared by itself"
    elif new_classes := [name for name in classes[0] if name not in classes[1]]:
        class_count = pluralize(len(new_classes), "class", "classes")
        yield f"the candidate generates {class_count} that the champion does not know"


def _agreement(candidate: ModelEvaluator, champion: ModelEvaluator | None) -> PromptAgreement | str | None:
    """Compare the text-image agreement of both, or say why not; None if the candidate has no captions."""
    if champion is None or not isinstance(candidate.cosines, tuple) or not isinstance(champion.cosines, tuple):
        agreement = candidate.text_image_agreement
        return None if agreement is None else describe_agreement(agreement)
    (cosines, _), (champion_cosines, _) = candidate.cosines, champion.cosines

    def mean(values: Tensor) -> Estimate:
        return mean_over_prompts(values, cosines.prompts)

    return PromptAgreement(
        candidate=mean(cosines.above_chance),
        champion=mean(champion_cosines.above_chance),
        difference=mean(cosines.above_chance - champion_cosines.above_chance),
    )


def evaluate_model(
    path: Path,
    data: Path,
    config: EvaluationConfig,
    sampling: SamplingConfig,
    output: Path,
    progress: Progress = ignore_progress,
) -> tuple[ModelEvaluation, Evaluator]:
    """Evaluate a model file on the held-out images of ``data`` as a comparison does; returns the evaluator, too.

    Raises UserError if the model cannot be evaluated.
    """
    evaluator = _evaluator(path, data, config, sampling, output, progress)
    return evaluate_in_full(evaluator.model(path)), evaluator


def _evaluator(
    path: Path,
    data: Path,
    config: EvaluationConfig,
    sampling: SamplingConfig,
    output: Path,
    progress: Progress,
    choosing_samples: int | None = None,
) -> Evaluator:
    """Build an evaluator of other images than checkpoint selection had: see ``compare_with_champion``."""
    header = read_model_header(path)
    # Super-resolution models enlarge the same small images whatever their numbers are.
    if choosing_samples is None or header.model.low_resolution is not None:
        first, config = 0, config.model_copy(update={"seed": config.seed + 1})
    else:
        first = math.ceil(choosing_samples / sampling.compute_batch) * sampling.compute_batch
    task = task_of(header.model, header.size)
    return Evaluator(data, config, sampling, output / CACHE, progress, task, first)


def distance_headline(
    candidate: MetricReplicates,
    champion: MetricReplicates,
    real_baseline: MetricReplicates,
    extractor: str,
    metric: Literal["kid", "fd"],
) -> Headline:
    """Estimate the distance that decides between two models, on features named ``extractor``."""
    return Headline(
        name=f"{metric}_{extractor}",
        candidate=candidate[metric].estimate,
        champion=champion[metric].estimate,
        difference=difference(candidate[metric], champion[metric]),
        real_baseline=real_baseline[metric].value,
    )


def psnr_headline(candidate: Tensor | None, champion: Tensor | None) -> Headline | None:
    """Estimate the PSNR difference in dB of two autoencoders on the same M held-out images, (M,) each; M at least 2.

    None unless both are autoencoders.
    """
    if candidate is None or champion is None:
        return None
    zeros = [0.0] * len(candidate)
    return Headline(
        name="reconstruction_psnr",
        candidate=paired_difference(candidate.tolist(), zeros),
        champion=paired_difference(champion.tolist(), zeros),
        difference=paired_difference(candidate.tolist(), champion.tolist()),
        real_baseline=None,
    )


def _sample_grids(
    candidate: ModelEvaluator, champion: ModelEvaluator | None, evaluation: ModelEvaluation
) -> SampleGrids:
    real, pairs = candidate.real, evaluation.memorization.pairs
    classes = {}
    if evaluation.per_class is not None and candidate.labels is not None:
        labels = real.select_labelled_features(candidate.model.classes).labels
        for name in [scores.name for scores in evaluation.per_class.worst_first][:4]:
            number = candidate.model.classes.index(name)
            numbers = [torch.nonzero(indices == number)[:8, 0] for indices in (labels, candidate.labels)]
            count = min(map(len, numbers))
            held_out, generated = (indices[:count] for indices in numbers)
            held_out_images = real.dataset.images_in_order(real.compared[held_out.numpy()])
            classes[name] = held_out_images, candidate.images_at(generated.tolist())
    return SampleGrids(
        real=real.shown_images,
        candidate=candidate.images[:SHOWN],
        champion=None if champion is None else champion.images[:SHOWN],
        nearest_generated=candidate.images_at([pair.generated for pair in pairs]),
        nearest_training=real.dataset.images_in_order(real.train[[pair.training for pair in pairs]]),
        duplicates=[candidate.images_at(group.members) for group in evaluation.duplicates.groups],
        captions=(candidate.captions, [] if champion is None else champion.captions),
        classes=classes,
    )
