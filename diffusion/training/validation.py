"""Validation at a checkpoint: losses on fixed images of both splits, and a grid of generated images."""

import copy
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffusion.checkpoints import AVERAGED
from diffusion.common.fingerprint import autocast
from diffusion.common.image_grids import beside, blocks, grid
from diffusion.data.dataset import SPLITS
from diffusion.data.loader import Batch
from diffusion.data.manifest import Split
from diffusion.families import family_of
from diffusion.families.model import Model, TrainingObjective, to_float
from diffusion.generation.super_resolution import generate
from diffusion.process.samplers import SamplingConfig
from diffusion.training.setup import SAMPLE_GRID, TrainingSetup
from diffusion.training.state import NETWORK

VALIDATION_IMAGES = 256
"""Number of images of each split on which losses are computed."""


@dataclass(frozen=True)
class Validation:
    """Validation of a run on the same images, noise levels and noise at each checkpoint."""

    setup: TrainingSetup
    objective: TrainingObjective
    threads: Executor

    @cached_property
    def batches(self) -> dict[Split, Batch]:
        """Return the validation images of each split; cached, as they may be on remote storage."""
        batches: dict[Split, Batch] = {}
        dataset = self.setup.dataset
        for split in SPLITS:
            rows = dataset.rows(split)
            if self.setup.config.window is not None:  # from as few shards as possible
                rows = rows[np.argsort(dataset.shards(rows), kind="stable")]
            rows = rows[:VALIDATION_IMAGES]
            if len(rows):
                batches[split] = Batch(range(len(rows)), rows, dataset.images(rows))
        return batches

    @property
    def images(self) -> Tensor:
        """Return the images that a super-resolution model upscales, (N, C, H, W) uint8."""
        return self.batches["held_out" if "held_out" in self.batches else "train"].images[:SAMPLE_GRID]

    def evaluate(self, tensors: dict[str, Tensor], images: int) -> tuple[Model, dict[str, float]]:
        """Build the model of a state's ``tensors``; returns it and the losses of raw and averaged weights."""
        setup = self.setup
        networks = {"": setup.network_from(tensors, NETWORK), "_ema": setup.network_from(tensors, AVERAGED)}
        averaged = family_of(setup.model).make_model(setup.model_header(images), networks["_ema"], setup.autoencoder)
        pending = [
            self.threads.submit(self._metrics, split, batch, suffix, network)
            for split, batch in (self.batches if self.objective.comparable else {}).items()
            for suffix, network in networks.items()
        ]
        return averaged, {name: value for each in pending for name, value in each.result().items()}

    def _metrics(self, split: Split, batch: Batch, suffix: str, network: nn.Module) -> dict[str, float]:
        device = self.setup.device
        with torch.inference_mode(), autocast(self.setup.config.precision, device):
            conditioning = self.setup.conditioning(batch)
            fixed = self.objective.make_batch(to_float(batch.images), batch.indices, conditioning, split).on(device)
            if next(network.parameters()).device != device:
                network = copy.deepcopy(network).to(device)
            losses = self.objective.losses(network, fixed).cpu()
            metrics = {f"{split}_loss{suffix}": losses.mean().item()}
            if (split, suffix) == ("held_out", "_ema"):
                metrics |= self.objective.validation_metrics(network, fixed, losses)
            return metrics

    def generate(self, model: Model, sampling: SamplingConfig) -> Tensor:
        """Generate the images of a sample grid, or upscale held-out ones: (N, C, H, W) uint8."""
        inputs, conditions = self.setup.task.inputs(self.images), self.setup.sample_grid_conditions()
        indices = range(SAMPLE_GRID if inputs is None else len(inputs))
        return generate(model, inputs, indices, 0, sampling, conditions=conditions)

    def sample_grid(self, generated: Tensor) -> Image.Image:
        """Arrange ``generated`` images in a grid; upscaled images stand between their small and real images."""
        inputs = self.setup.task.inputs(self.images)
        if inputs is None:
            return grid(generated)
        return grid(beside(blocks(inputs, generated.shape[-1]), generated, self.images), 12)

    def colour_drift(self, generated: Tensor) -> dict[str, float]:
        """Compute the deviation of each channel's mean from the data set's, in its standard deviations."""
        manifest = self.setup.dataset.manifest
        means = to_float(generated).mean((0, 2, 3)).tolist()
        return {
            f"sample_drift_{'grey' if len(means) == 1 else 'rgb'[channel]}": (mean - real) / max(spread, 1e-6)
            for channel, (mean, real, spread) in enumerate(zip(means, manifest.mean, manifest.std, strict=True))
        }
