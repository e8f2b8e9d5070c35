"""Comparison of a candidate with the champion under equal conditions, and the gate's decision.

Both generate the same image numbers of one seed, other than that of checkpoint selection, because the best of many
checkpoints looks too good on the images it was selected by. The held-out images are the same in both.
"""

import json
from collections.abc import Iterator, Mapping
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
from diffusion.evaluation.evaluator import CACHE, Evaluator, MetricReplicates, ModelEvaluator
from diffusion.evaluation.gate import (
    ClassAgreement,
    ComparisonMetrics,
    Cost,
    Decision,
    GateConfig,
    Headline,
    OwnMetric,
    PromptAgreement,
    WorstClass,
    decide,
)
from diffusion.evaluation.metrics.scores import MIN_FOR_ERRORS
from diffusion.evaluation.metrics.text_image_agreement import describe_agreement, mean_over_prompts
from diffusion.evaluation.real_images import SHOWN
from diffusion.evaluation.results import EvaluationConditions, ModelEvaluation, RealBaseline
from diffusion.families.ddpm import DiffusionModel
from diffusion.generation.super_resolution import task_of
from diffusion.process.samplers import SamplingConfig, effective_sampling

COMPARISON = "champion_comparison.json"
"""File name of the result in the folder of the evaluation."""


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
    decision: Decision

    @property
    def reason(self) -> str:
        """Return the reasons for the verdict as one text."""
        return "; ".join(self.decision.reasons)

    @property
    def shortage(self) -> str | None:
        """How many images the verdict is short of; None unless all that holds the candidate is want of images."""
        return self.decision.describe_shortage(self.compared)

    def metrics(self) -> dict[str, float]:
        """Return the candidate's metrics by name, and those of champion and real baseline under prefixes."""
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
) -> tuple[ChampionComparison, SampleGrids]:
    """Compare two model files on the data set in ``data`` and apply the gate.

    A champion that cannot be compared (of another family, shape or task, where only one of the two has captions, of
    classes that the candidate does not know, or one that cannot sample as configured), and sets too small for errors,
    hold the candidate with the reason. Where more images may decide, both generate twice as many, ``gate.looks`` times
    at most. Expensive parts are cached: the same call after a kill continues, and the
    champion's images are generated again only if something differs. ``config`` is how the candidate's checkpoint was
    selected, and the comparison generates with ``config.seed`` + 1; ``output`` is the folder of
    ``champion_comparison.json``, written last, and of the cache.

    Raises UserError if the candidate cannot be evaluated.
    """
    evaluator = _evaluator(candidate, data, config, sampling, output, progress)
    # A distance that changed between looks would be tested twice.
    metric = gate.metric(config.samples, len(evaluator.real.compared))
    rules, max_samples = gate.model_copy(update={"headline": metric}), config.samples * 2 ** (gate.looks - 1)
    for look in range(1, gate.looks + 1):
        pair = _compare(evaluator, candidate, champion, rules, config.samples * 2 ** (look - 1))
        can_repeat = pair.compared.has_champion and pair.compared.basis == "generated" and evaluator.real.small is None
        looks = gate.looks if can_repeat else 1
        decision = decide(pair.compared, rules, look if can_repeat else 1, looks)
        if not can_repeat or look == looks or not decision.worth_another_look(max_samples):
            break
    *model_replicates, baseline = pair.replicates
    evaluation, *their_evaluation = (
        model_evaluation.model_copy(update={"estimates": evaluator.estimates(replicates)})
        for model_evaluation, replicates in zip(pair.evaluations, model_replicates, strict=True)
    )
    result = ChampionComparison(
        conditions=evaluator.conditions,
        key=evaluator.conditions.key,
        gate=gate,
        candidate=evaluation,
        champion=their_evaluation[0] if their_evaluation else None,
        real_baseline=evaluator.real_baseline(baseline),
        compared=pair.compared,
        look=look,
        confidence=gate.promotion_confidence(look, looks),
        decision=decision,
    )
    write_json(output / COMPARISON, json.loads(result.model_dump_json()))
    return result, _sample_grids(pair.ours, pair.theirs, evaluation)


@dataclass(frozen=True)
class _ComparisonRun:
    """A comparison on so many images."""

    ours: ModelEvaluator
    theirs: ModelEvaluator | None
    evaluations: list[ModelEvaluation]
    """Of the candidate, and of the champion if it could be evaluated."""
    replicates: list[MetricReplicates]
    """Of the same models, and of the real baseline."""
    compared: ComparisonMetrics


