"""The setup of a training run: everything derived from data set and configuration that is constant during training.

Pretrained models, an autoencoder or initial weights, are identified by the digest of their weights, so that a run does
not depend on where the file is.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.checkpoints import load_model, tensor_bytes, weights_digest
from diffusion.common.device import device_name, resolve_device
from diffusion.common.errors import UserError
from diffusion.common.escaping import pluralize
from diffusion.common.files import canonical_json, digest_of, sha256_bytes, sha256_file
from diffusion.common.fingerprint import CPU, Fingerprint, fingerprint, resolve_precision
from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.random import uniform
from diffusion.common.shapes import Shape
from diffusion.data.caption_embeddings import MINI_LM, CaptionEncoder, Captions, embeddings_of
from diffusion.data.dataset import Dataset, Rows
from diffusion.data.latents import LatentCache
from diffusion.data.loader import Batch
from diffusion.data.manifest import Manifest, read_manifest
from diffusion.data.shards import ShardCache, ShardStore
from diffusion.families import family_of
from diffusion.families.ddpm import DiffusionModel
from diffusion.families.model import Base, Conditioning, Model, ModelHeader, to_float
from diffusion.families.pretrained import PretrainedModel
from diffusion.families.vae import VAEModel
from diffusion.generation.config import UNCONDITIONAL, Conditions, check_conditions
from diffusion.generation.generate import check_sampling_options, conditions_of
from diffusion.generation.super_resolution import GenerationTask, add_conditioning_noise, task_of
from diffusion.models.config import (
    LORA_INEFFECTIVE,
    DiffusersConfig,
    FamilyConfig,
    LatentSpace,
    LoRAConfig,
    ModelConfig,
    VAEConfig,
    classes_of,
    default_channel_mult,
    shape_conflict,
    training_conflict,
)
from diffusion.models.fine_tuning import make_trainable, share, tuned_weights
from diffusion.models.pretrained import PipelineNetwork
from diffusion.models.text_encoder import ENCODER
from diffusion.models.unet import UNet
from diffusion.models.vae import Latents, latent_shape
from diffusion.process.samplers import SamplingConfig
from diffusion.training.config import DistillationConfig, TrainingConfig
from diffusion.training.distributed import Ranks

FORMAT_VERSION = 3
"""Format version of checkpoints."""
COUNTS, FINGERPRINT = "counts", "fingerprint"
"""Keys of a checkpoint's header."""
SAMPLE_GRID = 36
"""Number of images in a sample grid."""
LEAST_DEVIATION = 1e-4
"""Smallest standard deviation, of values in [−1, 1], of data worth learning; far below one level of 8 bits."""
MEASURED = 1024
"""Maximum number of training images on which residuals' or latents' moments are measured: error about 0.1 %."""
ENCODED = 32
"""Images encoded at a time."""
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
    """The file of ``initial``, of whose weights a part is trained, or low-rank matrices; None: all weights are."""
    latents: Callable[..., Tensor] | None = None
    """Latents of the images in rows, mirrored or not, as ``LatentCache.select_rows``; None: training is on images."""

    @cached_property
    def device(self) -> torch.device:
        """Return the device of the network."""
        return resolve_device(self.config.device)

    @cached_property
    def compiled(self) -> bool:
        """Return whether the network is compiled."""
        return self.config.compile if self.config.compile is not None else self.device.type == "cuda"

    @cached_property
    def task(self) -> GenerationTask:
        """Return the task of the model."""
        return task_of(self.model, self.dataset.manifest.size)

    @cached_property
    def shapes(self) -> dict[Shape, int] | None:
        """Return the number of training images of each shape; None for a data set of squares."""
        manifest = self.dataset.manifest
        if not manifest.storage.buckets:
            return None
        counts = zip(manifest.shapes, manifest.shape_counts["train"], strict=True)
        return {shape: count for shape, count in counts if count}

    @cached_property
    def classes(self) -> list[str]:
        """Return the classes that the network is conditioned on, possibly none."""
        return classes_of(self.model, self.dataset.manifest.class_histogram)

    @cached_property
    def sigma_data(self) -> float:
        """Measure the standard deviation of the network's data; raises UserError for constant data."""
        if self.autoencoder:
            return 1.0
        if self.base is not None and self.initial is not None:
            # The frozen weights belong to the coefficients that they were trained with.
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
        if sigma_data < LEAST_DEVIATION:
            name = self.dataset.manifest.name
            raise UserError(f"the training images of {name} {reason}, so there is nothing to learn: ingest others")
        return sigma_data

    def make_network(self, gradient_checkpointing: bool = False) -> nn.Module:
        """Build the network with its first weights; ``gradient_checkpointing`` as in TrainingConfig.

        Low-rank matrices are random, as are all weights without initial ones.
        """
        if self.base is not None and self.initial is not None:
            partly_trained = make_trainable(self.initial.network, self.config.lora)
            if isinstance(pipeline := partly_trained.network, PipelineNetwork):
                if gradient_checkpointing:
                    pipeline.component(pipeline.config.denoiser_name).enable_gradient_checkpointing()
                # Not its mode for training: dropout of diffusers takes random numbers from a state that resuming lacks.
                return partly_trained.eval()
            assert isinstance(pipeline, UNet)
            pipeline.gradient_checkpointing = gradient_checkpointing
            return partly_trained.train()
        shape = self.autoencoder.space.shape if self.autoencoder else self.dataset.shape
        network: nn.Module = family_of(self.model).make_network(self.model, shape, len(self.classes))
        if isinstance(network, UNet):
            network.gradient_checkpointing = gradient_checkpointing
        if self.initial is not None:
            network.load_state_dict(self.initial.network.state_dict())
        return network

    def x0(self, batch: Batch) -> Tensor:
        """Return the clean images of a batch in [−1, 1], or their latents: (N, *noise_shape), channels last."""
        x0 = batch.images if batch.images.is_floating_point() else to_float(batch.images)
        return x0.contiguous(memory_format=torch.channels_last)

    def conditioning(self, batch: Batch) -> Conditioning:
        """Collect class, caption and small version of the images, as far as the network is conditioned on them."""
        conditioning = self.task.conditioning(batch.images)
        if self.classes:
            conditioning["label"] = self.dataset.classes(batch.rows, self.classes)
        if self.captions is not None:
            conditioning["text"] = self.captions.select_rows(batch.rows)
        return conditioning

    def training_conditioning(self, batch: Batch) -> Conditioning:
        """Collect the conditioning of a training step, with conditioning dropout or noise augmentation."""
        conditioning = self.conditioning(batch)
        if self.task.low_resolution:
            return add_conditioning_noise(conditioning, self.task.max_noise, self.config.seed, batch.indices)
        if not conditioning:
            return conditioning
        u = uniform(self.config.seed, "class", batch.indices)
        no_text = None if self.captions is None else self.captions.encoding.none
        share = self.config.condition_dropout
        if isinstance(self.model, DiffusersConfig) and not (self.model.has_null_class or self.model.text):
            share = 0.0  # its network knows no class for none
        return drop_conditioning(conditioning, u, share, len(self.classes), no_text)

    def sample_grid_conditions(self) -> Conditions:
        """Return the conditions of a sample grid: captions of held-out images if the model uses captions."""
        if self.captions is None:
            return UNCONDITIONAL
        rows = np.concatenate([self.dataset.rows("held_out"), self.dataset.rows("train")])
        return conditions_of(self.dataset, rows[self.captions.numbers[rows] >= 0][:SAMPLE_GRID], self.classes)

    @cached_property
    def can_have_guide(self) -> bool:
        """Return whether the model can keep a guide: no student, adapter, or model for super-resolution does."""
        if not isinstance(self.model, ModelConfig) or self.model.low_resolution is not None:
            return False
        return self.config.student is None and self.base is None

    @cached_property
    def has_guide(self) -> bool:
        """Return whether the model keeps a guide."""
        return self.config.guide is not None and self.can_have_guide

    @cached_property
    def given_guide(self) -> tuple[nn.Module, int] | None:
        """Return the guide of the initial model, and the images that it has seen; None: there is none to keep."""
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

    def network_from(self, tensors: dict[str, Tensor], prefix: str) -> nn.Module:
        """Build a network for inference from copies of the ``tensors`` whose names begin with ``prefix``."""
        weights = {
            name.removeprefix(prefix): value.detach().clone()
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        network: nn.Module
        if self.base is not None and self.initial is not None:
            network = share(self.initial.network)
            update = tuned_weights(network, self.config.lora, {name: value.to(CPU) for name, value in weights.items()})
            network.load_state_dict(update, strict=False, assign=True)
        else:
            with torch.device("meta"):
                network = replace(self, initial=None).make_network()
            network.load_state_dict(weights, assign=True)
        network.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return network

    def model_header(self, images: int, total: int = 0) -> ModelHeader:
        """Build the header of a model that has seen ``images`` of ``total``."""
        manifest = self.dataset.manifest
        pixels = isinstance(self.model, ModelConfig) and self.autoencoder is None and self.task.low_resolution is None
        fields: dict[str, Any] = {"data_mean": tuple(manifest.mean) if pixels else None}
        if self.base is not None and self.initial is not None:
            fields = self.initial.header.model_dump(include={"data_mean", "guidance", "guidance_interval"})
        if self.has_guide:
            guide = self.given_guide
            fields["guide_images"] = min(images, self.guide_images(total)) if guide is None else guide[1]
        return ModelHeader(
            # A file says what its network is, whatever the default will be one day.
            model=with_channel_mult(self.model, self.dataset, self.autoencoder),
            channels=manifest.channels,
            size=manifest.size,
            shapes=self.shapes,
            dataset=manifest.name,
            content_digest=manifest.content_digest,
            sigma_data=self.sigma_data,
            class_histogram=manifest.class_histogram,
            encoder=ENCODER if self.model.text and isinstance(self.model, ModelConfig) else None,
            latents=self.autoencoder.space if self.autoencoder else None,
            base=self.base,
            lora=self.config.lora,
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
        """Return the digest of everything that determines the weights, except the fingerprint."""
        return train_key(data_digest(self.dataset.manifest, self.config), self.model, self.config)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint, on which the last bits of the weights depend."""
        result = fingerprint(self.config.images_per_step, self.config.precision, self.config.device)
        return result.model_copy(update={"compile": self.compiled, "ranks": self.ranks.count, "shard": self.shard})

    @cached_property
    def shard(self) -> int:
        """Return the number of processes that share the network; 1: each has all of it. UserError if it cannot be."""
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
    readers: Executor | None = None,
    progress: Progress = ignore_progress,
    start: str | None = None,
) -> TrainingSetup:
    """Check that data set and configuration match, and load captions, latents, autoencoder and initial weights.

    ``sampling`` is how sample grids are generated; ``readers`` are the threads that encode captions, and images for a
    pipeline with latents; None: nothing is encoded, and all captions and latents are as none and zeros. ``start`` is
    the registered version in the file ``config.init_from``, if any. Raises UserError if an option has no effect or
    contradicts another, or a file is missing or does not match.
    """
    if words := training_conflict(model, config) or shape_conflict(model, dataset.manifest.size, dataset.shapes):
        raise UserError(words)
    config = config.with_batch_size(model, dataset.manifest.size)
    initial: Model | None = None
    encoding = MINI_LM
    if isinstance(model, DiffusersConfig):
        pipeline = load_pipeline(config, model, dataset)
        initial, model = pipeline, pipeline.config
        encoding = caption_encoder(pipeline.network, config.lora) if model.text else encoding
    captions = None
    if model.text:
        texts, numbers = dataset.different_captions()
        if not texts:
            subject = "the pipeline is conditioned" if initial else "model.text conditions the network"
            remedy = "fine-tune another" if initial else "leave model.text out"
            raise UserError(
                f"data set {dataset.folder} has no captions, and {subject} on them: ingest it with a column text "
                f"beside file_name (metadata.csv), or {remedy}"
            )
        if readers is None:
            embeddings = encoding.none.expand(len(texts), -1)
        else:
            # The main process embeds them for all.
            data = {"embeddings": embeddings_of(dataset, texts, readers, progress, encoding)} if ranks.is_main else {}
            embeddings = ranks.broadcast_tensors(data)["embeddings"]
        captions = Captions(embeddings, numbers, encoding)
    check_sampling_options(model, sampling)
    autoencoder = None
    if isinstance(model, ModelConfig) and model.autoencoder is not None:
        autoencoder = load_autoencoder(model.autoencoder, dataset, config.window)
        for name, moment in ranks.broadcast_tensors(dict(autoencoder.named_buffers())).items():
            autoencoder.get_buffer(name).copy_(moment)
        model = model.model_copy(update={"autoencoder": f"sha256:{autoencoder.space.digest}"})
    base = None
    if config.init_from is not None:
        if initial is None:
            classes = classes_of(model, dataset.manifest.class_histogram)
            network = with_channel_mult(model, dataset, autoencoder)
            option = "training.init_from" if config.student is None else "distillation.teacher"
            initial = load_initial_weights(config.init_from, network, dataset, classes, option)
        if config.student is not None and initial.header.student_steps is not None:
            raise UserError(f"{config.init_from} is a student itself: name its teacher with distillation.teacher")
        if config.lora is not None or isinstance(initial, PretrainedModel):
            base = Base(sha256=sha256_file(Path(config.init_from)), version=start)
        if config.lora is not None and isinstance(initial, DiffusionModel) and isinstance(initial.latents, Latents):
            # With the moments that its frozen weights were trained with.
            autoencoder = initial.latents
        config = config.model_copy(update={"init_from": weights_digest(Path(config.init_from))})
    latents: Callable[..., Tensor] | None = None
    if isinstance(initial, PretrainedModel) and initial.latents is not None:
        latents = partial(zero_latents, dataset, initial.config.noise_shape)
        if readers is not None:
            latents = encode_latents(initial, dataset, config, readers, progress)
    setup = TrainingSetup(dataset, model, config, ranks, captions, autoencoder, initial, base, latents)
    check_conditions(setup.classes, model.text, sampling, setup.sample_grid_conditions())
    autoguides, has_guide = sampling.autoguides, setup.has_guide
    if config.student is not None:
        autoguides, has_guide = config.student.autoguidance is not None, bool(initial and initial.guide)
    if autoguides and not has_guide:
        advice = "set training.guide to 0.25, or " if setup.can_have_guide else ""
        raise UserError(
            "sampling.autoguidance leads away from the guide of a model (training.guide), and this one has none: "
            f"{advice}leave sampling.autoguidance out"
        )
    return setup


def load_pipeline(config: TrainingConfig, model: DiffusersConfig, dataset: Dataset) -> PretrainedModel:
    """Load the pipeline in ``config.init_from``, with the classes of ``dataset`` among its own.

    Raises UserError if the file does not exist, is no pipeline, or generates other images than those of the data set.
    """
    if config.init_from is None:
        raise UserError(
            "model.family = diffusers has no network of its own: set training.init_from to an imported pipeline"
        )
    pipeline = load_model(_local("training.init_from", config.init_from))
    words, labels = None, sorted(dataset.manifest.class_histogram)
    if not isinstance(pipeline, PretrainedModel):
        words = f"is a model of the family {pipeline.header.model.family}, and this is diffusers"
    elif model.pipeline is not None and model != pipeline.config:
        words = "is another pipeline than the section model describes, which may be left to it"
    elif pipeline.config.prediction is None:
        words = f"predicts what its {pipeline.config.scheduler.kind} alone knows, so it cannot be trained"
    elif pipeline.header.square != dataset.shape:
        they, we = ("×".join(map(str, shape)) for shape in (pipeline.header.square, dataset.shape))
        words = f"generates images of {they} (channels × height × width), and data set {dataset.manifest.name} has {we}"
    elif pipeline.classes and (len(labels) < 2 or not set(labels) <= set(pipeline.classes)):
        names = ", ".join(pipeline.classes[:8]) + (" …" if len(pipeline.classes) > 8 else "")
        words = f"knows the classes {names}, and data set {dataset.manifest.name} has {', '.join(labels[:8]) or 'none'}"
    if words is not None or not isinstance(pipeline, PretrainedModel):
        raise UserError(f"training.init_from {config.init_from} {words}: begin with another model, or ingest others")
    for shape in dataset.shapes:
        pipeline.with_size(shape)  # raises if its network does not take it
    if not pipeline.classes:
        return pipeline
    numbers = dict(zip(pipeline.classes, pipeline.config.class_ids, strict=True))
    pipeline_config = pipeline.config.model_copy(update={"class_ids": tuple(numbers[label] for label in labels)})
    pipeline.network.set_classes(pipeline_config)
    return replace(pipeline, header=pipeline.header.model_copy(update={"model": pipeline_config}))


def caption_encoder(network: PipelineNetwork, lora: LoRAConfig | None) -> CaptionEncoder:
    """Make the encoder of a pipeline's captions: tokens where its text encoder is trained, else embeddings."""
    if lora is not None and lora.text_encoder:
        if network.config.pipeline != "StableDiffusionPipeline":
            raise UserError(
                f"training.lora.text_encoder adapts the one text encoder of Stable Diffusion, and a "
                f"{network.config.pipeline} has several: leave it out"
            )
        return CaptionEncoder(parts_digest(network, "tokenizer"), lambda: network.tokens, network.tokens(""))
    parts = parts_digest(network, "tokenizer", "text_encoder")
    # The denoiser decides how wide embeddings are, and libraries their last bits.
    key = [parts, network.config.pipeline, network.embedding_size, torch.__version__, version("transformers")]
    return CaptionEncoder(digest_of(key), lambda: network.embed, network.embed(""))


def encode_latents(
    model: PretrainedModel, dataset: Dataset, config: TrainingConfig, readers: Executor, progress: Progress
) -> Callable[..., Tensor]:
    """Encode the images of ``dataset`` by the autoencoder of ``model``, as far as they are not in the cache.

    Returns the function that looks up the latents of rows of the data set.
    """
    device = resolve_device(config.device)
    network = model.to(device).network
    name = network.config.latents_name
    key = [parts_digest(model.network, name), device_name(device), torch.__version__]

    def encode(images: Tensor) -> Tensor:
        return network.encode(images.to(device))

    return LatentCache(dataset, digest_of(key), encode, config.flip, readers, progress).select_rows


def zero_latents(
    dataset: Dataset, shape: tuple[int, int, int], rows: Rows, mirrored: np.ndarray | None = None
) -> Tensor:
    """Return zeros in place of the latents of images in ``rows``, whose ``shape`` (c, h, w) is that of a square."""
    sides = (
        side * latent // dataset.manifest.size
        for side, latent in zip(dataset.shapes[dataset.buckets(rows)[0]], shape[1:], strict=True)
    )
    return torch.zeros(len(rows), shape[0], *sides)


def parts_digest(network: PipelineNetwork, *names: str) -> str:
    """SHA-256 over configurations, weights and files of a pipeline's components whose names begin with ``names``."""
    digest = hashlib.sha256()
    for name, component in sorted(network.config.components.items()):
        if name.startswith(names):
            digest.update(canonical_json([name, component.model_dump(mode="json")]).encode())
    for name, value in sorted(network.state_dict().items()):
        if name.startswith(names):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(tensor_bytes(value))
    for file, content in sorted(network.files.items()):
        if file.startswith(names):
            digest.update(f"{file} {sha256_bytes(content)}".encode())
    return digest.hexdigest()


@contextmanager
def open_dataset(data: Path, config: TrainingConfig, store: ShardStore | None) -> Iterator[Dataset]:
    """Open the data set in folder ``data``, or stream its shards from ``store``; UserError if it has no images."""
    shards = None
    if config.stream_bytes is not None:
        if store is None:
            raise UserError(
                "training.stream_bytes is set, and there is no remote to fetch shards from: "
                "leave it out (null) and get the data set with `dvc pull`"
            )
        manifest, window = read_manifest(data), config.window
        count = len(manifest.shards)

        def cached(window: int) -> int:
            """Return the bytes of two windows of each bucket, at most."""
            sizes = [
                sorted(
                    (part.shard.bytes for part in manifest.parts if part.shard and part.shape == shape), reverse=True
                )
                for shape in {part.shape for part in manifest.parts}
            ]
            return sum(sum(shard_sizes[: 2 * window]) for shard_sizes in sizes)

        if (required_bytes := cached(count if window is None else window)) > config.stream_bytes:
            max_window = next((size for size in range(count, 0, -1) if cached(size) <= config.stream_bytes), 0)
            hint = f", or set training.window to {max_window} or less" if max_window else ""
            subject = f"two windows of training.window = {window}" if window else f"all {count}"
            subject += " for each bucket" if window and manifest.storage.buckets else ""
            raise UserError(
                f"{subject} shards of data set {manifest.name} have up to {required_bytes} bytes and the cache holds "
                f"{config.stream_bytes}: raise training.stream_bytes to {required_bytes}{hint}"
            )
        shards = ShardCache(data.parent / ".shards", store, config.stream_bytes)
    with closing(Dataset.open(data, shards, config.cache_bytes)) as dataset:
        if not len(dataset.rows("train")):
            raise UserError(f"data set {data} has no training images: ingest more, or lower ingest.held_out")
        yield dataset


def drop_conditioning(
    conditioning: Conditioning, u: Tensor, share: float, no_class: int, no_text: Tensor | None = None
) -> Conditioning:
    """Drop conditioning where the random numbers ``u`` (N,), in [0, 1), are below ``share`` (arXiv 2207.12598).

    A dropped class is ``no_class``, a dropped caption the embedding ``no_text``, (E,); None: there are no captions.

    With both class and caption, one of them is dropped for an equal share again, so that the model can be conditioned
    on either alone (arXiv 2211.09800, section 3.2.1).
    """
    single_share = share / 2 if len(conditioning) == 2 else 0
    label_mask = (u < share) | ((u >= share + single_share) & (u < share + 2 * single_share))
    result = {}
    if "label" in conditioning:
        result["label"] = conditioning["label"].masked_fill(label_mask, no_class)
    if "text" in conditioning:
        assert no_text is not None
        result["text"] = torch.where((u < share + single_share)[:, None], no_text, conditioning["text"])
    return result


def student_training(
    training: TrainingConfig, config: DistillationConfig, sampling: SamplingConfig, teacher: str, header: ModelHeader
) -> TrainingConfig:
    """Configure the training of a student of ``teacher``, the file or URI of a model with this ``header``.

    The rest is as in ``training``; the teacher is guided as it samples where ``sampling`` is configured.
    """
    sampling = header.sampling(sampling)
    names = ("guidance", "guidance_interval") if sampling.guides else ("autoguidance",) if sampling.autoguides else ()
    fields = {
        "init_from": teacher,
        "images": config.images,
        "minutes": None,
        "learning_rate": config.learning_rate,
        "warmup_images": min(training.warmup_images, config.images // 10),
        "student": {"steps": config.steps} | {name: getattr(sampling, name) for name in names},
        "guide": None,
    }
    return TrainingConfig.model_validate(training.model_dump() | fields)


def identity_fields(config: TrainingConfig, model: FamilyConfig) -> dict[str, Any]:
    """Return the resolved configuration without fields that cannot change the weights of ``model``."""
    harmless = {
        "gradient_checkpointing",
        "device",
        "compile",
        "shard",
        "max_nonfinite_steps",
        "output",
        "keep",
        "keep_best",
        "keep_every",
        "checkpoints",
        "workers",
        "prefetch",
        "cache_bytes",
        "stream_bytes",
    }
    harmless.update(name for name in ("window", "guide") if getattr(config, name) is None)
    harmless.update(model.ineffective)
    if config.lora is not None:
        harmless.update(LORA_INEFFECTIVE)
    return config.model_dump(mode="json", exclude=harmless) | {
        "precision": resolve_precision(config.precision, resolve_device(config.device))
    }


def data_digest(manifest: Manifest, config: TrainingConfig) -> str:
    """Compute the digest of the data that determine the weights: content, and layout if shards decide the order."""
    if config.window is None:
        return manifest.content_digest
    return digest_of([manifest.content_digest, manifest.layout_digest])


def train_key(data_digest: str, model: FamilyConfig, config: TrainingConfig) -> str:
    """Compute the digest of everything that determines the weights, except the fingerprint, by digests of files."""
    return digest_of(
        {
            "content_digest": data_digest,
            # A pipeline is what the digest of training.init_from stands for.
            "model": (DiffusersConfig() if isinstance(model, DiffusersConfig) else model).model_dump(mode="json"),
            "training": identity_fields(config, model),
        }
        | ({"encoder": ENCODER.digest} if model.text and isinstance(model, ModelConfig) else {})
    )


def with_digests(model: FamilyConfig, training: TrainingConfig) -> tuple[FamilyConfig, TrainingConfig]:
    """Replace the paths of autoencoder and initial weights by their digests; raises UserError for a missing file."""
    if isinstance(model, ModelConfig) and model.autoencoder is not None:
        digest = weights_digest(_local("model.autoencoder", model.autoencoder))
        model = model.model_copy(update={"autoencoder": digest})
    if training.init_from is not None:
        digest = weights_digest(_local("training.init_from", training.init_from))
        training = training.model_copy(update={"init_from": digest})
    return model, training


def load_autoencoder(path: str, dataset: Dataset, window: int | None) -> Latents:
    """Load the autoencoder in the file ``path`` and measure its latents' moments on training images of ``dataset``.

    Uses the first images by key; with a ``window``, images from as few shards as possible. Raises UserError if the file
    is not an autoencoder, has other channels than the images, or its factor does not divide the image size.
    """
    model = load_model(_local("model.autoencoder", path))
    if not isinstance(model, VAEModel):
        raise UserError(
            f"model.autoencoder {path} is a model of the family {model.header.model.family}, and no autoencoder: train "
            "one with model.family=vae"
        )
    config, (channels, _, size) = model.header.model, dataset.shape
    assert isinstance(config, VAEConfig)
    if model.header.channels != channels:
        raise UserError(
            f"model.autoencoder {path} was trained on images of {pluralize(model.header.channels, 'channel')} and data "
            f"set {dataset.manifest.name} has {channels}: train an autoencoder on images like these"
        )
    sizes = latent_shape(config, size, size)
    for shape in dataset.shapes:
        latent_shape(config, *shape)  # raises if the factor does not divide it
    space = LatentSpace(
        autoencoder=config, digest=weights_digest(Path(path)).removeprefix("sha256:"), channels=sizes[0], size=sizes[1]
    )
    latents = Latents(space, channels)
    latents.network.load_state_dict(model.network.autoencoder.state_dict())
    latents.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    rows = dataset.rows("train")
    if window is not None:
        rows = rows[np.argsort(dataset.shards(rows), kind="stable")]
    parts = [dataset.images(part) for part in dataset.split_by_bucket(rows[:MEASURED])]
    with torch.inference_mode():
        means = [
            torch.cat([latents.network.encode(to_float(batch)).double() for batch in torch.split(images, ENCODED)])
            for images in parts
        ]
        values = torch.cat([part_means.transpose(0, 1).flatten(1) for part_means in means], dim=1)
        std, mean = torch.std_mean(values, dim=1, correction=0)
        # A constant channel keeps its scale instead of being amplified.
        std = torch.where(std > 1e-4 * std.max(), std, 1.0)
        latents.std.copy_(std.view(1, -1, 1, 1))
        latents.mean.copy_(mean.view(1, -1, 1, 1))
    return latents


def with_channel_mult(model: FamilyConfig, dataset: Dataset, autoencoder: Latents | None) -> FamilyConfig:
    """Set ``channel_mult`` of a diffusion model of images, or of their latents, unless it is set."""
    if not isinstance(model, ModelConfig) or model.channel_mult is not None:
        return model
    size = autoencoder.space.size if autoencoder else dataset.manifest.size
    return model.model_copy(update={"channel_mult": default_channel_mult(model.patch, size)})


def load_initial_weights(
    path: str, model: FamilyConfig, dataset: Dataset, classes: list[str], option: str = "training.init_from"
) -> Model:
    """Load the model in the file ``path``, whose averaged weights initialize a network of ``model`` for ``dataset``.

    ``option`` names the file: training.init_from, or distillation.teacher, without which there is no student.
    Optimizer, averages and learning rate start from scratch. Raises UserError if the file does not exist or fit.
    """
    initial = load_model(_local(option, path))
    alternative = "distil another model"
    if option == "training.init_from":
        alternative = "begin with a model of the same kind, or at random (training.init_from=null)"
    theirs, ours = initial.header.model.model_dump(), model.model_dump()
    differences = [name for name in theirs | ours if theirs.get(name) != ours.get(name)]
    words = None
    if initial.header.model.family != model.family:
        words = f"is a model of the family {initial.header.model.family}, and this is {model.family}"
    elif differences:
        # Fields with their defaults may be missing in the dump.
        values = {name: theirs.get(name, getattr(initial.header.model, name)) for name in differences}
        settings = (f"--set model.{name}={json.dumps(value, separators=(',', ':'))}" for name, value in values.items())
        raise UserError(
            f"{option} {path} is another network than the section model describes: give {' '.join(settings)}, or "
            f"{alternative}"
        )
    elif initial.header.square != dataset.shape:
        they, we = ("×".join(map(str, shape)) for shape in (initial.header.square, dataset.shape))
        words = f"generates images of {they} (channels × height × width), and data set {dataset.manifest.name} has {we}"
    elif initial.classes != classes:
        they, we = (", ".join(names) or "none" for names in (initial.classes, classes))
        words = f"knows the classes {they}, and data set {dataset.manifest.name} has {we}"
    elif model.text and initial.header.encoder != ENCODER:
        words = "was trained with another text encoder"
    if words:
        raise UserError(f"{option} {path} {words}: {alternative}")
    return initial


def _local(option: str, path: str) -> Path:
    if path == "champion" or path.startswith("models:/"):
        raise UserError(
            f"{option} = {path} names a registered model, which is not fetched here: give the path of its "
            "final.safetensors, or run `darkroom train`"
        )
    return Path(path)
