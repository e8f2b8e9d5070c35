"""Choice of the guidance that the best checkpoint samples with: none, unless some kind is significantly better.

Guidance costs work and variety. So a kind of guidance takes the place of none only if its KID is lower with confidence
``gate.confidence``, and its recall lower by no more than ``gate.recall_loss`` with as much: among equally good kinds
none stays in as large a share of all choices.

A first look at few images selects FINALISTS kinds. ``config.samples`` images with other numbers decide, against other
training images, with Holm's correction over the finalists alone, as their images had no part in the selection. To test
all kinds on all images takes more work and finds fewer gains.

All kinds generate the same image numbers of one noise and are compared with the same training images, so what they have
in common cancels. The gate sees none of these: it compares images of other seeds with held-out images.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from diffusion.evaluation.bootstrap import Replicates, difference
from diffusion.evaluation.cache import Key, Tensors, load_or_compute
from diffusion.evaluation.estimate import Estimate, holm
from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.gate import GateConfig
from diffusion.evaluation.metrics.kid import jackknife, kid_deviations
from diffusion.evaluation.metrics.metric import SPLITS
from diffusion.evaluation.metrics.precision_recall import compute_overlap, nearest_distances, shares_of_halves
from diffusion.evaluation.metrics.scores import MIN_FOR_ERRORS
from diffusion.evaluation.model_evaluator import ModelEvaluator
from diffusion.evaluation.reports.html import format_p_value, format_signed, format_with_error
from diffusion.evaluation.results import GuidanceChoice, GuidanceScore, GuidanceVerdict
from diffusion.process.samplers import SamplingConfig
from diffusion.process.schedules import resolution_scale

INTERVAL = 0.2, 5.0
"""Noise levels σ between which guidance is tried (arXiv 2404.07724), up to 3×32×32 values; higher for larger images."""
REFERENCE = 4
"""Training images for each generated one: the reference then adds little to the error, and its features cost little."""
FIRST_SHARE = 3
"""The first look is at one image for so many that decide."""
FINALISTS = 3
Look = Literal["first", "last"]
KidDeviations = tuple[float, Tensor, Tensor]
"""KID with its deviations without each generated and each training image: see ``kid_deviations``."""


def list_samplings(evaluator: Evaluator, best: ModelEvaluator) -> list[SamplingConfig]:
    """List the samplings to choose from for the ``best`` checkpoint, the cheapest and least guided first.

    The first has no guidance. Empty if a user has set guidance or the file names one, for a student, or unless the
    model is a diffusion model that has a guide, or that has classes or captions and learned to do without them.
    """
    header, scales = best.header, sorted(evaluator.config.guidance or ())
    is_set = (best.sampling.guidance, best.sampling.autoguidance) != (None, None)
    if not scales or header.model.family != "ddpm" or is_set or header.student_steps is not None:
        return []
    changes = list[dict[str, object]]()
    if best.is_conditional and header.training.get("condition_dropout", 0) > 0:
        factor = resolution_scale(math.prod(best.model.noise_shape))
        interval = [round(factor * sigma, 2) for sigma in INTERVAL]
        changes += [{"guidance": w, "guidance_interval": interval} for w in scales]
        changes.append({"guidance": scales[len(scales) // 2]})
    if header.guide_images is not None:
        changes += [{"autoguidance": w} for w in scales]
    samplings = [evaluator.sampling.with_changes(change) for change in changes]
    return [evaluator.sampling, *samplings] if samplings else []


def choose_guidance(evaluator: Evaluator, best: ModelEvaluator, gate: GateConfig) -> GuidanceChoice | None:
    """Choose how the ``best`` checkpoint samples, by ``choose``; None if there is nothing to choose from.

    Images are those of ``config.seed`` + 2; models with captions generate for the captions of training images.
    """
    config, real, samplings = evaluator.config, evaluator.real, list_samplings(evaluator, best)
    if not samplings:
        return None
    rows = real.training_rows(config.seed, (REFERENCE + 1) * real.samples)
    cut = max(5, len(rows) // (REFERENCE + 1))
    # Whole batches are generated once for both looks.
    batch = evaluator.sampling.compute_batch
    first = min(config.samples, max(10, math.ceil(config.samples / FIRST_SHARE / batch) * batch))
    looks = {"first": (slice(first), rows[:cut]), "last": (slice(first, first + config.samples), rows[cut:])}

    def features(number: int, look: Look) -> tuple[Key, Tensor]:
        images, sampling = looks[look][0], samplings[number]
        name, seed = f"guidance {sampling.guidance_text}", config.seed + 2
        model = evaluator.model(best.path, images.stop, sampling, name, seed, rows)
        return model.features_key, model.features[images]

    def measure_kid(number: int, look: Look) -> KidDeviations:
        return kid_deviations(features(number, look)[1], real.features(looks[look][1]))

    def measure_recall(number: int, look: Look) -> Replicates:
        (generated_key, samples), reference = features(number, look), real.features(looks[look][1])

        def work() -> Tensors:
            halves = shares_of_halves([samples], reference)[0]["recall"]
            overlap = compute_overlap(samples, reference, nearest_distances(samples), nearest_distances(reference))
            return {"halves": halves, "recall": torch.tensor(overlap["recall"], dtype=torch.float64)}

        key: Key = {"kind": "recall of guidance", "format_version": 1, "generated": generated_key, "first": first}
        key |= {"reference": real.key(looks[look][1]), "splits": SPLITS}
        tensors = load_or_compute(evaluator.folder, key, work)
        return Replicates("recall", float(tensors["recall"]), tensors["halves"], len(samples), *reference.shape)

    has_recall = min(first, cut, len(rows) - cut) >= MIN_FOR_ERRORS
    return choose(samplings, measure_kid, measure_recall if has_recall else None, gate)


def choose(
    samplings: Sequence[SamplingConfig],
    measure_kid: Callable[[int, Look], KidDeviations],
    measure_recall: Callable[[int, Look], Replicates] | None,
    gate: GateConfig,
) -> GuidanceChoice:
    """Choose one of ``samplings``, of which the first has no guidance and the others cost more and more.

    ``measure_kid(i, look)`` and ``measure_recall(i, look)`` are of sampling i, on images and training images that the
    two looks have not in common; no recall if images are too few for errors.
    """
    limit, losses = gate.recall_loss, dict[int, Estimate]()

    def is_within_limit(number: int, look: Look, confidence: float) -> bool:
        """Whether recall is lower than without guidance by no more than the limit, with this confidence."""
        if limit is None or measure_recall is None:
            return limit is None
        losses[number] = difference(measure_recall(0, look), measure_recall(number, look))
        return losses[number].upper_bound(confidence) <= limit

    kids = {number: measure_kid(number, "first") for number in range(len(samplings))}
    gains = {number: _subtract(kids[0], kids[number]) for number in range(1, len(samplings))}
    leaders = (n for n in sorted(gains, key=lambda number: -gains[number].value) if gains[n].value > 0)
    final = sorted(islice((n for n in leaders if is_within_limit(n, "first", 0.5)), FINALISTS))
    if final:
        kids |= {number: measure_kid(number, "last") for number in (0, *final)}
    gains |= {number: _subtract(kids[0], kids[number]) for number in final}
    p_values = dict(zip(final, holm([gains[number].p_value for number in final]), strict=True))
    significant = [number for number in final if p_values[number] <= 1 - gate.confidence]
    allowed = [number for number in significant if is_within_limit(number, "last", gate.confidence)]
    best = min(allowed, key=lambda number: kids[number][0], default=0)
    # More guidance costs variety and work (Breiman et al., Classification and Regression Trees, 1984, section 3.4.3).
    excesses = {number: _subtract(kids[number], kids[best]) for number in allowed}
    chosen = next((number for number in allowed if excesses[number].value <= excesses[number].error), 0)
    # The last one counts.
    groups: list[tuple[GuidanceVerdict, Iterable[int]]] = [
        ("not a finalist", gains),
        ("may lose too much recall", losses),
        ("not significantly better", final),
        ("may lose too much recall", significant),
        ("better", allowed),
        ("chosen", [chosen]),
    ]
    verdicts = {number: verdict for verdict, group in groups for number in group}
    scores = [
        GuidanceScore(
            sampling=sampling,
            images=len(kids[number][1]),
            kid=kids[number][0],
            gain=gains.get(number),
            p_value=p_values.get(number),
            recall_loss=losses.get(number),
            verdict=verdicts.get(number),
        )
        for number, sampling in enumerate(samplings)
    ]
    return GuidanceChoice(scores=scores, confidence=gate.confidence, max_recall_loss=limit)


def _subtract(kid: KidDeviations, other: KidDeviations) -> Estimate:
    """Estimate the difference of two KIDs of images of the same noise to the same reference, by the jackknife."""
    variance = sum(jackknife(x - y) for x, y in zip(kid[1:], other[1:], strict=True))
    freedom = min(map(len, kid[1:])) - 1
    return Estimate(value=kid[0] - other[0], error=math.sqrt(variance), freedom=freedom)


def describe_guidance(choice: GuidanceChoice) -> str:
    """Describe which guidance was chosen, or why none was, with figures."""
    unguided, *tried = choice.scores
    finalists = [score for score in tried if score.p_value is not None]
    if not finalists:
        return (
            f"It samples without guidance: no kind of {len(tried)} is better on the first {unguided.images:,} images."
        )
    best = choice.chosen if choice.chosen.gain else min(finalists, key=lambda score: (score.p_value, score.kid))
    assert best.gain is not None
    assert best.p_value is not None
    gain = format_with_error(abs(best.gain.value), best.gain.error)
    kids = (
        f"guidance {best.sampling.guidance_text} {_direction(best.gain)} its KID against training images, "
        f"{format_signed(unguided.kid)}, by {gain} (p by Holm's correction: {format_p_value(best.p_value)})"
    )
    loss = "its loss of recall is unknown, as images are too few"
    if (lost := best.recall_loss) is not None:
        loss = f"{_direction(lost)} its recall by {format_with_error(abs(lost.value), lost.error)}"
    if best.verdict == "chosen":
        recall = "" if lost is None else f" and {loss}"
        options = best.sampling.guidance_options
        return f"{kids[0].upper()}{kids[1:]}{recall}: a registered model samples with it, a file with {options}."
    if best.verdict == "may lose too much recall":
        limit = f"gate.recall_loss = {choice.max_recall_loss:g} must hold with confidence {choice.confidence:g}"
        return f"It samples without guidance: {kids}, but {loss}, and {limit}."
    return f"It samples without guidance: no kind of {len(tried)} is significantly better; {kids}."


def _direction(decrease: Estimate) -> str:
    """Verb for a metric that falls by ``decrease``."""
    return "raises" if decrease.value < 0 else "lowers"
