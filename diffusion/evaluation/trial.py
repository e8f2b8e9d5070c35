"""The trial: challenger against champion under the same conditions, the evidence, and what the gate decides.

Both draw the same picture numbers of a seed of their own, and are compared with the same held-out pictures on the same
features. The seed is another than that by which the checkpoint was chosen: the best of many looks better than it is on
the very pictures that it was chosen by. What is left is that it was chosen by the same held-out pictures, as was the
champion in its time.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from diffusion.config import Config
from diffusion.config_sampling import SamplingConfig
from diffusion.data.dataset import Dataset
from diffusion.errors import UserError
from diffusion.evaluation.bootstrap import SPLITS, Figure, Replicates, replicates
from diffusion.evaluation.bootstrap.neighbourhoods import FEWEST
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.estimate import Estimate
from diffusion.evaluation.evidence import Figures, distance_headline, recall_difference, reconstruction_headline
from diffusion.evaluation.exhibits import Exhibits, exhibits
from diffusion.evaluation.features import extractor_for
from diffusion.evaluation.gate import Copies, Cost, Evidence, GateConfig, WorstClass, decide
from diffusion.evaluation.judge import require_enough
from diffusion.evaluation.per_class import ClassScores
from diffusion.evaluation.portrait import FeaturesOfDrawnKey, Portrait, Portrayed, portray
from diffusion.evaluation.real import Real
from diffusion.evaluation.reference import FeaturesKey
from diffusion.evaluation.sealed import recall
from diffusion.evaluation.trial_results import Circumstances, Floor, Measured, Side, Trial
from diffusion.families.config import FAMILIES, meaning
from diffusion.files import write_json
from diffusion.model import ModelHeader, read_model_header
from diffusion.progress import Progress, silent

TRIAL = "trial.json"
"""What is written, in the folder of the evaluation."""
REMEMBERED = "judged"
"""Folder beside the trial in which all that took long is kept."""


class ReplicatesKey(Config):
    """All that figures on halves depend on."""

    kind: Literal["replicates"] = "replicates"
    format_version: Literal[1] = 1
    """Grows when figures or halves come out another way."""
    drawn: tuple[FeaturesOfDrawnKey, ...]
    floor_seed: int
    training: FeaturesKey
    compared: FeaturesKey
    splits: int


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
    config, folder = config.model_copy(update={"seed": config.seed + 1}), output / REMEMBERED
    header, real = _beside(challenger, data, config, folder, progress)
    extractor = real.extractor
    ours = portray(challenger, real, config, sampling, folder, progress)
    theirs, unlike = _opponent(champion, header, real, config, sampling, gate.across_families, folder, progress)
    sides = [ours] if theirs is None else [ours, theirs]
    figures = halves_of([(each.features, each.key) for each in sides], real, config.seed, folder, progress)
    if theirs is not None and not figures and _by_drawn(ours, theirs):
        unlike = _too_few(ours, real)
    circumstances = Circumstances(
        content_digest=real.dataset.manifest.content_digest,
        extractor=extractor.name,
        extractor_digest=extractor.digest,
        preprocessing=extractor.preprocessing,
        evaluation=config,
        sampling=sampling,
        low_resolution=real.low_resolution,
    )
    evidence = evidence_of(ours, theirs, figures, real, gate, champion is not None, unlike)
    found = Trial(
        circumstances=circumstances,
        key=circumstances.key,
        gate=gate,
        challenger=_side(ours, figures[0] if figures else {}, extractor.name),
        champion=theirs and _side(theirs, figures[1] if figures else {}, extractor.name),
        floor=floor_of(real, config, figures[-1] if figures else {}),
        evidence=evidence,
        decision=decide(evidence, gate),
    )
    write_json(output / TRIAL, json.loads(found.model_dump_json()))
    return found, exhibits(ours, theirs, real)


def look_again(
    path: Path,
    data: Path,
    config: EvaluationConfig,
    sampling: SamplingConfig,
    output: Path,
    progress: Progress = silent,
) -> tuple[Portrait, str]:
    """The portrait of the model file ``path`` beside the pictures that are held out in ``data`` now, and the feature
    network that it goes by.

    Drawn as for a trial with the same arguments, so that the figures compare, and kept in the same place. Raises
    UserError as ``trial`` does.
    """
    config, folder = config.model_copy(update={"seed": config.seed + 1}), output / REMEMBERED
    _, real = _beside(path, data, config, folder, progress)
    return portray(path, real, config, sampling, folder, progress).portrait, real.extractor.name


def _beside(
    path: Path, data: Path, config: EvaluationConfig, folder: Path, progress: Progress
) -> tuple[ModelHeader, Real]:
    """What the model file ``path`` says of itself, and the real pictures that it is to be judged beside."""
    require_enough(data)
    header, dataset = read_model_header(path), Dataset.open(data)
    require_shape(path, header, dataset)
    extractor = extractor_for(config, dataset, folder, progress)
    low = header.model.low_resolution
    return header, Real(dataset, extractor, config.reference, config.samples, folder, low, progress)


def require_shape(path: Path, header: ModelHeader, dataset: Dataset) -> None:
    """Raise UserError unless the model in the file ``path`` makes pictures of the shape of those in ``dataset``."""
    shape = header.channels, header.size, header.size
    if shape != dataset.shape:
        theirs, ours = ("×".join(map(str, each)) for each in (shape, dataset.shape))
        raise UserError(
            f"{path} draws pictures of {theirs} and {dataset.folder} holds {ours} (channels × height × width): judge "
            "it by the data set it was trained on"
        )


def require_alike(champion: ModelHeader, challenger: ModelHeader, across_families: bool = False) -> None:
    """Raise UserError, with the reason, if the two do not do the same; ``across_families``: whether that is enough."""
    theirs, ours = champion.model, challenger.model
    if theirs.family != ours.family and not across_families:
        raise UserError(
            f"it is a {theirs.family} and the challenger a {ours.family}, which the gate compares only with "
            "gate.across_families"
        )
    if theirs.low_resolution != ours.low_resolution:
        they, we = (
            f"enlarges from {low} pixels" if low else "draws from nothing"
            for low in (theirs.low_resolution, ours.low_resolution)
        )
        raise UserError(f"it {they} and the challenger {we}: figures say nothing of two tasks")


def _opponent(
    path: Path | None,
    challenger: ModelHeader,
    real: Real,
    config: EvaluationConfig,
    sampling: SamplingConfig,
    across_families: bool,
    folder: Path,
    progress: Progress,
) -> tuple[Portrayed | None, str | None]:
    """The champion, or why it cannot be compared; neither: there is none.

    Where ``sampling``, which the challenger draws by, means nothing to a champion of another family, that one draws by
    the defaults, and likewise the other way round.
    """
    if path is None:
        return None, None
    try:
        header = read_model_header(path)
        require_alike(header, challenger, across_families)
        require_shape(path, header, real.dataset)
        meant = sampling if header.model.family == challenger.model.family else meaning(header.model, sampling)
        return portray(path, real, config, meant, folder, progress), None
    except UserError as error:
        return None, f"the champion cannot be judged beside it: {error}"


def _too_few(ours: Portrayed, real: Real) -> str:
    return (
        f"too few pictures to tell the two apart: {len(ours.features)} drawn and {len(real.compared)} held out, and "
        f"errors need {FEWEST} of either: draw more with evaluation.samples, or hold more out with ingest.held_out"
    )


def halves_of(
    sides: Sequence[tuple[Tensor, FeaturesOfDrawnKey]], real: Real, seed: int, folder: Path, progress: Progress
) -> list[dict[Figure, Replicates]]:
    """Figures on halves of the features of each side, and last of the floor's pictures; none: there are too few."""
    (_, floor), reference = real.floor(seed), real.reference.features
    sets = [*(features for features, _ in sides), floor]
    if min(map(len, (*sets, reference))) < FEWEST:
        return []

    def work() -> dict[str, Tensor]:
        found = replicates(sets, reference, SPLITS, progress)
        return {
            f"{number}/{figure}/{part}": value
            for number, each in enumerate(found)
            for figure, some in each.items()
            for part, value in (
                ("values", torch.cat([some.halves.flatten(), torch.tensor([some.whole], dtype=torch.float64)])),
                ("extrapolated", torch.tensor(some.extrapolated)),
            )
        }

    key = ReplicatesKey(
        drawn=tuple(key for _, key in sides),
        floor_seed=seed,
        training=real.training_key,
        compared=real.compared_key,
        splits=SPLITS,
    )
    kept = recall(folder, key, work)
    return [
        {
            figure: Replicates.of(
                figure,
                kept[f"{number}/{figure}/values"],
                len(some),
                len(reference),
                bool(kept[f"{number}/{figure}/extrapolated"]),
            )
            for figure in get_args(Figure)
        }
        for number, some in enumerate(sets)
    ]


