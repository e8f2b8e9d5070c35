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

from diffusion.checkpoints import read_model_header
from diffusion.config import Config
from diffusion.config_sampling import SamplingConfig
from diffusion.errors import UserError
from diffusion.evaluation.bootstrap import difference
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.cost import gflop
from diffusion.evaluation.estimate import Estimate
from diffusion.evaluation.evaluator import CACHE, Evaluator, Figures, GeneratedKey, ModelEvaluator
from diffusion.evaluation.gate import GateConfig
from diffusion.evaluation.held_out_loss import HeldOutLoss
from diffusion.evaluation.metrics import Scores
from diffusion.evaluation.real import SHOWN
from diffusion.evaluation.results import Floor, Measured
from diffusion.evaluation.sealed import recall
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
    generated: GeneratedKey
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
    evaluator = Evaluator(data, config, SamplingConfig(), output / CACHE, progress)
    found = {name: _entering(name, path, how, evaluator) for name, (path, how) in models.items()}
    halves = evaluator.halves(list(found.values()))
    figures: dict[str, Figures] = dict(zip(found, halves, strict=False)) if halves else {}
    entrants = [_entrant(name, each, figures.get(name, {})) for name, each in found.items()]
    figure = GateConfig().figure(config.samples, len(evaluator.real.compared))
    entrants.sort(key=lambda each: each.scores.of(figure))
    conditions = evaluator.conditions
    comparison = Comparison(
        dataset=evaluator.real.dataset.manifest.name,
        content_digest=conditions.content_digest,
        extractor=conditions.extractor,
        extractor_digest=conditions.extractor_digest,
        evaluation=config,
        headline=f"{figure}_{conditions.extractor}",
        entrants=entrants,
        leads=_leads([each.name for each in entrants], figures, figure) if figures else [],
        floor=evaluator.floor(halves[-1] if halves else None),
    )
    write_json(output / COMPARISON, json.loads(comparison.model_dump_json()))
    drawn = {each.name: found[each.name].images[:SHOWN] for each in entrants}
    return comparison, Sheets(evaluator.real.shown_images, drawn)


def _entering(name: str, path: Path, sampling: SamplingConfig, evaluator: Evaluator) -> ModelEvaluator:
    if read_model_header(path).model.low_resolution is not None:
        raise UserError(f"{path} enlarges small pictures, and what is compared draws from nothing: leave {name} out")
    return evaluator.model(path, sampling=sampling, name=name)


def _entrant(name: str, model: ModelEvaluator, figures: Figures) -> Entrant:
    header = model.header
    return Entrant(
        name=name,
        file=str(model.path),
        sha256=model.sha256,
        family=header.model.family,
        images=header.images,
        minutes=header.training.get("minutes"),
        parameters=sum(parameter.numel() for parameter in model.model.network.parameters()),
        scores=model.scores,
        figures=model.evaluator.measured(figures),
        held_out_loss=model.held_out_loss,
        likelihood=header.model.likelihood,
        gflop=gflop(model.model, model.guided),
        pictures_per_second=_pace(model),
        sampling=model.guided,
        fingerprint=model.fingerprint,
    )


def _pace(model: ModelEvaluator) -> float:
    """Images generated in a second, by all cores; once measured, it is cached."""
    count = ROUNDS * cores() * model.sampling.compute_batch

    def work() -> dict[str, Tensor]:
        began = time.perf_counter()
        sample(model.model, range(count), model.config.seed, model.guided, model.progress, model.asked)
        return {"pictures_per_second": torch.tensor(count / (time.perf_counter() - began), dtype=torch.float64)}

    key = PaceKey(generated=model.generated_key, cores=cores())
    return float(recall(model.folder, key, work)["pictures_per_second"])


def _leads(names: Sequence[str], figures: Mapping[str, Figures], figure: Literal["kid", "fd"]) -> list[Lead]:
    """Of each of ``names`` over the next; lower distances are better."""
    return [
        Lead(better=one, worse=other, difference=difference(figures[other][figure], figures[one][figure]))
        for one, other in pairwise(names)
    ]
