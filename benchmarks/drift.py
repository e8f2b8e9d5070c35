"""False alarms of the monitor's tests for drift over a year, and which shifts they find, on clothes of ten classes.

    PYTHONPATH=. python benchmarks/drift.py   # power on Fashion-MNIST, then a year of weeks and one of days
    PYTHONPATH=. python benchmarks/drift.py --trials 50 --champions 200

Tests are those of ``diffusion.evaluation.drift``. A year is simulated with the code's own tests and with another
implementation of them, in NumPy and SciPy from their definitions: nothing changed in that year, so each alarm is
a false one. Images are features that the evaluator computes, or in a year normal ones of 8 dimensions and 5 classes.
"""

import argparse
import math
from typing import get_args

import numpy as np
import torch
from scipy.special import rel_entr

from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.drift import TestName, compare_counts, compare_within, level_of_test, run_tests
from diffusion.evaluation.features.feature_extractor import make_extractor
from tests.builders.real_images import clothes

RATE = 0.05 / 2
"""``monitor.false_alarms`` by its default, of which images have one half."""
MOVED = 6
"""Pixels by which images are moved to the right, of 28."""
TRAINED, POOL = 1000, 5000
"""Images trained on, and all images of which new ones are drawn, too."""


def features_of(images: torch.Tensor) -> torch.Tensor:
    return torch.cat([make_extractor(EvaluationConfig())(batch) for batch in torch.split(images, 500)])


def own_tests(new: np.ndarray, old: np.ndarray, classes: tuple[np.ndarray, np.ndarray], level: float) -> list[str]:
    """Names of the tests of the code itself that find a difference between features (n, D) and (m, D)."""
    counts = np.stack([np.bincount(codes, minlength=11) for codes in classes])
    sides = torch.from_numpy(new[:1000]), torch.from_numpy(old[:1000])
    found = run_tests(sides, (classes[0][:1000], classes[1][:1000]), counts, [*"0123456789", None], level)
    return [test.name for test in found if test.differs]


def other_tests(
    new: np.ndarray, old: np.ndarray, classes: tuple[np.ndarray, np.ndarray], level: float, random: np.random.Generator
) -> list[str]:
    """The same by another implementation: each permutation relabels the images, one after the other."""
    x, codes = np.concatenate([new, old]), np.concatenate(classes)
    kernel = (x @ x.T / x.shape[1] + 1) ** 3
    masks = [codes == code for code in np.unique(codes)]
    scales = []
    for mask in masks:
        own = kernel[np.ix_(mask, mask)] * (1 - np.eye(mask.sum()))
        centre = np.eye(mask.sum()) - 1 / mask.sum()
        scales.append(np.linalg.norm(centre @ own @ centre))

    def kid(side: np.ndarray, mask: np.ndarray) -> float:
        a, b = np.flatnonzero(side & mask), np.flatnonzero(~side & mask)
        within = [
            (kernel[np.ix_(s, s)].sum() - np.trace(kernel[np.ix_(s, s)])) / (len(s) * (len(s) - 1)) for s in (a, b)
        ]
        return float(sum(within) - 2 * kernel[np.ix_(a, b)].mean())

    def images(side: np.ndarray) -> float:
        return kid(side, np.ones_like(side))

    def class_shares(side: np.ndarray) -> float:
        tables = [
            np.array([[(side & m).sum(), (side & ~m).sum()], [(~side & m).sum(), (~side & ~m).sum()]]) for m in masks
        ]
        return max(float(rel_entr(t, np.outer(t.sum(1), t.sum(0)) / t.sum()).sum()) for t in tables)

    def images_by_class(side: np.ndarray) -> float:
        usable = [(m, s) for m, s in zip(masks, scales, strict=True) if min((side & m).sum(), (~side & m).sum()) >= 10]
        return max((kid(side, m) * (side & m).sum() * (~side & m).sum() / s for m, s in usable), default=-math.inf)

    def within(side: np.ndarray) -> np.ndarray:
        mixed = side.copy()
        for mask in masks:
            mixed[mask] = random.permutation(side[mask])
        return mixed

    actual, found = np.arange(len(x)) < len(new), []
    for test, mix in ((images, random.permutation), (class_shares, random.permutation), (images_by_class, within)):
        value, most = test(actual), math.ceil(6 / level)
        larger = made = 0
        while made < most and larger / (most + 1) <= level / 3:
            larger, made = larger + (test(mix(actual)) >= value - 1e-12), made + 1
        if (larger + 1) / (most + 1) <= level / 3:
            found.append(test.__name__)
    return found


