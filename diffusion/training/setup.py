"""The setup of a training run: everything derived from data set and configuration that is constant during training."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.common.device import CPU, compiles_by_default, resolve_device
from diffusion.common.errors import UserError
from diffusion.common.fingerprint import Fingerprint, fingerprint, resolve_precision
from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.random import uniform
from diffusion.data.caption_embeddings import Captions
from diffusion.data.dataset import Dataset
from diffusion.data.fan_out import FanOut
from diffusion.data.loader import Batch, count_repeats
from diffusion.families import family_of
from diffusion.families.config import FamilyConfig, classes_of, shape_conflict, training_conflict
from diffusion.families.fine_tuning import TrainableSubset, share
from diffusion.families.header import Base, ModelHeader
from diffusion.families.model import (
    Conditioning,
    Model,
    TrainingBatch,
    TrainingObjective,
    to_float,
    use_channels_last,
)
from diffusion.families.text_encoder import Encoding
from diffusion.families.vae.network import Latents
from diffusion.generation.config import UNCONDITIONAL, Conditions, check_conditions
from diffusion.generation.generate import Encodings, check_sampling_options, conditions_of
from diffusion.generation.super_resolution import GenerationTask, add_conditioning_noise, task_of
from diffusion.process.samplers import SamplingConfig
from diffusion.training.config import TrainingConfig
from diffusion.training.data import MEASURED, encode_captions, encode_grid, encode_latents, encode_prior, own_latents
from diffusion.training.distributed import Ranks
from diffusion.training.identity import data_digest, identity_fields, train_key
from diffusion.training.starting_models import find_state, identify_base, load_initial, make_latents

FORMAT_VERSION = 3
"""Format version of checkpoints."""
COUNTS, FINGERPRINT = "counts", "fingerprint"
"""Keys of a checkpoint's header."""
SAMPLE_GRID = 36
"""Number of images in a sample grid."""
MIN_DEVIATION = 1e-4
"""Smallest standard deviation, of values in [−1, 1], of data worth learning; far below one level of 8 bits."""
NETWORK = "network."
"""Prefix of the raw weights' names in a checkpoint."""


