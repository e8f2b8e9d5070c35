"""The trial: challenger against champion under the same conditions, the evidence, and what the gate decides.

Both draw the same picture numbers of a seed of their own, and are compared with the same held-out pictures on the same
features. The seed is another than that by which the checkpoint was chosen: the best of many looks better than it is on
the very pictures that it was chosen by. What is left is that it was chosen by the same held-out pictures, as was the
champion in its time.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from diffusion.checkpoints import read_model_header
from diffusion.config_sampling import SamplingConfig
from diffusion.errors import UserError
from diffusion.evaluation.bootstrap.neighbourhoods import FEWEST as FEWEST_FOR_ERRORS
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.estimate import Estimate
from diffusion.evaluation.evaluator import CACHE, Evaluator, Figures, ModelEvaluator, task_of
from diffusion.evaluation.evidence import distance_headline, recall_difference, reconstruction_headline
from diffusion.evaluation.exhibits import Exhibits, exhibits
from diffusion.evaluation.gate import Copies, Cost, Evidence, GateConfig, WorstClass, decide
from diffusion.evaluation.per_class import ClassScores
from diffusion.evaluation.results import ModelEvaluation
from diffusion.evaluation.trial_results import Side, Trial
from diffusion.files import write_json
from diffusion.model import ModelHeader
from diffusion.models.config import FAMILIES, meaning
from diffusion.progress import Progress, silent

TRIAL = "trial.json"
"""What is written, in the folder of the evaluation."""


def trial(
    challenger: Path,
    champion: Path | None,
    data: Path,
    config: EvaluationConfig,
    sampling: SamplingConfig,
    gate: GateConfig,
    output: Path,
    progress: Progress = silent,
) -> tuple[Trial, Exhibits]:
    """Compare the model files ``challenger`` and ``champion`` (None: there is none) by the data set in ``data``.

    ``config`` is what the challenger was chosen by; the trial draws with ``config.seed`` + 1. Written into ``output``,
    at last: ``trial.json``. What took long is remembered in ``judged`` there: the same call after a kill goes on, and
    the champion is not drawn again unless something differs.

    A champion that cannot be compared (of another family, shape or task, or one that cannot draw so), and sets too
    small for errors, hold the challenger with the reason. Raises UserError if the challenger cannot be judged.
    """
    low_resolution = read_model_header(challenger).model.low_resolution
    evaluator = _evaluator(data, config, sampling, output, progress, low_resolution)
    ours = evaluator.model(challenger)
    evaluation = ours.everything()
    theirs, their_evaluation, unlike = _champion(champion, ours, gate.across_families)
    halves = evaluator.halves([ours] if theirs is None else [ours, theirs])
    if theirs is not None and not halves and _by_drawn(ours, theirs):
        unlike = _too_few(ours)
    evidence = evidence_of(ours, theirs, (evaluation, their_evaluation), halves, gate, champion is not None, unlike)
    found = Trial(
        conditions=evaluator.conditions,
        key=evaluator.conditions.key,
        gate=gate,
        challenger=Side(evaluation=evaluation, figures=evaluator.measured(halves[0]) if halves else {}),
        champion=their_evaluation
        and Side(evaluation=their_evaluation, figures=evaluator.measured(halves[1]) if halves else {}),
        floor=evaluator.floor(halves[-1] if halves else None),
        evidence=evidence,
        decision=decide(evidence, gate),
    )
    write_json(output / TRIAL, json.loads(found.model_dump_json()))
    return found, exhibits(ours, theirs, found)


def look_again(
    path: Path,
    data: Path,
    config: EvaluationConfig,
    sampling: SamplingConfig,
    output: Path,
    progress: Progress = silent,
) -> tuple[ModelEvaluation, str]:
    """The evaluation of the model file ``path`` beside the images that are held out in ``data`` now, and the name of
    the features that it goes by.

    Generated as for a trial with the same arguments, so that the metrics compare, and cached in the same place. Raises
    UserError as ``trial`` does.
    """
    evaluator = _evaluator(data, config, sampling, output, progress, read_model_header(path).model.low_resolution)
    return evaluator.model(path).everything(), evaluator.conditions.extractor


def _evaluator(
    data: Path,
    config: EvaluationConfig,
    sampling: SamplingConfig,
    output: Path,
    progress: Progress,
    low_resolution: int | None,
) -> Evaluator:
    """One that generates with another seed than that by which checkpoints are chosen."""
    config = config.model_copy(update={"seed": config.seed + 1})
    return Evaluator(data, config, sampling, output / CACHE, progress, low_resolution)


def require_alike(champion: ModelHeader, challenger: ModelHeader, across_families: bool = False) -> None:
    """Raise UserError, with the reason, if the two do not do the same; ``across_families``: whether that is enough."""
    theirs, ours = champion.model, challenger.model
    if theirs.family != ours.family and not across_families:
        raise UserError(
            f"it is a {theirs.family} and the challenger a {ours.family}, which the gate compares only with "
            "gate.across_families"
        )
    if theirs.low_resolution != ours.low_resolution:
        they, we = task_of(theirs.low_resolution), task_of(ours.low_resolution)
        raise UserError(f"it {they} and the challenger {we}: figures say nothing of two tasks")


def _champion(
    path: Path | None, challenger: ModelEvaluator, across_families: bool
) -> tuple[ModelEvaluator | None, ModelEvaluation | None, str | None]:
    """The champion and its evaluation, or why it cannot be compared; nothing of it: there is none.

    Where the configured sampling, which the candidate generates by, means nothing to a champion of another family, that
    one generates by the defaults, and likewise the other way round.
    """
    if path is None:
        return None, None, None
    try:
        header, sampling = read_model_header(path), challenger.sampling
        require_alike(header, challenger.header, across_families)
        if header.model.family != challenger.header.model.family:
            sampling = meaning(header.model, sampling)
        model = challenger.evaluator.model(path, sampling=sampling)
        return model, model.everything(), None
    except UserError as error:
        return None, None, f"the champion cannot be judged beside it: {error}"


def _too_few(ours: ModelEvaluator) -> str:
    return (
        f"too few pictures to tell the two apart: {len(ours.features)} drawn and {len(ours.real.compared)} held out, "
        f"and errors need {FEWEST_FOR_ERRORS} of either: draw more with evaluation.samples, or hold more out with "
        "ingest.held_out"
    )


def evidence_of(
    ours: ModelEvaluator,
    theirs: ModelEvaluator | None,
    evaluated: tuple[ModelEvaluation, ModelEvaluation | None],
    halves: Sequence[Figures],
    gate: GateConfig,
    has_champion: bool,
    incomparable: str | None,
) -> Evidence:
    """What the gate goes by; ``halves``: of the candidate, the champion and the real baseline."""
    drawn, real = _by_drawn(ours, theirs), ours.real
    copied = evaluated[0].memorisation
    samples, reference = len(ours.features), len(real.compared)
    evidence = Evidence(
        judged="drawn" if drawn else "reconstructed",
        samples=samples if drawn else len(real.held_out),
        reference=reference,
        has_champion=has_champion,
        incomparable=incomparable,
        memorised=Copies(share=copied.excess, p_value=copied.p_value) if drawn else None,
    )
    if theirs is None or evaluated[1] is None or incomparable is not None:
        return evidence
    if not drawn:
        assert ours.psnr is not None
        assert theirs.psnr is not None
        return evidence.model_copy(update={"headline": reconstruction_headline(ours.psnr, theirs.psnr)})
    challenger, champion, floor = halves
    return evidence.model_copy(
        update={
            "headline": distance_headline(challenger, champion, floor, real.extractor.name, gate),
            "recall": recall_difference(challenger, champion),
            "worst_class": _worst_class(evaluated[0], evaluated[1]),
            "cost": Cost(challenger=evaluated[0].gflop, champion=evaluated[1].gflop, unit="GFLOP"),
        }
    )


def _by_drawn(ours: ModelEvaluator, theirs: ModelEvaluator | None) -> bool:
    """Whether the gate goes by generated images: if not, both are of one family that is judged by reconstructions."""
    one, other = (each.header.model.family for each in (ours, theirs or ours))
    return one != other or FAMILIES[one].judged == "drawn"


def _worst_class(ours: ModelEvaluation, theirs: ModelEvaluation) -> WorstClass | None:
    """None if either has no classes, or too few images of each."""
    if ours.per_class is None or theirs.per_class is None:
        return None
    challenger, champion = ours.per_class.worst, theirs.per_class.worst
    if challenger is None or champion is None:
        return None
    return WorstClass(
        challenger=_distance(challenger),
        champion=_distance(champion),
        challenger_class=challenger.name,
        champion_class=champion.name,
    )


def _distance(scores: ClassScores) -> Estimate:
    freedom = min(scores.samples, scores.reference) - 1
    return Estimate(value=scores.kid, error=scores.kid_se, freedom=freedom)