def _compare(
    evaluator: Evaluator, candidate: Path, champion: Path | None, gate: GateConfig, samples: int
) -> _ComparisonRun:
    """Compare two model files on ``samples`` images of each."""
    ours = evaluator.model(candidate, samples, name="candidate")
    evaluations = [ours.evaluate()]
    theirs = incomparable = None
    if champion is not None:
        try:
            # Not the candidate's sampling, which has its own guidance.
            family, their_sampling = ours.header.model.family, evaluator.sampling
            header = read_model_header(champion)
            if (their_model := header.model).family != family:
                if not gate.across_families:
                    raise UserError(
                        f"it is a {their_model.family} and the candidate a {family}, which the gate compares only with "
                        "gate.across_families"
                    )
                # Sampling that does not apply to its family is replaced by that family's defaults.
                their_sampling = effective_sampling(their_model, their_sampling)
            if header.guide_images is None:
                their_sampling = their_sampling.with_changes({"autoguidance": None})
            theirs = evaluator.model(champion, samples, their_sampling, name="champion")
            require_same_requests(ours, theirs)
            evaluations.append(theirs.evaluate())
        except UserError as error:
            theirs, incomparable = None, f"the champion cannot be evaluated beside it: {error}"
    replicates = evaluator.replicates([ours] if theirs is None else [ours, theirs])
    baseline = replicates[-1]
    families = {model.header.model.family for model in (ours, theirs or ours)}
    generated = len(families) > 1 or ours.header.model.evaluated_by == "samples"  # else both are autoencoders
    if theirs is not None and generated and not baseline:
        incomparable = (
            f"too few images to tell the two apart: {len(ours.features)} generated and {len(ours.real.compared)} held "
            f"out, and errors need {MIN_FOR_ERRORS} of either: generate more with evaluation.samples, or hold more "
            "out with ingest.held_out"
        )
    memorization = evaluations[0].memorization
    metrics = ComparisonMetrics(
        basis="generated" if generated else "reconstructed",
        samples=len(ours.features) if generated else len(ours.real.held_out),
        reference=len(ours.real.compared),
        has_champion=champion is not None,
        incomparable=incomparable,
        **(own_metrics(ours, *replicates) if generated and champion is None else {}),
        memorized=memorization.copy_share if generated else None,
        agreement=_agreement(ours, theirs if incomparable is None else None),
    )
    if theirs is not None and incomparable is None:
        if generated:
            first, second, _ = replicates
            worst, their_worst = (x.per_class.worst if x.per_class else None for x in evaluations)
            differences: dict[str, object] = {
                "headline": distance_headline(first, second, baseline, evaluations[0].scores.extractor, gate),
                "recall": difference(first["recall"], second["recall"]),
                "cost": Cost(candidate=evaluations[0].gflop, champion=evaluations[1].gflop, unit="GFLOP"),
                "unlike": tuple(_describe_differences(ours, theirs)),
                "class_conditional": all(model.model.classes for model in (ours, theirs)),
            }
            if worst is not None and their_worst is not None:
                differences["worst_class"] = WorstClass(
                    candidate=worst.estimate,
                    champion=their_worst.estimate,
                    candidate_class=worst.name,
                    champion_class=their_worst.name,
                )
        else:
            assert ours.psnr is not None
            assert theirs.psnr is not None
            differences = {"headline": psnr_headline(ours.psnr, theirs.psnr)}
        metrics = metrics.model_copy(update=differences)
    return _ComparisonRun(ours, theirs, evaluations, replicates, metrics)


