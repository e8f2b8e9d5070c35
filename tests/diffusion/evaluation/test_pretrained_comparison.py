"""An imported pipeline beside a network of Darkroom: the same held-out images and prompts, or held with the reason."""

from pathlib import Path

import numpy as np
import pytest

from diffusion.checkpoints import load_model
from diffusion.data.dataset import Dataset
from diffusion.diffusers_format.import_pipeline import import_pipeline
from diffusion.evaluation.comparison import ChampionComparison, compare_with_champion
from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.gate import GateConfig
from diffusion.evaluation.metrics.text_image_agreement import TextImageAgreement
from diffusion.families.header import Origin
from diffusion.process.samplers import SamplingConfig, sampling_config
from tests.builders import flow_pipelines, pipelines
from tests.builders.captioned import COLOURS
from tests.builders.comparisons import CONFIG, SAMPLING, Watcher
from tests.builders.small_datasets import random_images, write_dataset
from tests.builders.small_models import CONFIG as NETWORK
from tests.builders.small_models import write_model
from tests.builders.text_image_encoders import write_clip

pytestmark = pytest.mark.usefixtures("fake_encoder")
SIZE = 16
GATE = GateConfig(across_families=True, looks=1)
FEW = CONFIG.model_copy(update={"samples": 24})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares of 16×16 with captions and labels."""
    folder, random = tmp_path_factory.mktemp("data") / "squares", np.random.default_rng(0)
    names = [list(COLOURS)[number % 3] for number in range(96)]
    flat = np.array([COLOURS[name] for name in names])[:, :, None, None]
    images = np.clip(flat + random.integers(-40, 40, (96, 3, SIZE, SIZE)), 0, 255).astype(np.uint8)
    captions = [f"{name} square {number % 7}" for number, name in enumerate(names)]
    write_dataset(folder, images, 96, labels=names, captions=captions)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of imported pipelines by kind."""
    folder = tmp_path_factory.mktemp("imported")
    for kind in ("stable_diffusion", "ddpm", "ddim", "class_conditional"):
        source = pipelines.MAKERS[kind](folder / kind)
        import_pipeline(source, folder / f"{kind}.safetensors", Origin(source=f"file://{source}"))
    return folder


def own(folder: Path, text: bool, *classes: str) -> Path:
    config = NETWORK.model_copy(update={"text": text})
    return write_model(
        folder / "own.safetensors", 1, 1, channels=3, size=SIZE, config=config, classes=dict.fromkeys(classes, 30)
    )


def compared(
    pair: list[Path], data: Path, folder: Path, sampling: SamplingConfig = SAMPLING, encoder: Path | None = None
) -> tuple[ChampionComparison, Watcher]:
    watcher, config = Watcher(), FEW.model_copy(update={"text_image_encoder": encoder})
    return compare_with_champion(*pair, data, config, sampling, GATE, folder, watcher)[0], watcher


