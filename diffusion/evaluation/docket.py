"""What the page of a trial shows, from what the trial found."""

from torch import Tensor

from diffusion.evaluation.exhibits import Exhibits
from diffusion.evaluation.trial_page import Docket, Side
from diffusion.evaluation.trial_results import Side as Found
from diffusion.evaluation.trial_results import Trial
from diffusion.models.config import FAMILIES


def docket_of(
    found: Trial, exhibits: Exhibits, model: str, dataset: str, challenger: str, champion: str | None
) -> Docket:
    """That of ``found`` for the registered ``model``; ``challenger`` and ``champion`` are what to call the two.

    A champion that could not be evaluated beside the challenger is not shown.
    """
    conditions, gate = found.conditions, found.gate
    theirs = None
    if found.champion is not None and exhibits.champion is not None and champion is not None:
        theirs = _side(champion, found.champion, exhibits.champion)
    return Docket(
        model=model,
        dataset=dataset,
        decision=found.decision,
        challenger=_side(challenger, found.challenger, exhibits.challenger),
        champion=theirs,
        real=exhibits.real,
        samples=found.evidence.samples,
        reference=found.evidence.reference,
        floor={name: each.value for name, each in found.floor.figures.items()},
        headline=found.evidence.headline,
        delta=gate.delta,
        confidence=gate.confidence,
        nearest=(exhibits.drawn, exhibits.training),
        groups=exhibits.groups,
        classes=exhibits.classes,
        conditions={
            "data set version": conditions.content_digest[:12],
            "features": f"{conditions.extractor}, {conditions.preprocessing}",
            "seed": str(conditions.evaluation.seed),
            "sampler": f"{conditions.sampling.sampler}, {conditions.sampling.steps} steps",
            "key": found.key,
        },
    )


def _side(name: str, found: Found, drawn: Tensor) -> Side:
    evaluation = found.evaluation
    return Side(
        name=name,
        drawn=drawn,
        figures=found.figures,
        memorisation=evaluation.memorisation,
        duplicates=evaluation.duplicates,
        drift=evaluation.drift,
        per_class=evaluation.per_class,
        held_out_loss=evaluation.held_out_loss,
        likelihood=FAMILIES[evaluation.family].likelihood,
    )