def own_metrics(model: ModelEvaluator, replicates: MetricReplicates, baseline: MetricReplicates) -> dict[str, Any]:
    """Return what a first version is decided on, as fields of ``ComparisonMetrics``: its own metrics, and real ones.

    ``replicates`` and ``baseline`` are those of the model and of the real baseline.
    """
    own, own_real = dict[OwnMetric, Estimate](), dict[OwnMetric, Estimate]()
    scores, per_class = (model.scores, model.evaluator.real_baseline(baseline).scores), model.per_class
    names: tuple[Literal["precision", "recall", "coverage"], ...] = ("precision", "recall", "coverage")
    for name in names:
        # Sets that are too small for errors are decided on as measured.
        own[name], own_real[name] = (
            halves[name].estimate if halves else Estimate(value=each.get_metric(name))
            for halves, each in zip((replicates, baseline), scores, strict=True)
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


def require_same_requests(ours: ModelEvaluator, theirs: ModelEvaluator) -> None:
    """Raise UserError if only one of the two has prompts, or the candidate lacks a class of the champion.

    Images of captions come nearer to the held-out images whose captions these are, which says nothing of a model
    without captions. A model without classes is compared as a whole.
    """
    has_prompts = [bool(model.conditions.prompts) for model in (ours, theirs)]
    if has_prompts[0] != has_prompts[1]:
        with_prompts, without = ("candidate", "champion") if has_prompts[0] else ("champion", "candidate")
        raise UserError(
            f"the {with_prompts} generates from the captions of the held-out images and the {without} knows none "
            "(model.text): look at both, and decide with `darkroom promote --to`"
        )
    classes = ours.model.classes
    lost_classes = [name for name in theirs.model.classes if name not in classes]
    if classes and lost_classes:
        raise UserError(
            f"it generates {pluralize(len(lost_classes), 'class', 'classes')} that the candidate does not know, "
            f"{lost_classes[0]!r} among them: look at both, and decide with `darkroom promote --to`"
        )


def _describe_differences(ours: ModelEvaluator, theirs: ModelEvaluator) -> Iterator[str]:
    """Describe what differs between the conditions of the two."""
    families = [model.header.model.family for model in (ours, theirs)]
    if families[0] != families[1]:
        yield f"the candidate is a {families[0]} and the champion a {families[1]}"
    if all(isinstance(model.model, DiffusionModel) for model in (ours, theirs)):
        samplings = [f"{x.sampler}, {x.steps} steps, guidance {x.guidance_text}" for x in (ours.guided, theirs.guided)]
        if samplings[0] != samplings[1]:
            yield f"the candidate is sampled by {samplings[0]} and the champion by {samplings[1]}"
    classes = [model.model.classes for model in (ours, theirs)]
    if bool(classes[0]) != bool(classes[1]):
        yield f"only the {'candidate' if classes[0] else 'champion'} has classes: no class is compared by itself"
    elif new_classes := [name for name in classes[0] if name not in classes[1]]:
        class_count = pluralize(len(new_classes), "class", "classes")
        yield f"the candidate generates {class_count} that the champion does not know"


def _agreement(ours: ModelEvaluator, theirs: ModelEvaluator | None) -> PromptAgreement | str | None:
    """Compare the text-image agreement of both, or say why not; None if the candidate has no captions."""
    if theirs is None or not isinstance(ours.cosines, tuple) or not isinstance(theirs.cosines, tuple):
        agreement = ours.text_image_agreement
        return None if agreement is None else describe_agreement(agreement)
    (our_cosines, _), (their_cosines, _) = ours.cosines, theirs.cosines

    def mean(values: Tensor) -> Estimate:
        return mean_over_prompts(values, our_cosines.prompts)

    return PromptAgreement(
        candidate=mean(our_cosines.above_chance),
        champion=mean(their_cosines.above_chance),
        difference=mean(our_cosines.above_chance - their_cosines.above_chance),
    )


def evaluate_model(
    path: Path,
    data: Path,
    config: EvaluationConfig,
    sampling: SamplingConfig,
    output: Path,
    progress: Progress = ignore_progress,
) -> tuple[ModelEvaluation, str]:
    """Evaluate a model file on the held-out images of ``data`` as a comparison does; returns the features' name, too.

    Raises UserError if the model cannot be evaluated.
    """
    evaluator = _evaluator(path, data, config, sampling, output, progress)
    return evaluator.model(path).evaluate(), evaluator.conditions.extractor


def _evaluator(
    path: Path, data: Path, config: EvaluationConfig, sampling: SamplingConfig, output: Path, progress: Progress
) -> Evaluator:
    """Build an evaluator with another seed than that of checkpoint selection."""
    config = config.model_copy(update={"seed": config.seed + 1})
    header = read_model_header(path)
    return Evaluator(data, config, sampling, output / CACHE, progress, task_of(header.model, header.size))


def distance_headline(
    candidate: MetricReplicates,
    champion: MetricReplicates,
    real_baseline: MetricReplicates,
    extractor: str,
    gate: GateConfig,
) -> Headline:
    """Estimate the distance by which ``gate`` compares two models, on features named ``extractor``."""
    replicates = next(iter(candidate.values()))
    metric = gate.metric(replicates.samples, replicates.reference)
    return Headline(
        name=f"{metric}_{extractor}",
        candidate=candidate[metric].estimate,
        champion=champion[metric].estimate,
        difference=difference(candidate[metric], champion[metric]),
        real_baseline=real_baseline[metric].value,
    )


def psnr_headline(candidate: Tensor, champion: Tensor) -> Headline:
    """Estimate the PSNR difference in dB of two autoencoders on the same M held-out images, (M,) each; M at least 2."""
    ours, theirs, zeros = candidate.tolist(), champion.tolist(), [0.0] * len(candidate)
    return Headline(
        name="reconstruction_psnr",
        candidate=paired_difference(ours, zeros),
        champion=paired_difference(theirs, zeros),
        difference=paired_difference(ours, theirs),
        real_baseline=None,
    )


def _sample_grids(ours: ModelEvaluator, theirs: ModelEvaluator | None, evaluation: ModelEvaluation) -> SampleGrids:
    real, pairs = ours.real, evaluation.memorization.pairs
    classes = {}
    if evaluation.per_class is not None and ours.labels is not None:
        labels = real.select_labelled_features(ours.model.classes).labels
        for name in [scores.name for scores in evaluation.per_class.worst_first][:4]:
            number = ours.model.classes.index(name)
            numbers = [torch.nonzero(indices == number)[:8, 0] for indices in (labels, ours.labels)]
            count = min(map(len, numbers))
            held_out, generated = (indices[:count] for indices in numbers)
            held_out_images = real.dataset.images_in_order(real.compared[held_out.numpy()])
            classes[name] = held_out_images, ours.images_at(generated.tolist())
    return SampleGrids(
        real=real.shown_images,
        candidate=ours.images[:SHOWN],
        champion=None if theirs is None else theirs.images[:SHOWN],
        nearest_generated=ours.images_at([pair.generated for pair in pairs]),
        nearest_training=real.dataset.images_in_order(real.train[[pair.training for pair in pairs]]),
        duplicates=[ours.images_at(group.members) for group in evaluation.duplicates.groups],
        captions=(ours.captions, [] if theirs is None else theirs.captions),
        classes=classes,
    )
