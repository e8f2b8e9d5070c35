"""A classifier that learns a data set's own labels: the same each time, and honest about how well it reads."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion.common.errors import UserError
from diffusion.data.dataset import Dataset
from diffusion.evaluation.features import label_classifier
from diffusion.evaluation.features.label_classifier import LabelClassifier, load_label_classifier
from tests.builders.small_datasets import write_dataset

COUNT = 120


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is learned here is easy."""
    monkeypatch.setattr(label_classifier, "STEPS", 25)


def stripes(count: int = COUNT, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Images of stripes with noise, (count, 1, 8, 8), and whether they lie or stand."""
    random = np.random.default_rng(seed)
    pixels = random.normal(128, 30, (count, 1, 8, 8))
    is_upright = random.random(count) < 0.5
    pixels[is_upright, :, :, ::2] += 60
    pixels[~is_upright, :, ::2, :] += 60
    return pixels.clip(0, 255).astype(np.uint8), ["standing" if each else "lying" for each in is_upright]


def a_dataset(folder: Path, names: Sequence[str | None] | None = None, held_out_every: int = 3) -> Dataset:
    pixels, truth = stripes()
    write_dataset(folder, pixels, 50, labels=truth if names is None else names, held_out_every=held_out_every)
    return Dataset.open(folder)


def train_and_count_steps(dataset: Dataset, cache: Path) -> tuple[LabelClassifier, int]:
    """The classifier, and how many steps it learned."""
    steps: list[int] = []
    reader = load_label_classifier(dataset, None, cache, lambda what, done, total, note="": steps.append(done))
    return reader, len(steps)


def test_label_classifier_learns_and_reports_its_accuracy(tmp_path: Path) -> None:
    reader = load_label_classifier(a_dataset(tmp_path / "set"), None, tmp_path / "cache")
    assert isinstance(reader, LabelClassifier)
    assert reader.accuracy > 0.9
    assert reader.held_out == 40
    assert "right on " in reader.about
    assert f"{reader.accuracy:.1%} of 40 held-out images" in reader.about
    unseen = torch.from_numpy(stripes(60, seed=1)[0])
    features = reader(unseen)
    assert (features.shape, features.dtype) == ((60, 96), torch.float32)
    torch.testing.assert_close(features.norm(dim=1), torch.full((60,), 96**0.5))
    assert torch.equal(features, reader(unseen))


def test_labels_without_meaning_are_recognised_by_chance(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    reader = load_label_classifier(
        a_dataset(tmp_path / "set", random.choice(["a", "b"], COUNT).tolist()), None, tmp_path / "c"
    )
    assert abs(reader.accuracy - 0.5) < 0.5 * 3 / 40**0.5
    assert 0.5 <= reader.chance < 0.8


def test_label_classifier_is_independent_of_the_global_random_state(tmp_path: Path) -> None:
    dataset = a_dataset(tmp_path / "set")
    first, _ = train_and_count_steps(dataset, tmp_path / "a")
    torch.rand(5)
    before = torch.get_rng_state()
    again, _ = train_and_count_steps(dataset, tmp_path / "b")
    assert again.digest == first.digest
    assert torch.equal(torch.get_rng_state(), before)


def test_label_classifier_is_trained_once(tmp_path: Path) -> None:
    dataset, image = a_dataset(tmp_path / "set"), torch.from_numpy(stripes(4)[0])
    first, steps = train_and_count_steps(dataset, tmp_path / "cache")
    again, none = train_and_count_steps(dataset, tmp_path / "cache")
    assert (steps, none) == (25, 0)
    assert (again.digest, again.about, again.preprocessing) == (first.digest, first.about, first.preprocessing)
    assert torch.equal(again(image), first(image))


def test_label_classifier_ignores_held_out_images(tmp_path: Path) -> None:
    _, truth = stripes()
    swapped = {"lying": "standing", "standing": "lying"}
    lied = [swapped[name] if number % 3 == 0 else name for number, name in enumerate(truth)]
    honest, _ = train_and_count_steps(a_dataset(tmp_path / "set"), tmp_path / "cache")
    fooled, _ = train_and_count_steps(a_dataset(tmp_path / "lied", lied), tmp_path / "cache")
    assert fooled.digest == honest.digest
    assert fooled.accuracy == pytest.approx(1 - honest.accuracy)


def test_other_labels_or_another_size_make_another_network(tmp_path: Path) -> None:
    dataset, (_, truth) = a_dataset(tmp_path / "set"), stripes()
    others = a_dataset(tmp_path / "other", [*truth[:-1], "none of both"])
    classifiers = [
        load_label_classifier(each, size, tmp_path / "c")
        for each, size in ((dataset, None), (dataset, 16), (others, None))
    ]
    assert len({each.digest for each in classifiers}) == 3
    assert classifiers[0].preprocessing != classifiers[1].preprocessing


def test_unlabelled_images_are_skipped_by_the_label_classifier(tmp_path: Path) -> None:
    _, truth = stripes()
    some = [name if number % 6 else None for number, name in enumerate(truth)]
    assert load_label_classifier(a_dataset(tmp_path / "set", some), None, tmp_path / "c").held_out == 20


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([None] * COUNT, "has 0 among its training images"),
        (["only"] * COUNT, "has 1 among its training images"),
        ([None if number % 3 == 0 else f"{number % 2}" for number in range(COUNT)], "0 labelled held-out images"),
    ],
    ids=["none", "one", "none held out"],
)
def test_a_set_whose_labels_cannot_be_learned_is_rejected(names: list[str | None], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{words}.*use efflite0"):
        load_label_classifier(a_dataset(tmp_path / "set", names), None, tmp_path / "cache")