@dataclass(frozen=True)
class TrainingSetup:
    """Everything a training run consists of, apart from its state."""

    dataset: Dataset
    model: FamilyConfig
    """Model configuration with the path of an autoencoder replaced by its digest."""
    config: TrainingConfig
    """Training configuration with the path of initial weights replaced by their digest."""
    ranks: Ranks
    captions: Captions | None
    """Embeddings of the captions that the network is conditioned on, if any."""
    autoencoder: Latents | None
    """Autoencoder of latent diffusion; None: the network works on pixels."""
    initial: Model | None
    """Model with the initial weights; None: they are random."""
    base: Base | None = None
    """The file of ``initial``, of whose weights a part is trained, or an adapter; None: all weights are."""
    latents: Callable[..., Tensor] | None = None
    """Latents of the images in rows, mirrored or not, as ``LatentCache.select_rows``; None: training is on images."""
    prior_prompt: Encoding | None = None
    """The prompt of ``training.prior``, or of none; None: there is no prior."""
    grid_encodings: Encodings | None = None
    """Prompts of sample grids, if training does not change how they are encoded."""
    state_file: Path | None = None
    """Checkpoint whose raw weights and optimizer moments a warm start takes over; None: there is none."""

    @cached_property
    def device(self) -> torch.device:
        """The device of the network."""
        return resolve_device(self.config.device)

    @cached_property
    def compiled(self) -> bool:
        """Whether the network is compiled."""
        return compiles_by_default(self.device) if self.config.compile is None else self.config.compile

    @cached_property
    def task(self) -> GenerationTask:
        """The task of the model."""
        return task_of(self.model, self.dataset.manifest.size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, S, S) of the images of the data set, or of their latents in an autoencoder that was trained here."""
        return self.autoencoder.space.shape if self.autoencoder else self.dataset.shape

    @cached_property
    def classes(self) -> list[str]:
        """The classes that the network is conditioned on, possibly none."""
        return classes_of(self.model, self.dataset.manifest.class_histogram)

    @cached_property
    def sigma_data(self) -> float:
        """Measure the standard deviation of the network's data; raises UserError for constant data."""
        if self.autoencoder:
            return 1.0
        if self.initial is not None and (self.base is not None or self.config.warm_start):
            # The weights belong to the coefficients that they were trained with.
            return self.initial.header.sigma_data
        if low := self.task.low_resolution:
            # Rows are sorted by content hash, so the first ones are a random sample.
            rows = self.dataset.rows("train")[:MEASURED]
            stds = [
                (self.task.sigma_data(self.dataset.images(part)), len(part))
                for part in self.dataset.split_by_bucket(rows)
            ]
            sigma_data = stds[0][0]
            if len(stds) > 1:
                sigma_data = math.sqrt(sum(std**2 * count for std, count in stds) / len(rows))
            reason = f"show all that they have at {low}×{low}"
        else:
            sigma_data, reason = self.dataset.manifest.sigma_data, "are one flat tone"
        if sigma_data < MIN_DEVIATION:
            name = self.dataset.manifest.name
            raise UserError(f"the training images of {name} {reason}, so there is nothing to learn: ingest others")
        return sigma_data

    def make_network(self, gradient_checkpointing: bool = False) -> nn.Module:
        """Build the network with its first weights; ``gradient_checkpointing`` as in TrainingConfig.

        An adapter is random, as are all weights without initial ones.
        """
        family = family_of(self.model)
        if self.base is not None and self.initial is not None:
            partly_trained = self.initial.make_trainable(self.config.adapter)
            if self.device != CPU and resolve_precision(self.config.precision, self.device) == "bf16":
                partly_trained.narrow(self.device)
            if gradient_checkpointing:
                family.checkpoint_gradients(partly_trained.network)
            return partly_trained.train(not family.trains_in_evaluation_mode)
        network: nn.Module = family.make_network(self.model, self.shape, len(self.classes))
        if gradient_checkpointing:
            family.checkpoint_gradients(network)
        if self.initial is not None:
            network.load_state_dict(self.initial.network.state_dict())
        return network

    def make_objective(self) -> TrainingObjective:
        """Build the training objective, for a student that of its distillation."""
        header = self.model_header(0)
        if self.config.student is None:
            return family_of(self.model).make_objective(header, self.config)
        assert self.initial is not None
        assert self.config.images is not None
        return self.initial.make_student_objective(self.config, header, self.config.images, self.device)

    def x0(self, batch: Batch) -> Tensor:
        """The clean images of a batch in [−1, 1], or their latents: (N, *noise_shape), channels last."""
        x0 = batch.images if batch.images.is_floating_point() else to_float(batch.images)
        return x0.contiguous(memory_format=torch.channels_last)

    def conditioning(self, batch: Batch, u: np.ndarray | None = None) -> Conditioning:
        """Collect class, caption and small version of the images, as far as the network is conditioned on them.

        Of several texts of a caption it is the first, or sampled by ``u`` in [0, 1), (N,).
        """
        conditioning = self.task.conditioning(batch.images)
        if self.classes:
            conditioning["label"] = self.dataset.classes(batch.rows, self.classes)
        if self.captions is not None:
            conditioning |= self.captions.select_rows(batch.rows, u)
        return conditioning

    def with_masks(self, inputs: TrainingBatch, batch: Batch) -> TrainingBatch:
        """Add the weights of pixels that the masks of ``batch`` and ``training.mask`` give, if there are any."""
        if (config := self.config.mask) is None or batch.masks is None:
            return inputs
        weights = (batch.masks[:, None].float() / 255).clamp(min=config.min_weight)
        if config.normalize_area:
            weights = weights / weights.mean((2, 3), keepdim=True).clamp(min=1 / 255 / weights[0].numel())
        return replace(inputs, pixel_weights=weights)

    def training_conditioning(self, batch: Batch) -> Conditioning:
        """Collect the conditioning of a training step, with conditioning dropout or noise augmentation."""
        varies = self.captions is not None and self.captions.texts.choices is not None
        quantiles = uniform(self.config.seed, "caption", batch.indices).numpy() if varies else None
        conditioning = self.conditioning(batch, quantiles)
        if self.task.low_resolution:
            return add_conditioning_noise(conditioning, self.task.max_noise, self.config.seed, batch.indices)
        if not conditioning:
            return conditioning
        u = uniform(self.config.seed, "class", batch.indices)
        no_text = None if self.captions is None else self.captions.encoding.none
        share = self.config.condition_dropout if self.model.has_null_class else 0.0
        return drop_conditioning(conditioning, u, share, len(self.classes), no_text)

    def with_prior(self, inputs: TrainingBatch) -> TrainingBatch:
        """Add the conditioning of ``training.prior``, its prompt without a class, if there is one."""
        if self.prior_prompt is None:
            return inputs
        u = torch.zeros(len(inputs.x0), dtype=torch.float64)
        return replace(
            inputs, prior=drop_conditioning(inputs.conditioning, u, 1.0, len(self.classes), self.prior_prompt)
        )

    def sample_grid_conditions(self) -> Conditions:
        """The conditions of a sample grid: captions of held-out images if the model uses captions."""
        if self.captions is None:
            return UNCONDITIONAL
        rows = np.concatenate([self.dataset.rows("held_out"), self.dataset.rows("train")])
        return conditions_of(self.dataset, rows[self.captions.numbers[rows] >= 0][:SAMPLE_GRID], self.classes)

    @cached_property
    def can_have_guide(self) -> bool:
        """Whether the model can keep a guide: no student, adapter, or model for super-resolution does."""
        return self.model.can_have_guide and self.config.student is None and self.base is None

    @cached_property
    def has_guide(self) -> bool:
        """Whether the model keeps a guide."""
        return self.config.guide is not None and self.can_have_guide

    @cached_property
    def given_guide(self) -> tuple[nn.Module, int] | None:
        """The guide of the initial model, and the images that it has seen; None: there is none to keep."""
        if not self.has_guide or self.initial is None or self.initial.guide is None:
            return None
        assert self.initial.header.guide_images is not None
        return self.initial.guide, self.initial.header.guide_images

    def guide_images(self, total: int) -> int:
        """Compute after how many of ``total`` images the guide learns no more: whole batches, at least one."""
        if self.given_guide is not None:
            return 0
        batch = self.config.images_per_step
        return max(1, round((self.config.guide or 0) * total / batch)) * batch

    def network_from(self, tensors: dict[str, Tensor], prefix: str, trained: nn.Module | None = None) -> nn.Module:
        """Build a network for inference from copies of the ``tensors`` whose names begin with ``prefix``.

        With an adapter it shares on a device what the ``trained`` network has there.
        """
        weights = {
            name.removeprefix(prefix): value.detach().clone()
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        network: nn.Module
        if self.base is not None and self.initial is not None:
            network = share(self.initial.network)
            weights = {name: value.to(CPU) for name, value in weights.items()}
            update = self.initial.tuned_weights(self.config.adapter, weights)
            network.load_state_dict(update, strict=False, assign=True)
            if self.config.adapter is not None and self.device != CPU and isinstance(trained, TrainableSubset):
                self.initial.share_frozen(network, trained)
        else:
            with torch.device("meta"):
                network = replace(self, initial=None).make_network()
            network.load_state_dict(weights, assign=True)
        use_channels_last(network.eval().requires_grad_(False))
        return network

    def model_header(self, images: int, total: int = 0) -> ModelHeader:
        """Build the header of a model that has seen ``images`` of ``total``."""
        manifest, family = self.dataset.manifest, family_of(self.model)
        fields: dict[str, Any] = {"data_mean": family.data_mean(self.model, manifest.mean)}
        if self.base is not None and self.initial is not None:
            fields = self.initial.header.model_dump(include={"data_mean", "guidance", "guidance_interval"})
        elif self.config.warm_start and self.initial is not None:
            fields = {"data_mean": self.initial.header.data_mean}
        if self.has_guide:
            guide = self.given_guide
            fields["guide_images"] = min(images, self.guide_images(total)) if guide is None else guide[1]
        return ModelHeader(
            # A file says what its network is, whatever the default will be one day.
            model=self.model.resolve(self.autoencoder.space.size if self.autoencoder else manifest.size),
            channels=manifest.channels,
            size=manifest.size,
            shapes=manifest.train_shapes,
            dataset=manifest.name,
            content_digest=manifest.content_digest,
            sigma_data=self.sigma_data,
            class_histogram=manifest.class_histogram,
            encoder=family.text_encoder(self.model),
            caption_moments=None if self.captions is None else self.captions.encoding.moments,
            latents=self.autoencoder.space if self.autoencoder else None,
            base=self.base,
            adapter=self.config.adapter,
            images=images,
            training=identity_fields(self.config, self.model),
            **fields,
        )

    def header(self, images: int, total: int) -> dict[str, Any]:
        """Build the header of a final model after ``images`` of ``total``."""
        layout = {} if self.config.window is None else {"layout_digest": self.dataset.manifest.layout_digest}
        return layout | {
            "format_version": FORMAT_VERSION,
            "model_header": self.model_header(images, total).model_dump(mode="json"),
            "train_key": self.train_key,
            "total": total,
        }

    @cached_property
    def train_key(self) -> str:
        """The digest of everything that determines the weights, except the fingerprint."""
        return train_key(data_digest(self.dataset.manifest, self.config), self.model, self.config)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """The fingerprint, on which the last bits of the weights depend."""
        result = fingerprint(self.config.images_per_step, self.config.precision, self.config.device)
        return result.model_copy(update={"compile": self.compiled, "ranks": self.ranks.count, "shard": self.shard})

    @cached_property
    def shard(self) -> int:
        """The number of processes that share the network; 1: each has all of it. UserError if it cannot be."""
        shard, count = self.config.shard, self.ranks.count
        if shard is False or count == 1:
            return 1
        if shard is not True and count % shard:
            raise UserError(
                f"training.shard = {shard} processes share a network, and {count} are no whole number of such groups: "
                f"start a multiple of {shard}, or set it to true"
            )
        return count if shard is True else shard


def make_setup(
    dataset: Dataset,
    model: FamilyConfig,
    config: TrainingConfig,
    sampling: SamplingConfig,
    ranks: Ranks,
    fan_out: FanOut | None = None,
    progress: Progress = ignore_progress,
    start: str | None = None,
) -> TrainingSetup:
    """Check that data set and configuration match, and load captions, latents, autoencoder and initial weights.

    ``sampling`` is how sample grids are generated; ``fan_out`` has workers encode captions, and images as latents;
    None: nothing is encoded, and all captions and latents are as none and zeros. ``start`` is the registered version in
    the file ``config.init_from``, if any. Raises UserError if an option has no effect or contradicts another, or a file
    is missing or does not match.
    """
    size = dataset.manifest.size
    if words := training_conflict(model, config) or shape_conflict(model, size, dataset.shapes):
        raise UserError(words)
    check_sampling_options(model, sampling)
    if config.mask is not None and not dataset.manifest.masks:
        raise UserError(
            f"training.mask weights pixels by masks, and data set {dataset.manifest.name} has none: set ingest.masks "
            "to files or alpha and ingest its source again, or leave training.mask out"
        )
    if config.weights is not None:
        count_repeats(dataset, config.weights)  # which checks them before minutes of encoding
    config = config.with_batch_size(model, size)
    autoencoder = None
    if model.autoencoder is not None:
        autoencoder = make_latents(model.autoencoder, dataset.manifest)
        use_channels_last(autoencoder.eval().requires_grad_(False))
        model = model.model_copy(update={"autoencoder": f"sha256:{autoencoder.space.digest}"})
    initial = load_initial(model.resolve(autoencoder.space.size if autoencoder else size), config, dataset)
    base, latents, encoding = None, None, family_of(model).own_caption_encoder(model)
    state_file = find_state(config, model)
    if initial is not None and config.init_from is not None:
        base, config = identify_base(initial, config, start)
        if initial.has_frozen_parts:
            model = initial.config
        if model.text:
            encoding = initial.caption_encoder(config.adapter, resolve_device(config.device))
        if (digest := initial.latents_digest) is not None:
            shape = initial.with_size(dataset.shape[1:]).noise_shape
            latents = encode_latents(initial.for_encoding(), digest, shape, dataset, config, fan_out, progress)
    if autoencoder is not None:
        latents = own_latents(autoencoder, initial, dataset, config, ranks, fan_out, progress)
    captions = encode_captions(dataset, config, encoding, ranks, fan_out, progress) if model.text else None
    prior_prompt = encode_prior(config, captions, fan_out is not None)
    parts = dataset, model, config, ranks, captions, autoencoder, initial, base, latents, prior_prompt
    setup = TrainingSetup(*parts, state_file=state_file)
    check_conditions(setup.classes, model.text, sampling, setup.sample_grid_conditions())
    if base is not None and captions is not None and not (config.adapter and config.adapter.text_encoder):
        texts = setup.sample_grid_conditions().texts
        encodings = encode_grid(texts, encoding, fan_out is not None and ranks.is_main)
        setup = replace(setup, grid_encodings=encodings)
    _check_guide(setup, sampling)
    return setup


def _check_guide(setup: TrainingSetup, sampling: SamplingConfig) -> None:
    """Raise UserError if sample grids, or a student's teacher, are to be led away from a guide that is not there."""
    autoguides, has_guide, student = sampling.autoguides, setup.has_guide, setup.config.student
    if student is not None:
        autoguides, has_guide = student.autoguidance is not None, bool(setup.initial and setup.initial.guide)
    if autoguides and not has_guide:
        advice = "set training.guide to 0.25, or " if setup.can_have_guide else ""
        raise UserError(
            "sampling.autoguidance leads away from the guide of a model (training.guide), and this one has none: "
            f"{advice}leave sampling.autoguidance out"
        )


def drop_conditioning(
    conditioning: Conditioning, u: Tensor, share: float, no_class: int, no_text: Encoding | None = None
) -> Conditioning:
    """Drop conditioning where the random numbers ``u`` (N,), in [0, 1), are below ``share`` (arXiv 2207.12598).

    A dropped class is ``no_class``, a dropped caption ``no_text``; None: there are no captions.

    With both class and caption, one of them is dropped for an equal share again, so that the model can be conditioned
    on either alone (arXiv 2211.09800, section 3.2.1).
    """
    texts = {name: value for name, value in (no_text or {}).items() if name in conditioning}
    single_share = share / 2 if texts and "label" in conditioning else 0
    label_mask = (u < share) | ((u >= share + single_share) & (u < share + 2 * single_share))
    result = {}
    if "label" in conditioning:
        result["label"] = conditioning["label"].masked_fill(label_mask, no_class)
    text_mask = u < share + single_share
    for name, dropped in texts.items():
        result[name] = torch.where(text_mask.view(-1, *[1] * dropped.ndim), dropped, conditioning[name])
    return result
