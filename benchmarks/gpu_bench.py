"""What the parts of ``gpu.py`` are measured with: sizes, networks, random data sets and pipelines, trainings."""

import gc
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch

from diffusion.common.device import compute_deterministically, resolve_device
from diffusion.data.dataset import Dataset
from diffusion.diffusers_format.import_pipeline import import_pipeline
from diffusion.families.config import FamilyConfig, ModelConfig
from diffusion.families.header import Origin
from diffusion.process.samplers import sampling_config
from diffusion.training.config import TrainingConfig
from diffusion.training.data import fan_out_encodings
from diffusion.training.distributed import SINGLE_PROCESS
from diffusion.training.setup import make_setup
from diffusion.training.train import train
from diffusion.training.trainer import Trainer

Result = tuple[str, float | None]
"""A result in words, and its ratio to what it is compared with."""
Measurement = tuple[str, Callable[[], Result]]


class FailedCheckError(Exception):
    """A result that is not as it has to be."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is computed."""

    seconds: float
    """How long each rate is measured."""
    unets: Mapping[int, ModelConfig]
    """Networks by the size of their images, in pixels."""
    batches: Mapping[int, int]
    transformer: Mapping[str, Any]
    """Fields of diffusers' ``DiTTransformer2DModel``; latents have an eighth of the pixels along each side."""
    blocks: tuple[int, ...]
    """Channels of diffusers' U-Net at each resolution."""
    whole: int
    """Images of a training from its beginning to its end."""
    samples: int
    pipelines: Sequence[str]
    """Kinds of tiny pipelines that are adapted."""
    sdxl: int
    """Height and width of images of Stable Diffusion XL; below 1024 its network is small, too."""


UNET = ModelConfig(
    schedule="linear",
    prediction="epsilon",
    width=128,
    channel_mult=(1, 2, 2, 2),
    blocks=2,
    attention=("middle", 1),
    heads=1,
    patch=1,
)
"""That of the preset ddpm, with 38 million parameters."""
TINY = ModelConfig(width=16, channel_mult=(1, 2), blocks=1, attention=("middle",), heads=1, patch=1)
FULL = Sizes(
    seconds=4,
    unets={32: UNET, 64: UNET},
    batches={32: 256, 64: 64, 256: 64},
    transformer={"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64, "sample_size": 32},
    blocks=(128, 128, 256, 256, 512, 512),
    whole=64 * 256,
    samples=256,
    pipelines=(
        *("ddpm", "class_conditional", "latent", "dit", "stable_diffusion", "stable_diffusion_3"),
        *("stable_diffusion_xl", "flux", "flux_2_klein", "z_image", "qwen_image", "pixart_sigma"),
    ),
    sdxl=1024,
)
REDUCED = Sizes(
    seconds=0.2,
    unets={8: TINY, 16: TINY},
    batches={8: 16, 16: 8, 64: 4},
    transformer={"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8},
    blocks=(32, 32),
    whole=8 * 16,
    samples=12,
    pipelines=("stable_diffusion", "z_image"),
    sdxl=64,
)


@dataclass(frozen=True)
class Bench:
    """Where and how large the parts are; ``scratch`` is shared by all of them."""

    device: Literal["cuda", "cpu"]
    sizes: Sizes
    scratch: Path

    @property
    def place(self) -> torch.device:
        """The device."""
        return resolve_device(self.device)

    def dataset(self, size: int, count: int = 512, labels: Sequence[str] = ("ape", "goldfish")) -> Path:
        """Write ``count`` random images of ``size`` pixels with classes and captions, unless they are there."""
        from tests.builders.small_datasets import random_images, write_dataset

        folder = self.scratch / "data" / f"random-{size}-{count}-{'-'.join(labels)}"
        if not folder.is_dir():
            captions = [f"a {('red', 'blue')[number % 2]} circle" for number in range(count)]
            classes = [labels[number % len(labels)] for number in range(count)]
            shutil.rmtree(begun := self.scratch / "begun" / folder.name, ignore_errors=True)
            write_dataset(begun, random_images(count, 3, size), 256, labels=classes, captions=captions)
            folder.parent.mkdir(parents=True, exist_ok=True)
            begun.rename(folder)
        return folder

    def imported(self, name: str, write: Callable[[Path], object]) -> Path:
        """Import the pipeline that ``write`` writes into a folder, unless it is there; its file."""
        folder = self.scratch / "pipelines" / name
        path = folder / "model.safetensors"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / "pipeline")
            import_pipeline(folder / "pipeline", path, Origin(source="random weights"))
            shutil.rmtree(folder / "pipeline")
        return path

    @contextmanager
    def trainer(self, data: Path, model: FamilyConfig, **training: Any) -> Iterator[Trainer]:
        """Set a training up whose steps this thread takes, as CUDA graphs ask for."""
        fields = {"images": 2**40, "device": self.device, "compile": False, "warmup_images": 0} | training
        config = TrainingConfig.model_validate(fields)
        # What an earlier one has left would count.
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        with compute_deterministically(self.place), ExitStack() as stack:
            fan_out = fan_out_encodings(None, config.device)
            setup = make_setup(Dataset.open(data), model, config, sampling_config(), SINGLE_PROCESS, fan_out)
            trainer = Trainer(setup, SimpleNamespace(map=map))  # type: ignore[arg-type]
            trainer.total = config.images or 0
            stack.enter_context(trainer.loader)
            yield trainer

    def train(self, name: str, track: Any = lambda _: None, **changes: Any) -> Path:
        """Train the smaller U-Net to its end, unless it is there; its file."""
        size = min(self.sizes.unets)
        fields = {"images": self.sizes.whole, "batch_size": self.sizes.batches[size], "checkpoints": 2, "keep": 1}
        config = TrainingConfig.model_validate(fields | {"device": self.device, "warmup_images": 0} | changes)
        sampling = sampling_config(steps=4, compute_batch=36, device=self.device)
        output = self.scratch / "runs" / name
        return train(self.dataset(size), output, self.sizes.unets[size], config, sampling, track).final