@pytest.mark.parametrize("reverse", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_stable_diffusion_pipeline_and_a_network_share_prompts(
    reverse: bool, data: Path, model_folder: Path, tmp_path: Path
) -> None:
    write_clip(tmp_path / "clip")
    pair = [model_folder / "stable_diffusion.safetensors", own(tmp_path, text=True)]
    pair = pair[::-1] if reverse else pair
    comparison, _ = compared(pair, data, tmp_path, encoder=tmp_path / "clip")
    assert comparison.compared.incomparable is None
    assert comparison.compared.headline is not None
    reasons = {each.rule: each.reason for each in comparison.decision.findings}
    assert reasons["conditions"].count("diffusers") == reasons["conditions"].count("ddpm") == 1
    assert {"headline", "recall", "memorized", "text-image agreement", "cost"} <= reasons.keys()
    assert comparison.champion is not None
    for each in (comparison.candidate, comparison.champion):
        assert isinstance(each.text_image_agreement, TextImageAgreement)
    evaluator = Evaluator(data, FEW.model_copy(update={"seed": FEW.seed + 1}), SAMPLING, tmp_path)
    first, second = (evaluator.model(path) for path in pair)
    dataset = Dataset.open(data)
    prompts = tuple(dataset.captions(dataset.rows("held_out")))[: FEW.samples]
    assert first.conditions.prompts == second.conditions.prompts == prompts
    cost = comparison.compared.cost
    assert cost is not None
    # The same number of passes of two networks, of which the pipeline's is the larger one.
    assert (cost.candidate > cost.champion) == (not reverse)


@pytest.mark.parametrize(
    ("kind", "text", "words", "reverse"),
    [
        ("stable_diffusion", False, "knows none", False),
        pytest.param("stable_diffusion", False, "knows none", True, marks=[pytest.mark.slow, pytest.mark.long]),
        pytest.param("ddpm", True, "knows none", False, marks=[pytest.mark.slow, pytest.mark.long]),
        ("ddpm", True, "knows none", True),
        ("ddim", False, "1×16×16", False),
    ],
)
def test_pipelines_of_other_conditions_are_held(
    kind: str, text: bool, words: str, reverse: bool, data: Path, model_folder: Path, tmp_path: Path
) -> None:
    pair = [own(tmp_path, text), model_folder / f"{kind}.safetensors"]
    comparison, watcher = compared(pair[::-1] if reverse else pair, data, tmp_path)
    assert comparison.decision.verdict == "hold"
    assert words in comparison.reason
    assert len(watcher.sampled_models) == 1


@pytest.mark.slow
def test_unconditional_and_class_pipelines_are_compared_as_a_whole(
    data: Path, model_folder: Path, tmp_path: Path
) -> None:
    for other in (own(tmp_path, False, "red", "green", "blue"), model_folder / "class_conditional.safetensors"):
        comparison, _ = compared([model_folder / "ddpm.safetensors", other], data, tmp_path)
        assert comparison.compared.headline is not None
        [reason] = [each.reason for each in comparison.decision.findings if each.rule == "conditions"]
        assert "only the champion has classes" in reason


def test_unknown_classes_of_a_pipeline_hold_the_candidate(data: Path, model_folder: Path, tmp_path: Path) -> None:
    pair = [own(tmp_path, False, "red", "green", "blue"), model_folder / "class_conditional.safetensors"]
    comparison, _ = compared(pair, data, tmp_path)
    assert comparison.decision.verdict == "hold"
    assert "3 classes that the candidate does not know" in comparison.reason


@pytest.mark.slow
def test_a_pipeline_with_its_own_scheduler_meets_a_network(data: Path, model_folder: Path, tmp_path: Path) -> None:
    sampling = sampling_config(sampler="scheduler", steps=4, compute_batch=16, precision="fp32")
    comparison, _ = compared(
        [model_folder / "stable_diffusion.safetensors", own(tmp_path, text=True)], data, tmp_path, sampling
    )
    assert comparison.compared.headline is not None
    [reason] = [each.reason for each in comparison.decision.findings if each.rule == "conditions"]
    assert "the candidate is sampled by scheduler, 4 steps" in reason


@pytest.mark.slow
def test_a_pipeline_of_another_size_is_compared_at_that_of_the_data(
    data: Path, model_folder: Path, tmp_path: Path
) -> None:
    source = flow_pipelines.flux(tmp_path / "flux")
    import_pipeline(source, base := tmp_path / "flux.safetensors", Origin(source="tiny"))
    assert load_model(base).shape == (3, 256, 256)
    comparison, watcher = compared([base, model_folder / "stable_diffusion.safetensors"], data, tmp_path)
    assert comparison.compared.headline is not None
    assert len(watcher.sampled_models) == 2
    cost = comparison.compared.cost
    assert cost is not None
    assert cost.candidate < 100 * cost.champion  # of 256 times the pixels it would be more


def test_images_of_one_size_are_not_taken_for_those_of_another(model_folder: Path, tmp_path: Path) -> None:
    images = []
    for size in (16, 32):
        write_dataset(tmp_path / str(size), random_images(48, 3, size), 24)
        evaluator = Evaluator(tmp_path / str(size), FEW, SAMPLING, tmp_path / "cache")
        images.append(evaluator.model(model_folder / "ddpm.safetensors").images)
    assert [image.shape[-1] for each in images for image in each[:1]] == [16, 32]
