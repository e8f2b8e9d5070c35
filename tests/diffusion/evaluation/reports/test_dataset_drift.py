"""Drift: a verdict on features that chance alone does not reach, and figures that mean what the field means."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kernel_mmd

from diffusion.data.dataset import Dataset
from diffusion.data.manifest import Manifest, versions
from diffusion.evaluation.new_images import compare_with_parent, measure_drift, split_by_parent
from diffusion.evaluation.reports.dataset_report import write_dataset_report
from tests.builders.built_datasets import BuiltDataset, Record, image_record


def features(count: int, seed: int, shift: float = 0.0, width: int = 40) -> Tensor:
    """Points of equal length √width, as the extractor's are, around a direction that turns with ``shift``."""
    points = torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 0.4 + 1
    points[:, 0] += shift
    return normalize(points) * width**0.5


def test_kid_is_the_unbiased_estimate_over_all_pairs() -> None:
    new_features, parent, others = features(80, 1, shift=1.0), features(80, 2), features(80, 3)
    drift, _ = measure_drift(new_features, parent, others, "some")
    for kid, images in ((drift.kid, new_features), (drift.kid_baseline, others)):
        expected = kernel_mmd(images.double().numpy(), parent.double().numpy(), kid_kernel="poly")
        assert kid == pytest.approx(expected, rel=1e-9)
    assert (drift.extractor, drift.compared) == ("some", 80)


@pytest.mark.parametrize("count", [30, 200])
def test_the_frechet_distance_is_that_of_full_matrices(count: int) -> None:
    new_features, parent, others = features(count, 1, shift=0.5), features(count, 2), features(count, 3)
    drift, _ = measure_drift(new_features, parent, others, "some")
    for fd, compared in ((drift.fd, new_features), (drift.fd_baseline, others)):
        statistics = [fid_features_to_statistics(each) for each in (compared, parent)]
        expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
        assert fd == pytest.approx(expected, abs=1e-4)


def test_the_chances_are_the_kids_of_random_divisions() -> None:
    new_features, parent = features(60, 1, shift=0.6), features(60, 2)
    drift, chances = measure_drift(new_features, parent, features(60, 3), "some")
    both, random = torch.cat([new_features, parent]).double().numpy(), np.random.default_rng(0)
    expected = []
    for _ in range(2000):
        mixed = both[random.permutation(120)]
        expected.append(kernel_mmd(mixed[:60], mixed[60:], kid_kernel="poly"))
    assert np.quantile(chances, [0.1, 0.5, 0.9]) == pytest.approx(np.quantile(expected, [0.1, 0.5, 0.9]), abs=3e-3)
    assert np.std(chances) == pytest.approx(np.std(expected), rel=0.15)
    assert (chances < drift.kid_chance).mean() == pytest.approx(0.99, abs=0.002)


def test_images_are_neighbor_accuracy_by_their_nearest_neighbours() -> None:
    new_features, parent = features(40, 1, shift=2.0), features(40, 2)
    both = torch.cat([new_features, parent]).numpy()
    right = 0
    for number, point in enumerate(both):
        distances = ((both - point) ** 2).sum(1)
        distances[number] = np.inf
        right += (int(distances.argmin()) < 40) == (number < 40)
    drift, _ = measure_drift(new_features, parent, features(40, 3), "some")
    assert drift.neighbor_accuracy == right / 80
    assert drift.neighbor_accuracy > 0.5
    assert 0.25 < drift.neighbor_accuracy_baseline < 0.75


def test_chance_alone_seldom_makes_a_difference() -> None:
    alarms = [
        measure_drift(*(features(50, 3 * draw + side) for side in range(3)), "some")[0].differs  # type: ignore[arg-type]
        for draw in range(60)
    ]
    # At 1 % each, more than 4 of 60 would come once in three thousand times.
    assert sum(alarms) <= 4


def test_a_real_difference_is_found() -> None:
    assert all(
        measure_drift(
            features(50, 3 * draw, shift=1.0), features(50, 3 * draw + 1), features(50, 3 * draw + 2), "some"
        )[0].differs
        for draw in range(5)
    )


