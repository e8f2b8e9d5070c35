"""What the gate goes by, from what was measured of both models on the same pictures."""

from collections.abc import Mapping

from torch import Tensor

from diffusion.evaluation.bootstrap import Figure, Replicates, difference
from diffusion.evaluation.estimate import Estimate, paired_difference
from diffusion.evaluation.gate import GateConfig, Headline

Figures = Mapping[Figure, Replicates]
"""Of one model, as ``replicates`` gives them."""


def distance_headline(
    challenger: Figures, champion: Figures, floor: Figures, extractor: str, config: GateConfig
) -> Headline:
    """The distance that ``config`` chooses, on features called ``extractor``.

    ``floor``: real pictures, as many as were drawn, against the same reference.
    """
    some = next(iter(challenger.values()))
    figure = config.figure(some.samples, some.reference)
    return Headline(
        name=f"{figure}_{extractor}",
        challenger=challenger[figure].estimate,
        champion=champion[figure].estimate,
        difference=difference(challenger[figure], champion[figure]),
        floor=floor[figure].value,
    )


def recall_difference(challenger: Figures, champion: Figures) -> Estimate:
    """How much higher the challenger's recall is."""
    return difference(challenger["recall"], champion["recall"])


def reconstruction_headline(challenger: Tensor, champion: Tensor) -> Headline:
    """PSNR of the same held-out pictures in the same order, (N,) in dB, as two autoencoders bring them back; N ≥ 2."""
    nothing = [0.0] * len(challenger)
    ours, theirs = challenger.tolist(), champion.tolist()
    return Headline(
        name="reconstruction_psnr",
        challenger=paired_difference(ours, nothing),
        champion=paired_difference(theirs, nothing),
        difference=paired_difference(ours, theirs),
        floor=None,
    )
