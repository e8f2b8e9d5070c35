"""A training run: its data, its configuration and its state; one step of it, and where it stands."""

import copy
import math
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusion.data.dataset import Dataset
from diffusion.data.manifest import Split
from diffusion.data.order import TrainingOrder
from diffusion.files import digest_of
from diffusion.fingerprint import autocast, resolve_precision
from diffusion.model import DiffusionModel, ModelHeader, classes_of, to_float
from diffusion.models.config import ModelConfig
from diffusion.models.unet import UNet
from diffusion.objective import per_sample_loss
from diffusion.process import NoiseSchedule, make_schedule
from diffusion.random import GaussianNoise, uniform
from diffusion.training.checkpoint import TrainingState
from diffusion.training.config import TrainingConfig
from diffusion.training.ema import ExponentialMovingAverage

BETAS = (0.9, 0.99)
"""Of AdamW. Its own 0.999 remembers more steps than a run of minutes has to give: measured worse."""
PROBES = 256
"""Pictures of each split on which losses are compared over time."""


@dataclass
class Run:
    """A training run: its data, its configuration, and its state."""

    dataset: Dataset
    model: ModelConfig
    config: TrainingConfig
    state: TrainingState
    schedule: NoiseSchedule
    order: TrainingOrder
    rows: list[int]
    classes: list[str]
    """What the network is told of; empty: nothing."""
    pool: Executor
    """Lanes to compute in."""
    total: int = 0
    """Images to see in all, a whole number of batches."""

    @classmethod
    def new(cls, dataset: Dataset, model: ModelConfig, config: TrainingConfig, pool: Executor) -> "Run":
        """A run that has seen nothing yet; its initial weights are a function of the seed."""
        rows = dataset.rows("train")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            classes = classes_of(model, dataset.manifest.class_histogram)
            network = UNet(model, dataset.manifest.channels, dataset.manifest.size, len(classes))
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(
            network.parameters(), config.learning_rate, BETAS, weight_decay=config.weight_decay, fused=True
        )
        average = ExponentialMovingAverage(network, config.ema_decay)
        order = TrainingOrder(dataset.manifest.content_digest, config.seed, len(rows))
        state = TrainingState(network, average, optimizer)
        return cls(dataset, model, config, state, make_schedule(model), order, rows, classes, pool)

    def step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns loss and gradient norm as 0-dimensional tensors."""
        config, state = self.config, self.state
        rows = [self.rows[row] for row in self.order.rows(state.images, config.batch_size)]
        indices = range(state.images, state.images + config.batch_size)
        x0 = self._pictures(rows, indices)
        t, noise = self._draws(indices)
        drawn = [x0, t, noise, *self._told(rows, indices)]
        parts = list(self.pool.map(self._gradients, *(each.tensor_split(config.lanes) for each in drawn)))
        loss = torch.stack([part_loss for part_loss, _ in parts]).sum()
        for parameter, *gradients in zip(state.network.parameters(), *(part for _, part in parts), strict=True):
            # In the parameter's own memory format, which autograd.grad does not promise and the optimizer relies on.
            parameter.grad = torch.zeros_like(parameter)
            for gradient in gradients:
                parameter.grad.add_(gradient)
        norm = torch.nn.utils.clip_grad_norm_(state.network.parameters(), config.clip_norm)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(config, state.images, self.total)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.images += config.batch_size
        state.average.update(state.network, state.images // config.batch_size)
        return loss, norm

    def _gradients(self, x0: Tensor, t: Tensor, noise: Tensor, *label: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A part's share of the batch's loss, and its gradients."""
        with autocast(self.config.precision):
            loss = self._losses(self.state.network, x0, t, noise, *label).sum() / self.config.batch_size
        return loss.detach(), torch.autograd.grad(loss, list(self.state.network.parameters()))

    def _pictures(self, rows: list[int], indices: range) -> Tensor:
        pictures = to_float(self.dataset.pictures(rows))
        if self.config.flip:
            flips = uniform(self.config.seed, "flip", indices) < 0.5
            pictures = torch.where(flips[:, None, None, None], pictures.flip(-1), pictures)
        return pictures.contiguous(memory_format=torch.channels_last)

    def _told(self, rows: list[int], indices: range) -> list[Tensor]:
        """The classes, if the network is told any; some are kept from it (arXiv 2207.12598)."""
        if not self.classes:
            return []
        kept = uniform(self.config.seed, "class", indices) < self.config.class_dropout
        return [self.dataset.classes(rows, self.classes).masked_fill(kept, len(self.classes))]

    def _draws(self, indices: range) -> tuple[Tensor, Tensor]:
        """Time steps, stratified over the batch for a lower variance, and noise."""
        u = (torch.arange(len(indices)) + uniform(self.config.seed, "time", indices)) / len(indices)
        t = (u * self.schedule.steps).long().clamp(max=self.schedule.steps - 1)
        return t, GaussianNoise(self.config.seed, "noise", indices, self.dataset.shape)()

    def _losses(self, network: UNet, x0: Tensor, t: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
        prediction, gamma = self.model.prediction, self.config.min_snr_gamma
        return per_sample_loss(partial(network, label=label), self.schedule, prediction, gamma, x0, t, noise)

    def averaged(self) -> DiffusionModel:
        """The averaged network as it is now."""
        network = copy.deepcopy(self.state.network)
        network.load_state_dict(self.state.average.state_dict())
        network.eval().requires_grad_(False)
        return DiffusionModel(self.model_header(), network, self.schedule)

    def probe(self, averaged: UNet) -> dict[str, float]:
        """Losses of raw and averaged weights on fixed pictures, times and noise of both splits."""
        networks = {"": self.state.network, "_ema": averaged}
        splits: list[Split] = [split for split in ("train", "held_out") if self.dataset.rows(split)]
        figures = {
            f"{split}_loss{suffix}": self.pool.submit(self._probe, split, network)
            for split in splits
            for suffix, network in networks.items()
        }
        return {name: figure.result() for name, figure in figures.items()}

    def _probe(self, split: Split, network: UNet) -> float:
        with torch.inference_mode(), autocast(self.config.precision):
            rows = self.dataset.rows(split)[:PROBES]
            x0 = to_float(self.dataset.pictures(rows))
            u = (torch.arange(len(rows)) + 0.5) / len(rows)
            t = (u * self.schedule.steps).long()
            noise = GaussianNoise(0, f"probe/{split}", range(len(rows)), self.dataset.shape)()
            label = self.dataset.classes(rows, self.classes) if self.classes else None
            return self._losses(network, x0, t, noise, label).mean().item()

    def model_header(self) -> ModelHeader:
        """What a model made of the present state says of itself."""
        manifest = self.dataset.manifest
        return ModelHeader(
            model=self.model,
            channels=manifest.channels,
            size=manifest.size,
            dataset=manifest.name,
            content_digest=manifest.content_digest,
            class_histogram=manifest.class_histogram,
            images=self.state.images,
            training=identity_fields(self.config),
        )

    def header(self) -> dict[str, Any]:
        """The header of a checkpoint or final model."""
        return {
            "model_header": self.model_header().model_dump(mode="json"),
            "train_key": train_key(self.dataset.manifest.content_digest, self.model, self.config),
            "total": self.total,
        }


def learning_rate(config: TrainingConfig, images: int, total: int) -> float:
    """Linear warm-up, then a cosine to zero, as a function of ``images`` seen out of ``total``."""
    warmup = min(1.0, (images + config.batch_size) / max(config.warmup_images, 1))
    return config.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * min(images / total, 1.0)))


def identity_fields(config: TrainingConfig) -> dict[str, Any]:
    """The resolved configuration, without what cannot change the weights."""
    fields = config.model_dump(mode="json", exclude={"output", "keep", "checkpoints"})
    return fields | {"precision": resolve_precision(config.precision)}


def train_key(content_digest: str, model: ModelConfig, config: TrainingConfig) -> str:
    """Digest of all that decides the weights, but for the fingerprint."""
    return digest_of(
        {
            "content_digest": content_digest,
            "model": model.model_dump(mode="json"),
            "training": identity_fields(config),
        }
    )
