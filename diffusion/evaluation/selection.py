"""Which of many checkpoints are worth a full judgement: all are looked at briefly, and ever fewer ever longer."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.results import CheckpointEvaluation

ETA = 4
"""η of successive halving: the share of checkpoints that goes on falls by it as the number of pictures grows by it, so
that every round draws about as many pictures as the one before."""


def finalists(
    checkpoints: Sequence[Path], config: EvaluationConfig, score: Callable[[Path, int], CheckpointEvaluation]
) -> tuple[list[Path], list[CheckpointEvaluation]]:
    """The checkpoints to be judged in full, in their order, and the last scores of those that fell behind.

    Successive halving (arXiv 1502.07943): while there are more than ``config.finalists`` and pictures are fewer than
    ``config.samples``, all are scored by ``score(checkpoint, pictures)``, and the better quarter by merit goes on; of
    the last round only the finalists. KID and PSNR, which merit is, are unbiased however few the pictures are.
    """
    left, behind, samples = list(checkpoints), list[CheckpointEvaluation](), config.first_round
    while len(left) > config.finalists and samples < config.samples:
        scored = [(path, score(path, samples)) for path in left]
        scored.sort(key=lambda pair: pair[1].merit.rank, reverse=True)
        is_last = samples * ETA >= config.samples
        places = config.finalists if is_last else max(config.finalists, math.ceil(len(left) / ETA))
        going_on = {path for path, _ in scored[:places]}
        left = [path for path in left if path in going_on]
        behind += [judged for _, judged in scored[places:]]
        samples *= ETA
    return left, sorted(behind, key=lambda judged: judged.images)