def stripes(seed: int, upright: bool = False) -> np.ndarray:
    """Waves from left to right, or upright ones, (16, 16, 3): two worlds of images."""
    random = np.random.default_rng(seed)
    phase, wavelength = random.uniform(0, 6), random.uniform(3, 9)
    wave = np.sin(2 * np.pi * np.arange(16) / wavelength + phase)
    grey = np.broadcast_to(wave if upright else wave[:, None], (16, 16))
    return np.clip(128 + 80 * grey[..., None] + random.normal(0, 8, 3), 0, 255).astype(np.uint8)


def records(seeds: range, upright: bool = False) -> list[Record]:
    return [image_record(stripes(seed, upright), f"{seed}.png") for seed in seeds]


@pytest.mark.parametrize("upright", [False, True])
def test_new_images_are_compared_with_those_of_the_parent(upright: bool, tmp_path: Path) -> None:
    built = BuiltDataset(tmp_path / "waves", size=16)
    built.version(records(range(130)))
    built.version(records(range(200, 260), upright))
    summary = write_dataset_report(built.folder, tmp_path / "page.html")
    assert summary.drift is not None
    assert (summary.added, summary.lost, summary.drift.compared) == (60, 0, 60)
    assert summary.drift.differs == upright
    assert summary.verdict.startswith(
        f"The new images {'differ' if upright else 'cannot be told apart'} from the parent's"
    )
    metrics = summary.metrics()
    assert metrics["drift_kid_efflite0"] == summary.drift.kid
    assert metrics["drift_fd_baseline_efflite0"] == summary.drift.fd_baseline
    assert "chance alone reaches" in summary.markdown()


def parent_of(built: BuiltDataset) -> Manifest:
    line = versions(built.folder)
    next(line)
    return next(line)


def seeds_of(dataset: Dataset, rows: np.ndarray, seeds: range) -> list[int]:
    """Which of the images of ``seeds`` lie in ``rows``."""
    seeds_by_key = {image_record(stripes(seed), "")["key"]: seed for seed in seeds}
    return sorted(seeds_by_key[key] for key in dataset.keys(rows))


def test_new_images_are_identified_when_shards_were_rewritten(tmp_path: Path) -> None:
    built = BuiltDataset(tmp_path / "waves", size=16)
    built.version(records(range(6)), records(range(6, 10)))
    # As a rebuild from a source that has some of the same images would leave it, in another order.
    earlier_parts = built.parts[:]
    built.parts = []
    built.version(records(range(3, 8)), records(range(20, 23)), change="rebuild")
    assert not {part.records.sha256 for part in earlier_parts} & {part.records.sha256 for part in built.parts}
    dataset = Dataset.open(built.folder)
    newcomers, residents = split_by_parent(dataset, parent_of(built))
    assert seeds_of(dataset, newcomers, range(23)) == [20, 21, 22]
    assert seeds_of(dataset, residents, range(23)) == [3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("first", "then", "verdict"),
    [
        (range(200), range(300, 301), "Only 1 image was added: too few"),
        (range(200), range(300, 320), "Only 20 images were added: too few"),
        (range(200), range(0), "No image was added"),
        (range(70), range(300, 360), "The parent had only 70 images: too few"),
    ],
)
def test_too_few_images_give_no_drift_metrics(first: range, then: range, verdict: str, tmp_path: Path) -> None:
    built = BuiltDataset(tmp_path / "waves", size=16)
    built.version(records(first))
    built.version([*records(then), {"source": "x", "outcome": "quarantined", "reason": "damaged"}])
    drift = compare_with_parent(Dataset.open(built.folder), parent_of(built))
    assert drift.verdict.startswith(verdict)
    assert (drift.added, drift.drift, len(drift.least_similar_rows)) == (len(then), None, 0)
    summary = write_dataset_report(built.folder, tmp_path / "page.html")
    assert (summary.added, summary.lost) == (len(then), 0)


def test_a_parent_that_is_no_longer_here_is_admitted(tmp_path: Path) -> None:
    built = BuiltDataset(tmp_path / "waves", size=16)
    built.version(records(range(5)))
    built.replace(0, records(range(2, 9)), "rebuild")
    summary = write_dataset_report(built.folder, tmp_path / "page.html")
    assert summary.verdict.startswith("The parent's tables are no longer here")
    assert (summary.added, summary.lost, summary.drift) == (None, None, None)
