"""The gate rejects each: real images made worse, beside a champion that generates them as they are."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from torch import Tensor

from diffusion.evaluation.comparison import ChampionComparison
from diffusion.evaluation.gate import GateConfig, GateVerdict
from tests.builders.comparisons import CONFIG, compare_models, save_images, training_images
from tests.builders.degraded import blurred, compressed, with_copies, with_noise, without_classes
from tests.builders.real_images import images
from tests.builders.small_datasets import write_dataset
from tests.builders.small_models import write_model

COUNT = 160
"""Images that a model generates."""
SET = 750
"""Images of the data set, of which the first and every third one after it are held out."""
EVALUATED = CONFIG.model_copy(update={"samples": COUNT})
COMPARISON_CONFIG = EVALUATED.model_copy(update={"seed": EVALUATED.seed + 1})
DOSES = {
    "blur": [partial(blurred, sigma=sigma) for sigma in (0.5, 3.0)],
    "noise": [partial(with_noise, deviation=deviation) for deviation in (0.03, 0.4)],
    "JPEG artefacts": [partial(compressed, quality=quality) for quality in (80, 3)],
}
"""A dose that can just be measured, and one that anybody sees."""


@dataclass
class House:
    """A data set of real images, models that were never trained, and what each of them is to have generated."""

    folder: Path
    classes: Tensor
    """Of ``spare``."""
    spare: Tensor
    """Real images that are not in the data set, of which the first are what the champion generates."""
    models: int = 0

    @property
    def data(self) -> Path:
        return self.folder / "data" / "real"

    def model_of(self, images: Tensor) -> Path:
        """A model that generates these images."""
        self.models += 1
        path = write_model(self.folder / f"{self.models}.safetensors", self.models, self.models, size=28)
        save_images(path, images, self.data, self.folder, COMPARISON_CONFIG)
        return path


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    source_images, classes = images(4000)
    folder = tmp_path_factory.mktemp("house")
    write_dataset(folder / "data" / "real", source_images[:SET].numpy(), per_shard=SET, held_out_every=3)
    return House(folder, classes[SET:], source_images[SET:])


@pytest.fixture(scope="module")
def champion(house: House) -> Path:
    """A model that generates real images."""
    return house.model_of(house.spare[:COUNT])


@pytest.fixture
def few_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors from 20 cuts, right to a sixth, in a fifth of the time."""
    monkeypatch.setattr("diffusion.evaluation.evaluator.SPLITS", 20)


def compare_in(house: House, candidate: Path, champion: Path) -> ChampionComparison:
    return compare_models(candidate, champion, house.data, house.folder, GateConfig(), config=EVALUATED)[0]


@pytest.mark.slow
@pytest.mark.usefixtures("few_cuts")
@pytest.mark.parametrize("kind", DOSES)
def test_degraded_images_are_never_promoted_and_rejected_when_visible(kind: str, house: House, champion: Path) -> None:
    # Other real images than the champion's: those would be better or worse by chance alone.
    mild, serious = (
        compare_in(house, house.model_of(spoil(house.spare[COUNT : 2 * COUNT])), champion) for spoil in DOSES[kind]
    )
    assert mild.decision.verdict != GateVerdict.promote
    assert serious.decision.verdict == GateVerdict.reject
    assert serious.reason.startswith("worse than the champion: kid_efflite0")


@pytest.mark.slow
@pytest.mark.usefixtures("few_cuts")
def test_model_that_covers_two_of_ten_classes_is_rejected(house: House, champion: Path) -> None:
    two = without_classes(house.spare[COUNT:], house.classes[COUNT:], 8, COUNT)
    comparison = compare_in(house, house.model_of(two), champion)
    assert comparison.decision.verdict == GateVerdict.reject
    assert comparison.reason.startswith("worse than the champion: kid_efflite0")
    assert comparison.champion is not None
    candidate, champion = (side.estimates["coverage_efflite0"] for side in (comparison.candidate, comparison.champion))
    assert candidate.interval.high < champion.interval.low


@pytest.mark.slow
@pytest.mark.usefixtures("few_cuts")
def test_a_model_that_copies_is_rejected_though_better(house: House) -> None:
    worse = house.model_of(with_noise(house.spare[:COUNT], 0.2))
    learned = training_images(house.data, 40)
    comparison = compare_in(house, house.model_of(with_copies(house.spare[COUNT : 2 * COUNT], learned)), worse)
    assert comparison.decision.verdict == GateVerdict.reject
    assert {each.rule: each.verdict for each in comparison.decision.findings}["headline"] == GateVerdict.promote
    assert [each.rule for each in comparison.decision.findings if each.verdict == GateVerdict.reject] == ["memorized"]
    assert comparison.reason.startswith("copies of training images: ")