def false_alarms(champions: int, versions: int, added: int) -> tuple[float, float]:
    """Shares of champions with any false alarm in a year of ``versions`` of ``added`` images: own, and other tests."""
    alarms = np.zeros((champions, 2), bool)
    for champion in range(champions):
        random = np.random.default_rng(champion)
        codes = random.integers(5, size=100 + versions * added)
        images = codes[:, None] * 0.5 + random.normal(size=(len(codes), 8))
        for version in range(versions):
            old, new = np.arange(100), np.arange(100, 100 + (version + 1) * added)
            new = random.permutation(new)[:100]
            level = level_of_test(version + 1, RATE)
            sides = images[new], images[old], (codes[new], codes[old])
            alarms[champion] |= bool(own_tests(*sides, level)), bool(other_tests(*sides, level, random))
    return tuple(alarms.mean(0).tolist())


def shift_classes(name: str, codes: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Chances of images, by their ``codes``, to be among the new ones, and which of them, if they are, are altered."""
    weights, altered = np.ones(len(codes)), np.zeros(len(codes), bool)
    share = {"20 points more": 0.3, "a fifth more": 0.12}.get(name)
    if share is not None:
        weights = np.where(codes == 0, share / 0.1, (1 - share) / 0.9)
    if (part := {"all of one class moved": 1.0, "a fifth of one class moved": 0.2}.get(name)) is not None:
        altered = (codes == 0) & (random.random(len(codes)) < part)
    return weights / weights.sum(), altered


SHIFTS = ("none", "20 points more", "a fifth more", "all of one class moved", "a fifth of one class moved")


def power(features: np.ndarray, moved: np.ndarray, codes: np.ndarray, trials: int, count: int) -> None:
    level = level_of_test(1, RATE)
    for shift in SHIFTS:
        found: list[list[str]] = []
        before = 0
        for trial in range(trials):
            random = np.random.default_rng(trial)
            order = random.permutation(len(codes))
            old, rest = order[:TRAINED], order[TRAINED:]
            weights, altered = shift_classes(shift, codes[rest], random)
            places = random.choice(len(rest), count, replace=False, p=weights)
            new = rest[places]
            x = np.where(altered[places, None], moved[new], features[new])
            found.append(own_tests(x, features[old], (codes[new], codes[old]), level))
            sides = torch.from_numpy(x), torch.from_numpy(features[old[:count]])
            before += compare_within([sides], level)[2] <= level
        shares = {name: sum(name in names for names in found) / trials for name in get_args(TestName)}
        figures = f"before {before / trials:.2f}, now {sum(map(bool, found)) / trials:.2f} {shares}"
        print(f"{count} new images, {shift}: {figures}", flush=True)


def power_of_shares(trials: int, count: int) -> None:
    level, shifts = level_of_test(1, RATE) / 3, {"20 points more": 0.3, "a fifth more": 0.12}
    for name, share in shifts.items():
        found = 0
        for trial in range(trials):
            random = np.random.default_rng(trial)
            new, old = (random.multinomial(count, [x, *[(1 - x) / 9] * 9]) for x in (share, 0.1))
            found += compare_counts(new, old, level)[1] <= level
        print(f"{count} new and {count} old labels of ten classes, {name}: {found / trials:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="of each shift and number of new images")
    parser.add_argument("--champions", type=int, default=150, help="of a year of weeks; a tenth of them of one of days")
    arguments = parser.parse_args()
    for name, champions, versions, added in (("weeks", 1, 52, 20), ("days", 0.1, 365, 10)):
        own, other = false_alarms(max(1, round(champions * arguments.champions)), versions, added)
        print(f"a year of {name}: champions with a false alarm {own:.2%}, by the other implementation {other:.2%}")
    for count in (150, 1000, 3000, 6000, 12_000):
        power_of_shares(5 * arguments.trials, count)
    images, labels = clothes(POOL)
    features, moved = (features_of(x).numpy() for x in (images, images.roll(MOVED, -1)))
    for count in (150, 300, 1000):
        power(features, moved, labels.numpy(), arguments.trials, count)


if __name__ == "__main__":
    main()
