"""Small data sets and models for trials of one model beside another."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion.checkpoints import AVERAGED, save_tensors
from diffusion.common.progress import Progress, ignore_progress
from diffusion.data.dataset import Dataset
from diffusion.evaluation.cache import load_or_compute
from diffusion.evaluation.comparison import ChampionComparison, SampleGrids, compare_with_champion
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.evaluator import Evaluator
from diffusion.evaluation.gate import GateConfig
from diffusion.evaluation.results import CheckpointEvaluation
from diffusion.families import family_of
from diffusion.families.config import FamilyConfig, VAEConfig
from diffusion.generation.super_resolution import GenerationTask
from diffusion.process.samplers import SamplingConfig, sampling_config
from tests.builders.shapes import disc
from tests.builders.small_datasets import write_dataset
from tests.builders.small_models import header

CONFIG = EvaluationConfig(samples=48, extractor_size=32)
SAMPLING = sampling_config(sampler="dpmpp_2m", steps=4, compute_batch=16, precision="fp32")
COMPARISON_CONFIG = CONFIG.model_copy(update={"seed": CONFIG.seed + 1})
"""Comparisons generate with another seed than checkpoint selection if nothing is known of it."""
GATE = GateConfig(recall_loss=None, looks=1)
"""Recall of 48 images is not known well enough."""


def evaluate_one(
    model_file: Path,
    data: Path,
    config: EvaluationConfig,
    sampling: SamplingConfig,
    output: Path,
    progress: Progress = ignore_progress,
    task: GenerationTask = GenerationTask(),  # noqa: B008 (frozen)
) -> CheckpointEvaluation:
    """What ``evaluate`` finds of one model file under equal conditions, remembered in ``output``.

    ``task``: that of the models that it is compared with; UserError if it has another.
    """
    evaluator = Evaluator(data, config, sampling, output / "evaluations", progress, task)
    return CheckpointEvaluation(**dict(evaluator.model(model_file).compute_model_scores()), file=str(model_file))


class Watcher:
    """Notes which work reports progress, and stops it at the stage named."""

    def __init__(self, stop_at: str | None = None, stop_after: int = 0) -> None:
        self.calls: list[tuple[str, int]] = []
        self.stop_at = stop_at
        self.stop_after = stop_after

    def __call__(self, what: str, done: int, total: int | None, note: str = "") -> None:
        self.calls.append((what, done))
        if what == self.stop_at and done >= self.stop_after:
            raise KeyboardInterrupt

    @property
    def seen(self) -> list[str]:
        """Which work, in order."""
        return [what for what, _ in self.calls]

    @property
    def sampled_models(self) -> set[str]:
        """The model files from which images were sampled."""
        return {what.split(":")[0] for what in self.seen if what.endswith(("images sampled", "images enlarged"))}


def compare_models(
    candidate: Path,
    champion: Path | None,
    data: Path,
    folder: Path,
    gate: GateConfig = GATE,
    sampling: SamplingConfig = SAMPLING,
    progress: Progress = ignore_progress,
    config: EvaluationConfig = CONFIG,
) -> tuple[ChampionComparison, SampleGrids]:
    """Compare two model files with few images."""
    return compare_with_champion(candidate, champion, data, config, sampling, gate, folder, progress)


def good(count: int, first: int = 5000) -> Tensor:
    """What a model generates that has understood discs."""
    return torch.from_numpy(np.stack([np.asarray(disc(number, 8))[None] for number in range(first, first + count)]))


def noisy(images: Tensor, deviation: float, seed: int = 0) -> Tensor:
    """Images with Gaussian noise of this standard deviation."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + deviation * noise).round().clamp(0, 255).to(torch.uint8)


def discs(folder: Path, count: int = 160, first: int = 0) -> Path:
    """A data set of white discs at 8×8, of two classes, a quarter of it held out."""
    images = np.stack([np.asarray(disc(number, 8))[None] for number in range(first, first + count)])
    labels = ["left" if number // 4 % 2 else "right" for number in range(count)]
    write_dataset(folder, images, per_shard=count, labels=labels)
    return folder


def save_images(
    path: Path,
    images: Tensor,
    data: Path,
    folder: Path,
    config: EvaluationConfig = CONFIG,
    sampling: SamplingConfig = SAMPLING,
) -> None:
    """Cache ``images`` in ``folder`` as those that the model in the file ``path`` generated."""
    model = Evaluator(data, config, sampling, folder / "evaluations").model(path)
    load_or_compute(folder / "evaluations", model.generated_key, lambda: {"images": images})


def training_images(data: Path, count: int) -> Tensor:
    """The first ones."""
    dataset = Dataset.open(data)
    return dataset.images(dataset.rows("train")[:count])


def write_autoencoder(path: Path, seed: int, spread: float = 0.1) -> Path:
    """An autoencoder of images of 8 pixels that was never trained."""
    return write_of_family(path, VAEConfig(width=16, channel_mult=(1,), latent_channels=2), seed, spread)


def write_of_family(path: Path, config: FamilyConfig, seed: int, spread: float = 0.1) -> Path:
    """A model of any family, of images of 8 pixels, that was never trained."""
    network = family_of(config).make_network(config, (1, 8, 8), 0)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=spread, generator=generator)
    tensors = {AVERAGED + name: value for name, value in network.state_dict().items()}
    about = header(images=seed).model_copy(update={"model": config})
    save_tensors(path, tensors, {"model_header": about.model_dump(mode="json")})
    return path
