"""Text-image agreement: the cosine of an image's and its prompt's embeddings, as CLIPScore has it (arXiv 2104.08718).

A cosine means little by itself: one encoder gives values between 0.1 and 0.4. So it stands between two baselines: real
images with their captions, and the same generated images with the prompts of others, which is chance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.common.config import Config
from diffusion.evaluation.estimate import Estimate, MetricEstimate


class TextImageAgreement(Config):
    """Agreement of a model's images with their prompts: means of cosines, between −1 and 1."""

    encoder: str
    """Name of the encoder, with its digest."""
    images: int
    """Number of images."""
    captions: int
    """Number of different prompts."""
    agreement: MetricEstimate
    """Of images and their prompts; higher is better."""
    above_chance: MetricEstimate
    """``agreement`` less ``shuffled``, on the same images."""
    shuffled: float
    """Of the same images and the prompts of the others, other than their own: chance."""
    real: MetricEstimate
    """Of the held-out images that the prompts are captions of: a model cannot be expected to agree much better."""

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name."""
        name, interval = f"text_image_agreement_{self.encoder}", self.agreement.interval
        metrics = {name: self.agreement.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
        means = {"above_chance": self.above_chance.value, "shuffled": self.shuffled, "real": self.real.value}
        return metrics | {f"text_image_agreement_{kind}_{self.encoder}": value for kind, value in means.items()}


@dataclass(frozen=True)
class Cosines:
    """Cosines of N images with prompts, and which prompt each has."""

    own: Tensor
    """Of each image and its prompt, (N,) float64."""
    others: Tensor
    """Mean of each image over the prompts of the other images that differ from its own, (N,) float64."""
    prompts: Tensor
    """Number of each image's prompt, (N,) int64; equal prompts have equal numbers."""

    @property
    def above_chance(self) -> Tensor:
        """``own`` less ``others``, (N,)."""
        return self.own - self.others


def number_of_each(texts: Sequence[str]) -> tuple[list[str], Tensor]:
    """Return the different ``texts``, sorted, and the number of each text among them, (len(texts),) int64."""
    distinct_texts = sorted(set(texts))
    numbers = {text: number for number, text in enumerate(distinct_texts)}
    return distinct_texts, torch.tensor([numbers[text] for text in texts])


def compute_cosines(images: Tensor, texts: Tensor, prompts: Tensor) -> Cosines:
    """Compute cosines of ``images``, (N, D), with ``texts``, (U, D), both of length 1.

    ``prompts``: number of each image's text, (N,); at least two different ones.
    """
    x, y = images.double(), texts.double()
    counts = torch.bincount(prompts, minlength=len(y)).double()
    own_cosines = (x * y[prompts]).sum(1)
    # The mean over prompts is linear in them, so that no pair has to be computed by itself.
    prompt_counts = counts[prompts]
    other_cosines = (x @ (counts @ y) - prompt_counts * own_cosines) / (len(x) - prompt_counts)
    return Cosines(own_cosines, other_cosines, prompts)


def mean_over_prompts(values: Tensor, prompts: Tensor) -> Estimate:
    """Estimate the mean of ``values``, (N,) float64, one for each image; images of one prompt are dependent.

    The error is the limit of the bootstrap over prompts for many resamples: images of the same prompt rise and
    fall together. At least two different prompts.
    """
    mean = values.mean()
    sums = torch.zeros(int(prompts.max()) + 1, dtype=torch.float64).index_add_(0, prompts, values - mean)
    groups = len(set(prompts.tolist()))
    variance = groups / (groups - 1) * float(sums.square().sum()) / len(values) ** 2
    return Estimate(value=float(mean), error=math.sqrt(variance), freedom=groups - 1)


def summarize_agreement(encoder: str, generated: Cosines, real: Cosines) -> TextImageAgreement:
    """Compute means and intervals of the cosines of a model's and of real images, by the encoder of this name."""
    agreement, above_chance, real_agreement = (
        MetricEstimate.from_estimate(mean_over_prompts(values, prompts))
        for values, prompts in (
            (generated.own, generated.prompts),
            (generated.above_chance, generated.prompts),
            (real.own, real.prompts),
        )
    )
    return TextImageAgreement(
        encoder=encoder,
        images=len(generated.own),
        captions=len(set(generated.prompts.tolist())),
        agreement=agreement,
        above_chance=above_chance,
        shuffled=float(generated.others.mean()),
        real=real_agreement,
    )


def describe_agreement(agreement: TextImageAgreement | str) -> str:
    """Describe the agreement with its 95 % interval and its baselines, or say why it was not measured."""
    if isinstance(agreement, str):
        return f"text-image agreement not measured: {agreement}"
    cosine, interval = agreement.agreement.value, agreement.agreement.interval
    return (
        f"text-image agreement by {agreement.encoder} {cosine:.3f} [{interval.low:.3f}, {interval.high:.3f}]; "
        f"real images {agreement.real.value:.3f}, with the prompts of others {agreement.shuffled:.3f}"
    )