def evidence_of(
    ours: Portrayed,
    theirs: Portrayed | None,
    figures: Sequence[Figures],
    real: Real,
    gate: GateConfig,
    has_champion: bool,
    incomparable: str | None,
) -> Evidence:
    """What the gate goes by; ``figures``: of the challenger, the champion and the floor."""
    drawn = _by_drawn(ours, theirs)
    copied = ours.portrait.memorisation
    samples, reference = len(ours.features), len(real.compared)
    evidence = Evidence(
        judged="drawn" if drawn else "reconstructed",
        samples=samples if drawn else len(real.held_out),
        reference=reference,
        has_champion=has_champion,
        incomparable=incomparable,
        memorised=Copies(share=copied.excess, p_value=copied.p_value) if drawn else None,
    )
    if theirs is None or incomparable is not None:
        return evidence
    if not drawn:
        assert ours.psnr is not None
        assert theirs.psnr is not None
        return evidence.model_copy(update={"headline": reconstruction_headline(ours.psnr, theirs.psnr)})
    challenger, champion, floor = figures
    return evidence.model_copy(
        update={
            "headline": distance_headline(challenger, champion, floor, real.extractor.name, gate),
            "recall": recall_difference(challenger, champion),
            "worst_class": _worst_class(ours.portrait, theirs.portrait),
            "cost": Cost(challenger=ours.portrait.gflop, champion=theirs.portrait.gflop, unit="GFLOP"),
        }
    )


def _by_drawn(ours: Portrayed, theirs: Portrayed | None) -> bool:
    """Whether the gate goes by what the two draw: if not, both are of one family that is judged by reconstructions."""
    one, other = ours.portrait.family, ours.portrait.family if theirs is None else theirs.portrait.family
    return one != other or FAMILIES[one].judged == "drawn"


def _worst_class(ours: Portrait, theirs: Portrait) -> WorstClass | None:
    """None if either was told no classes, or has too few pictures of each."""
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


def _side(portrayed: Portrayed, figures: Figures, extractor: str) -> Side:
    return Side(portrait=portrayed.portrait, figures=measured(figures, extractor))


def floor_of(real: Real, config: EvaluationConfig, figures: Figures) -> Floor:
    """What training pictures get in the place of drawn ones."""
    scores = real.scores(*real.floor(config.seed))
    return Floor(scores=scores, figures=measured(figures, real.extractor.name))


def measured(figures: Figures, extractor: str) -> dict[str, Measured]:
    """``figures`` by names that say of which features they are."""
    return {f"{figure}_{extractor}": Measured.of(each.estimate) for figure, each in figures.items()}
