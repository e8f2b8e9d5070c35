"""The setup of a training run: everything derived from data set and configuration that is constant during training.

Pretrained models, an autoencoder or initial weights, are identified by the digest of their weights, so that a run does
not depend on where the file is.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.checkpoints import load_model
from diffusion.common.device import resolve_device
from diffusion.common.errors import UserError
from diffusion.common.files import digest_of
from diffusion.common.fingerprint import Fingerprint, fingerprint, resolve_precision
from diffusion.common.random import uniform
from diffusion.data.caption_embeddings import Captions
from diffusion.data.dataset import Dataset
from diffusion.data.loader import Batch
from diffusion.data.manifest import Manifest, read_manifest
from diffusion.data.shards import ShardCache, ShardStore
from diffusion.families import family_of
from diffusion.families.model import Conditioning, Model, ModelHeader, to_float
from diffusion.families.vae import VAEModel
from diffusion.generation.config import UNCONDITIONAL, Conditions, check_conditions
from diffusion.generation.generate import check_sampling_options, conditions_of
from diffusion.generation.super_resolution import GenerationTask, add_conditioning_noise, task_of
from diffusion.models.config import FamilyConfig, LatentSpace, ModelConfig, VAEConfig, classes_of, training_conflict
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
        return task_of(self.model)

    @cached_property
    def classes(self) -> list[str]:
        """Return the classes that the network is conditioned on, possibly none."""
        return classes_of(self.model, self.dataset.manifest.class_histogram)

    @cached_property
    def sigma_data(self) -> float:
        """Measure the standard deviation of the network's data; raises UserError for constant data."""
        if self.autoencoder:
            return 1.0
        if low := self.task.low_resolution:
            # Rows are sorted by content hash, so the first ones are a random sample.
            images = self.dataset.images(self.dataset.rows("train")[:MEASURED])
            sigma_data, why = self.task.sigma_data(images), f"show all that they have at {low}×{low}"
        else:
            sigma_data, why = self.dataset.manifest.sigma_data, "are one flat tone"
        if sigma_data < LEAST_DEVIATION:
            name = self.dataset.manifest.name
            raise UserError(f"the training images of {name} {why}, so there is nothing to learn: ingest others")
        return sigma_data

    def make_network(self, gradient_checkpointing: bool = False) -> nn.Module:
        """Build the network with random weights; ``gradient_checkpointing`` as in TrainingConfig."""
        shape = self.autoencoder.space.shape if self.autoencoder else self.dataset.shape
        network: nn.Module = family_of(self.model).make_network(self.model, shape, len(self.classes))
        if isinstance(network, UNet):
            network.gradient_checkpointing = gradient_checkpointing
        return network

    def conditioning(self, batch: Batch) -> Conditioning:
        """Collect class, caption and small version of the images, as far as the network is conditioned on them."""
        conditioning = self.task.conditioning(batch.images)
        if self.classes:
            conditioning["label"] = self.dataset.classes(batch.rows, self.classes)
        if self.captions is not None:
            conditioning["text"] = self.captions.of(batch.rows)
        return conditioning

    def training_conditioning(self, batch: Batch) -> Conditioning:
        """Collect the conditioning of a training step, with conditioning dropout or noise augmentation."""
        conditioning = self.conditioning(batch)
        if self.task.low_resolution:
            return add_conditioning_noise(conditioning, self.task.max_noise, self.config.seed, batch.indices)
        if not conditioning:
            return conditioning
        u = uniform(self.config.seed, "class", batch.indices)
        return drop_conditioning(conditioning, u, self.config.condition_dropout, len(self.classes))

    def sample_grid_conditions(self) -> Conditions:
        """Return the conditions of a sample grid: captions of held-out images if the model uses captions."""
        if self.captions is None:
            return UNCONDITIONAL
        rows = np.concatenate([self.dataset.rows("held_out"), self.dataset.rows("train")])
        return conditions_of(self.dataset, rows[self.captions.numbers[rows] >= 0][:SAMPLE_GRID], self.classes)

    def network_from(self, tensors: dict[str, Tensor], prefix: str) -> nn.Module:
        """Build a network for inference from copies of the ``tensors`` whose names begin with ``prefix``."""
        with torch.device("meta"):
            network = self.make_network()
        weights = {
            name.removeprefix(prefix): value.detach().clone()
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        network.load_state_dict(weights, assign=True)
        network.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return network

    def model_header(self, images: int) -> ModelHeader:
        """Build the header of a model that has seen ``images``."""
        manifest = self.dataset.manifest
        pixels = isinstance(self.model, ModelConfig) and self.autoencoder is None and self.task.low_resolution is None
        return ModelHeader(
            model=self.model,
            channels=manifest.channels,
            size=manifest.size,
            dataset=manifest.name,
            content_digest=manifest.content_digest,
            sigma_data=self.sigma_data,
            data_mean=tuple(manifest.mean) if pixels else None,
            class_histogram=manifest.class_histogram,
            encoder=ENCODER if self.model.text else None,
            latents=self.autoencoder.space if self.autoencoder else None,
            images=images,
            training=identity_fields(self.config, self.model),
        )

    def header(self, images: int, total: int) -> dict[str, Any]:
        """Build the header of a final model after ``images`` of ``total``."""
        layout = {} if self.config.window is None else {"layout_digest": self.dataset.manifest.layout_digest}
        return layout | {
            "format_version": FORMAT_VERSION,
            "model_header": self.model_header(images).model_dump(mode="json"),
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
        own = fingerprint(self.config.batch_size, self.config.precision, self.config.device)
        return own.model_copy(update={"compile": self.compiled, "ranks": self.ranks.count})


def make_setup(
    dataset: Dataset,
    model: FamilyConfig,
    config: TrainingConfig,
    sampling: SamplingConfig,
    ranks: Ranks,
    embed: Callable[[Dataset, list[str]], Tensor],
) -> TrainingSetup:
    """Check that data set and configuration match, and load captions, autoencoder and initial weights.

    ``sampling`` is how sample grids are generated; ``embed`` computes the embeddings of captions, (captions, 384).
    Raises UserError if an option has no effect or contradicts another, or a file is missing or does not match.
    """
    captions = None
    if model.text:
        texts, numbers = dataset.different_captions()
        if not texts:
            raise UserError(
                f"data set {dataset.folder} has no captions, and model.text conditions the network on them: ingest it "
                "with a column text beside file_name (metadata.csv), or leave model.text out"
            )
        # The main process embeds them for all.
        embeddings = ranks.broadcast_tensors({"embeddings": embed(dataset, texts)} if ranks.is_main else {})
        captions = Captions(embeddings["embeddings"], numbers)
    check_sampling_options(model, sampling)
    autoencoder = None
    if isinstance(model, ModelConfig) and model.autoencoder is not None:
        autoencoder = load_autoencoder(model.autoencoder, dataset, config.window)
        for name, moment in ranks.broadcast_tensors(dict(autoencoder.named_buffers())).items():
            autoencoder.get_buffer(name).copy_(moment)
        model = model.model_copy(update={"autoencoder": f"sha256:{autoencoder.space.digest}"})
    if words := training_conflict(model, config):
        raise UserError(words)
    initial = None
    if config.init_from is not None:
        classes = classes_of(model, dataset.manifest.class_histogram)
        initial = load_initial_weights(config.init_from, model, dataset, classes)
        if config.student is not None and initial.header.student_steps is not None:
            raise UserError(f"{config.init_from} is a student itself: name its teacher with distillation.teacher")
        config = config.model_copy(update={"init_from": weights_digest(initial)})
    setup = TrainingSetup(dataset, model, config, ranks, captions, autoencoder, initial)
    check_conditions(setup.classes, model.text, sampling, setup.sample_grid_conditions())
    return setup


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
        sizes = sorted((shard.bytes for shard in manifest.shards), reverse=True)
        if (needed := sum(sizes if window is None else sizes[: 2 * window])) > config.stream_bytes:
            fitting = sum(int(total) <= config.stream_bytes for total in np.cumsum(sizes)) // 2
            less = f", or set training.window to {fitting} or less" if fitting else ""
            what = f"two windows of training.window = {window}" if window else f"all {len(sizes)}"
            raise UserError(
                f"{what} shards of data set {manifest.name} have up to {needed} bytes and the cache holds "
                f"{config.stream_bytes}: raise training.stream_bytes to {needed}{less}"
            )
        shards = ShardCache(data.parent / ".shards", store, config.stream_bytes)
    with closing(Dataset.open(data, shards, config.cache_bytes)) as dataset:
        if not len(dataset.rows("train")):
            raise UserError(f"data set {data} has no training images: ingest more, or lower ingest.held_out")
        yield dataset


def drop_conditioning(conditioning: Conditioning, u: Tensor, share: float, no_class: int) -> Conditioning:
    """Drop conditioning where the random numbers ``u`` (N,), in [0, 1), are below ``share`` (arXiv 2207.12598).

    With both class and caption, one of them is dropped for an equal share again, so that the model can be conditioned
    on either alone (arXiv 2211.09800, section 3.2.1).
    """
    alone = share / 2 if len(conditioning) == 2 else 0
    without_label = (u < share) | ((u >= share + alone) & (u < share + 2 * alone))
    left = {}
    if "label" in conditioning:
        left["label"] = conditioning["label"].masked_fill(without_label, no_class)
    if "text" in conditioning:
        left["text"] = conditioning["text"].masked_fill((u < share + alone)[:, None], 0)
    return left


def student_training(
    training: TrainingConfig, config: DistillationConfig, sampling: SamplingConfig, teacher: str, header: ModelHeader
) -> TrainingConfig:
    """Configure the training of a student of ``teacher``, the file or URI of a model with this ``header``.

    The rest is as in ``training``; the teacher is guided as it samples where ``sampling`` is configured.
    """
    sampling = header.sampling(sampling)
    guidance = {"guidance": sampling.guidance, "guidance_interval": sampling.guidance_interval}
    own = {
        "init_from": teacher,
        "images": config.images,
        "minutes": None,
        "learning_rate": config.learning_rate,
        "warmup_images": min(training.warmup_images, config.images // 10),
        "student": {"steps": config.steps} | (guidance if sampling.guides else {}),
    }
    return TrainingConfig.model_validate(training.model_dump() | own)


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
    if config.window is None:
        harmless.add("window")
    harmless.update(model.ineffective)
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
            "model": model.model_dump(mode="json"),
            "training": identity_fields(config, model),
        }
        | ({"encoder": ENCODER.digest} if model.text else {})
    )


def with_digests(model: FamilyConfig, training: TrainingConfig) -> tuple[FamilyConfig, TrainingConfig]:
    """Replace the paths of autoencoder and initial weights by their digests; raises UserError for a missing file."""
    if isinstance(model, ModelConfig) and model.autoencoder is not None:
        digest = weights_digest(_load("model.autoencoder", model.autoencoder))
        model = model.model_copy(update={"autoencoder": digest})
    if training.init_from is not None:
        digest = weights_digest(_load("training.init_from", training.init_from))
        training = training.model_copy(update={"init_from": digest})
    return model, training


def load_autoencoder(path: str, dataset: Dataset, window: int | None) -> Latents:
    """Load the autoencoder in the file ``path`` and measure its latents' moments on training images of ``dataset``.

    Uses the first images by key; with a ``window``, images from as few shards as possible. Raises UserError if the file
    is not an autoencoder, has other channels than the images, or its factor does not divide the image size.
    """
    model = _load("model.autoencoder", path)
    if not isinstance(model, VAEModel):
        raise UserError(
            f"model.autoencoder {path} is a model of the family {model.header.model.family}, and no autoencoder: train "
            "one with model.family=vae"
        )
    config, (channels, _, size) = model.header.model, dataset.shape
    assert isinstance(config, VAEConfig)
    if model.header.channels != channels:
        raise UserError(
            f"model.autoencoder {path} was trained on images of {model.header.channels} channels and data set "
            f"{dataset.manifest.name} has {channels}: train an autoencoder on images like these"
        )
    inner = latent_shape(config, size)
    space = LatentSpace(
        autoencoder=config, digest=weights_digest(model).removeprefix("sha256:"), channels=inner[0], size=inner[1]
    )
    latents = Latents(space, dataset.shape)
    latents.network.load_state_dict(model.network.autoencoder.state_dict())
    latents.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    rows = dataset.rows("train")
    if window is not None:
        rows = rows[np.argsort(dataset.shards(rows), kind="stable")]
    images = dataset.images(rows[:MEASURED])
    with torch.inference_mode():
        means = [latents.network.encode(to_float(batch)).double() for batch in torch.split(images, ENCODED)]
        std, mean = torch.std_mean(torch.cat(means).transpose(0, 1).flatten(1), dim=1, correction=0)
        # A constant channel keeps its scale instead of being amplified.
        std = torch.where(std > 1e-4 * std.max(), std, 1.0)
        latents.std.copy_(std.view(1, -1, 1, 1))
        latents.mean.copy_(mean.view(1, -1, 1, 1))
    return latents


def load_initial_weights(path: str, model: FamilyConfig, dataset: Dataset, classes: list[str]) -> Model:
    """Load the model in the file ``path``, whose averaged weights initialize a network of ``model`` for ``dataset``.

    Optimizer, averages and learning rate start from scratch. Raises UserError if the file does not exist or fit.
    """
    given = _load("training.init_from", path)
    theirs, ours = given.header.model.model_dump(), model.model_dump()
    different = next((name for name in theirs | ours if theirs.get(name) != ours.get(name)), None)
    words = None
    if given.header.model.family != model.family:
        words = f"is a model of the family {given.header.model.family}, and this is {model.family}"
    elif different:
        words = f"has model.{different} = {theirs.get(different)}, and this is {ours.get(different)}"
    elif given.shape != dataset.shape:
        they, we = ("×".join(map(str, shape)) for shape in (given.shape, dataset.shape))
        words = f"generates images of {they} (channels × height × width), and data set {dataset.manifest.name} has {we}"
    elif given.classes != classes:
        they, we = (", ".join(names) or "none" for names in (given.classes, classes))
        words = f"knows the classes {they}, and data set {dataset.manifest.name} has {we}"
    elif model.text and given.header.encoder != ENCODER:
        words = "was trained with another text encoder"
    if words:
        raise UserError(
            f"training.init_from {path} {words}: begin with a model of the same kind, or at random "
            "(training.init_from=null)"
        )
    return given


def weights_digest(model: Model) -> str:
    """Compute ``sha256:`` and the SHA-256 over configuration, names and weights, equal for all files of a model."""
    digest = hashlib.sha256(model.header.model.model_dump_json().encode())
    for name, value in sorted(model.network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _load(option: str, path: str) -> Model:
    if path == "champion" or path.startswith("models:/"):
        raise UserError(
            f"{option} = {path} names a registered model, which is not fetched here: give the path of its "
            "final.safetensors, or run `darkroom train`"
        )
    return load_model(Path(path))
