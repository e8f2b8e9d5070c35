"""Families side by side: what each draws after the same training, judged by the same pictures, seed and features.

Judged is the model that a training ends with, and not the best of its checkpoints: nothing is chosen by the pictures
that it is judged by.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from diffusion.config import Config
from diffusion.config_sampling import SamplingConfig
from diffusion.data.dataset import Dataset
from diffusion.errors import UserError
from diffusion.evaluation.bootstrap import difference
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.cost import gflop
from diffusion.evaluation.estimate import Estimate
from diffusion.evaluation.evidence import Figures
from diffusion.evaluation.exhibits import SHOWN
from diffusion.evaluation.features import extractor_for
from diffusion.evaluation.gate import GateConfig
from diffusion.evaluation.held_out_loss import HeldOutLoss
from diffusion.evaluation.judge import require_enough
from diffusion.evaluation.metrics import Scores
from diffusion.evaluation.portrait import DrawnKey, Sitter
from diffusion.evaluation.real import Real
from diffusion.evaluation.sealed import recall
from diffusion.evaluation.trial import REMEMBERED, floor_of, halves_of, measured, require_shape
from diffusion.evaluation.trial_results import Floor, Measured
from diffusion.files import write_json
from diffusion.fingerprint import Fingerprint
from diffusion.lanes import cores
from diffusion.progress import Progress, silent
from diffusion.sampling import sample

COMPARISON = "comparison.json"
"""What is written, in the folder of the reports."""
ROUNDS = 2
"""Compute batches for each core that are timed."""


class Entrant(Config):
    """One of the models."""

    name: str
    file: str
    sha256: str
    """Of the file."""
    family: str
    images: int
    """Pictures seen in training."""
    minutes: float | None
    """For how long it was to be trained; None: as many pictures were asked for."""
    parameters: int
    """Numbers that the model consists of."""
    scores: Scores
    figures: dict[str, Measured]
    """Distances and shares by name, such as kid_efflite0, with intervals; none: there are too few pictures."""
    held_out_loss: HeldOutLoss
    """What it makes of held-out pictures, as far as it says anything of them."""
    likelihood: Literal["bound", "exact"] | None
    """Whether its bits per dimension are at most so many, or just so many; None: it gives none."""
    gflop: float
    """Floating-point operations to draw one picture, in 10⁹."""
    pictures_per_second: float
    """Drawn on the machine that compared, by all its cores, as measured once: other work there slows it."""
    sampling: SamplingConfig
    fingerprint: Fingerprint
    """Of the machine that drew."""


class Lead(Config):
    """How much better one is than the next, by the leading distance on the same picture numbers."""

    better: str
    worse: str
    difference: Estimate
    """By how much its distance is lower."""

    def sure(self, confidence: float) -> bool:
        """Whether the true difference is above zero with this confidence, one-sided."""
        return self.difference.at_least(confidence) > 0


class Comparison(Config):
    """All of them, the nearest to real pictures first."""

    dataset: str
    content_digest: str
    extractor: str
    extractor_digest: str
    evaluation: EvaluationConfig
    headline: str
    """The distance that they are in the order of, such as kid_efflite0."""
    entrants: list[Entrant]
    leads: list[Lead]
    """Of each over the next; none: there are too few pictures to tell."""
    floor: Floor
    """What training pictures get in the place of drawn ones."""


@dataclass(frozen=True)
class Sheets:
    """Pictures to be looked at, (N, C, H, W) uint8."""

    real: Tensor
    drawn: Mapping[str, Tensor]
    """The first that each drew, by name."""


class PaceKey(Config):
    """All that the time to draw depends on, but for the machine and what else it does."""

    kind: Literal["pace"] = "pace"
    format_version: Literal[1] = 1
    """Grows when it is measured another way."""
    drawn: DrawnKey
    cores: int


def compare(
    data: Path,
    models: Mapping[str, tuple[Path, SamplingConfig]],
    config: EvaluationConfig,
    output: Path,
    progress: Progress = silent,
) -> tuple[Comparison, Sheets]:
    """Compare ``models``, files by name with how each draws, by the data set in folder ``data``.

    All draw picture numbers 0 … ``config.samples`` − 1 of ``config.seed``. Written into ``output``, at last:
    ``comparison.json``. What took long is remembered in ``judged`` there: the same call after a kill goes on. Raises
    UserError for fewer than two models, one that enlarges or makes pictures of another shape, and a data set too small.
    """
    if len(models) < 2:
        raise UserError(f"there is nothing to compare {', '.join(models) or 'nothing'} with: name two families or more")
    require_enough(data)
    folder, dataset = output / REMEMBERED, Dataset.open(data)
    extractor = extractor_for(config, dataset, folder, progress)
    real = Real(dataset, extractor, config.reference, config.samples, folder, None, progress)
    sitters = {name: _sitter(name, *found, real, config, folder, progress) for name, found in models.items()}
    pairs = [(each.features, each.features_key) for each in sitters.values()]
    halves = halves_of(pairs, real, config.seed, folder, progress)
    figures: dict[str, Figures] = dict(zip(sitters, halves, strict=False)) if halves else {}
    entrants = [_entrant(name, each, figures.get(name, {})) for name, each in sitters.items()]
    figure = GateConfig().figure(config.samples, len(real.compared))
    entrants.sort(key=lambda each: float(getattr(each.scores, figure)))
    found = Comparison(
        dataset=dataset.manifest.name,
        content_digest=dataset.manifest.content_digest,
        extractor=extractor.name,
        extractor_digest=extractor.digest,
        evaluation=config,
        headline=f"{figure}_{extractor.name}",
        entrants=entrants,
        leads=_leads([each.name for each in entrants], figures, figure) if figures else [],
        floor=floor_of(real, config, halves[-1] if halves else {}),
    )
    write_json(output / COMPARISON, json.loads(found.model_dump_json()))
    drawn = {each.name: sitters[each.name].drawn[:SHOWN] for each in entrants}
    return found, Sheets(dataset.pictures(real.compared[:SHOWN]), drawn)


def _sitter(
    name: str,
    path: Path,
    sampling: SamplingConfig,
    real: Real,
    config: EvaluationConfig,
    folder: Path,
    progress: Progress,
) -> Sitter:
    def named(what: str, done: int, total: int | None, note: str = "") -> None:
        progress(f"{name}: {what}", done, total, note)

    sitter = Sitter(path, real, config, sampling, folder, named)
    require_shape(path, sitter.header, real.dataset)
    if sitter.header.model.low_resolution is not None:
        raise UserError(f"{path} enlarges small pictures, and what is compared draws from nothing: leave {name} out")
    return sitter


def _entrant(name: str, sitter: Sitter, figures: Figures) -> Entrant:
    header, real = sitter.header, sitter.real
    return Entrant(
        name=name,
        file=str(sitter.path),
        sha256=sitter.sha256,
        family=header.model.family,
        images=header.images,
        minutes=header.training.get("minutes"),
        parameters=sum(parameter.numel() for parameter in sitter.model.network.parameters()),
        scores=real.scores(sitter.features_key, sitter.features),
        figures=measured(figures, real.extractor.name),
        held_out_loss=sitter.held_out_loss,
        likelihood=header.model.likelihood,
        gflop=gflop(sitter.model, sitter.guided),
        pictures_per_second=_pace(sitter),
        sampling=sitter.guided,
        fingerprint=sitter.fingerprint,
    )


def _pace(sitter: Sitter) -> float:
    """Pictures drawn in a second, by all cores; once measured, it is remembered."""
    count = ROUNDS * cores() * sitter.sampling.compute_batch

    def work() -> dict[str, Tensor]:
        began = time.perf_counter()
        sample(sitter.model, range(count), sitter.config.seed, sitter.guided, sitter.report, sitter.asked)
        return {"pictures_per_second": torch.tensor(count / (time.perf_counter() - began), dtype=torch.float64)}

    key = PaceKey(drawn=sitter.drawn_key, cores=cores())
    return float(recall(sitter.folder, key, work)["pictures_per_second"])


def _leads(names: Sequence[str], figures: Mapping[str, Figures], figure: Literal["kid", "fd"]) -> list[Lead]:
    """Of each of ``names`` over the next; lower distances are better."""
    return [
        Lead(better=one, worse=other, difference=difference(figures[other][figure], figures[one][figure]))
        for one, other in pairwise(names)
    ]
