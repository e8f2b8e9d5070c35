"""The section ``training``. Every schedule counts images seen, so it is independent of batch size and resumption."""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, PositiveFloat, StrictBool, StrictInt, model_validator

from diffusion.common.config import MAX_EMA_STD, Config, DeviceName, PlainName, is_unset
from diffusion.common.errors import UserError
from diffusion.common.rules import given, needs, only, unless
from diffusion.data.caption_texts import TagsConfig
from diffusion.families.adapters import AdapterConfig
from diffusion.families.base import BaseFamilyConfig
from diffusion.process.config import NOT_WITH_ADAPTER, ObjectiveConfig
from diffusion.process.samplers import SamplingConfig
from diffusion.process.samplers.consistency import last_level

if TYPE_CHECKING:
    from diffusion.families.header import ModelHeader

EARLIER = "earlier"
"""Folder beside run folders, with a folder for each of their names, for finished runs that were set aside."""
KEEPS_WEIGHTS = "keeps weights"
"""Metadata of fields that cannot change the weights."""
MIN_PRODIGY_RATE = 0.1
"""Minimum of the learning rate with Prodigy, which finds the rate and is multiplied by it."""


TrackerName = Literal["tensorboard", "wandb"]


def earlier_runs(output: Path) -> list[Path]:
    """List the folders of finished runs that were set aside when another run began in the folder ``output``."""
    return [path.parent for path in sorted((output.parent / EARLIER / output.name).glob("*/final.safetensors"))]


def _check_folder(path: Path) -> Path:
    if not path.name or not str(path).isprintable():
        raise ValueError("must name a folder, such as runs/digits")
    return path


def _is_cosine(value: str) -> bool:
    return value == "cosine"


class TrainingConfig(ObjectiveConfig):
    """Data set, duration, optimizer, precision and checkpoints of a training run."""

    model_config = ConfigDict(allow_inf_nan=False)

    dataset: PlainName = "digits"
    """Name of the data set, a folder in data/."""
    output: Annotated[Annotated[Path, AfterValidator(_check_folder)] | None, KEEPS_WEIGHTS] = None
    """Output folder of the run: checkpoints, history.csv, sample grids and finally final.safetensors; null:
    runs/DATASET."""
    log_to: Annotated[tuple[TrackerName, ...] | None, KEEPS_WEIGHTS] = Field(None, exclude_if=is_unset)
    """Trackers that get metrics and sample grids besides history.csv and MLflow: tensorboard, in trackers/tensorboard
    of the run's folder (extra ``tensorboard``); wandb, which the variables WANDB_* configure (extra ``wandb``)."""
    init_from: Annotated[str | None, needs("initial_weights")] = Field(None, exclude_if=is_unset)
    """Initial weights. Null: random. Otherwise a model of the same family: the path of its final.safetensors, a
    registered version (models:/NAME@ALIAS, models:/NAME/NUMBER), or champion. The champion is resolved when data and
    configuration are first trained on; while there is none, weights are random."""
    warm_start: Annotated[
        bool,
        given("training.init_from", "training.warm_start continues training.init_from, and that names nothing: set it"),
        NOT_WITH_ADAPTER,
        unless("training.student"),
    ] = Field(False, exclude_if=is_unset)
    """Whether training continues where that of training.init_from ended: the network keeps the statistics of the data
    (mean, standard deviation, moments of latents) that it was trained with, and raw weights and optimizer moments are
    taken over if the file is a checkpoint. False: from its averaged weights alone, with the statistics of this data."""
    adapter: Annotated[
        AdapterConfig | None,
        needs("adapters"),
        replace(
            given("training.init_from"),
            because="training.adapter adapts the weights of training.init_from, and there are none: name a model there",
            waits_for="model",
        ),
    ] = Field(None, exclude_if=is_unset)
    """Train an adapter on top of training.init_from instead of its weights (extra ``diffusers``, for peft): the model
    is then megabytes, and a reference to the file of training.init_from. Null: all weights."""
    micro_batch: int | None = Field(None, ge=1, exclude_if=is_unset)
    """Most images that a thread or process takes through the network at once: the rest of its part of a batch follows,
    and gradients are added in this order, for batches that do not fit into memory. Null: all of its part. Decides the
    last bits of the weights."""
    images: int | None = Field(None, ge=1)
    """Total number of images to see; alternative to minutes."""
    minutes: float | None = Field(None, gt=0)
    """Training time in minutes: speed is measured once at the start and converted to images. Default 10 if neither is
    given."""
    cpu_threads: int = Field(2, ge=1)
    """CPU threads that each compute a part of a batch, ideally one per free core. The number of threads decides the
    last bits of the weights, the number of cores does not."""
    optimizer: Annotated[
        Literal["muon", "adamw", "adamw_8bit", "prodigy"],
        replace(needs("muon"), values=("muon", "adamw")),
        replace(NOT_WITH_ADAPTER, values=("muon", "adamw")),
    ] = "muon"
    """Optimizer of diffusion models: Muon (arXiv 2510.19376) for the matrices of hidden layers, and AdamW for all other
    weights, or AdamW for all. Other families and adapters are trained with AdamW. Of all: adamw_8bit, whose moments
    take a quarter of the memory (2110.02861), and prodigy, which finds the learning rate (2306.06101), with two moments
    more."""
    learning_rate: float = Field(4e-3, gt=0)
    """Peak learning rate; Muon's updates are scaled so that one rate fits both optimizers. For prodigy the factor of
    the rate that it finds: 1."""
    learning_rate_decay: Literal["cosine", "linear", "constant"] = Field("cosine", exclude_if=_is_cosine)
    """How the learning rate falls to zero by the last image: as half a cosine, in a line, or not at all."""
    warmup_images: int = Field(4_000, ge=0)
    """Images over which the learning rate rises from zero."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Norm to which larger gradients are clipped."""
    max_nonfinite_steps: Annotated[int, KEEPS_WEIGHTS] = Field(20, ge=1)
    """Consecutive steps with a non-finite loss or gradient, each skipped, after which training fails."""
    ema_decay: Annotated[float | None, unless("training.ema_stds")] = Field(None, ge=0, lt=1)
    """Maximum EMA decay, reached after a warm-up; null: 0.999."""
    ema_stds: tuple[PositiveFloat, PositiveFloat] | None = None
    """Null: one exponential average. Two numbers, such as [0.05, 0.1]: two power-function averages with these relative
    standard deviations, whose memory grows in proportion to training time (arXiv 2312.02696). The first is the model;
    evaluation.ema_stds reconstructs other standard deviations after training from snapshots of both."""
    guide: Annotated[float | None, needs("guide"), NOT_WITH_ADAPTER] = Field(0.25, gt=0, lt=1)
    """Share of the training after which the averaged weights are kept in the model's file as its guide, away from which
    sampling.autoguidance leads (arXiv 2406.02507): that file is then twice as large. A training that begins with a
    model that has a guide keeps that one; with one that has none, the new model gets one of its own. Adapters
    (training.adapter), students and models for super-resolution have none. Null: none."""
    condition_dropout: Annotated[float, needs("dropped_conditions")] = Field(0.1, ge=0, lt=1)
    """Conditioning dropout: share of the images for which class and caption are both dropped, for unconditional
    generation. With both class and caption, one of the two is dropped for an equal share again (arXiv 2211.09800)."""
    tags: Annotated[
        TagsConfig | None,
        replace(
            given(
                "model",
                because="training.tags changes captions, and the network has none: set model.text to true, or leave it "
                "out",
            ),
            # Whether a pipeline has captions is known once it is read.
            allows=lambda model: model.text or model.needs_initial_model,
        ),
    ] = Field(None, exclude_if=is_unset)
    """Captions as tags that are shuffled or dropped at each step. Null: captions as they are. Of a caption of several
    lines one is sampled at each step in either case."""
    weights: dict[str, Annotated[float, Field(ge=0.01, le=10_000)]] | None = Field(
        None, min_length=1, max_length=1000, exclude_if=is_unset
    )
    """How often images are seen, by patterns of their names in the source: {"10_cat/*": 10, "5_dog/*": 5}. The first
    that fits counts, without any 1; only ratios matter. Null: all equally often."""
    flip: bool = False
    """Mirror half of the images horizontally, chosen by seed. Wrong for digits and letters, right for most
    photographs."""
    gradient_checkpointing: Annotated[bool, needs("gradient_checkpointing"), KEEPS_WEIGHTS] = False
    """Whether activations are recomputed in the backward pass instead of stored: a third more compute for a fraction of
    the memory. Does not change the weights."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Number format of matrix products; auto: bf16 on GPUs that support it and CPUs that are faster in it
    (AMX, or AMD with AVX512_BF16), else fp32. On a GPU fp32 is TF32."""
    device: Annotated[DeviceName, KEEPS_WEIGHTS] = "auto"
    """Device: cpu, cuda, or auto, a GPU if there is one. Decides the last bits of the weights."""
    compile: Annotated[bool | None, KEEPS_WEIGHTS] = None
    """Whether the network is compiled before the first step; null: on a GPU only. On CPUs compiling was measured
    slower."""
    shard: Annotated[
        StrictBool | StrictInt,
        needs("sharding"),
        NOT_WITH_ADAPTER,
        replace(
            only("training.optimizer", "adamw"),
            because="training.shard gives each process a part of each matrix, and Muon needs whole ones: set "
            "training.optimizer to adamw",
            waits_for="model",
        ),
        KEEPS_WEIGHTS,
    ] = False
    """Whether weights, optimizer moments and averages are sharded over the processes (FSDP2), for networks that do not
    fit into one. True: over all processes. A number: over groups of this many consecutive processes, such as those of a
    machine, and replicated in all groups (hybrid sharding), for clusters: groups exchange gradients alone, once per
    step."""
    checkpoints: Annotated[int, KEEPS_WEIGHTS] = Field(6, ge=1)
    """Number of checkpoints per run, evenly spaced; each comes with held-out losses and a sample grid."""
    keep: Annotated[int, KEEPS_WEIGHTS] = Field(3, ge=1)
    """Number of newest checkpoints kept on disk; evaluation evaluates each of them."""
    keep_best: Annotated[int, needs("comparable_losses"), KEEPS_WEIGHTS] = Field(0, ge=0)
    """Number of further checkpoints kept: those whose averaged weights had the lowest loss on held-out images."""
    keep_every: Annotated[int | None, KEEPS_WEIGHTS] = Field(None, ge=1)
    """Interval, in checkpoints, at which one is kept permanently; null: none."""
    workers: Annotated[int, KEEPS_WEIGHTS] = Field(2, ge=1)
    """Threads that prepare batches while the network computes."""
    prefetch: Annotated[int, KEEPS_WEIGHTS] = Field(4, ge=1)
    """Number of batches prepared ahead of the step."""
    cache_bytes: Annotated[int, KEEPS_WEIGHTS] = Field(2 * 2**30, ge=0)
    """Size limit, in bytes, up to which the decoded images of the whole data set stay in memory."""
    stream_bytes: Annotated[int | None, KEEPS_WEIGHTS] = Field(None, ge=1)
    """Null: shards are read from data/DATASET. A number: shards are fetched from the data set's remote on demand into a
    disk cache of at most this many bytes. Does not change the weights."""
    window: int | None = Field(None, ge=1)
    """Null: images are shuffled among all shards. A number: images are shuffled within windows of this many shards, in
    a new shard order each epoch, so that few shards are in use at a time. For data sets larger than memory, or with
    stream_bytes larger than the cache, which must hold two such windows. Changes the weights."""

    @model_validator(mode="before")
    @classmethod
    def _some_length(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("images") is None and fields.get("minutes") is None:
            return fields | {"minutes": 10.0}
        return fields

    @model_validator(mode="after")
    def _options_fit_each_other(self) -> "TrainingConfig":
        if (self.images is None) == (self.minutes is None):
            raise ValueError("give either training.images or training.minutes, and leave the other out (null)")
        if self.batch_size is not None and self.cpu_threads > self.batch_size:
            raise ValueError(
                f"training.cpu_threads = {self.cpu_threads} parts of {self.batch_size} images: use fewer of them"
            )
        if words := self._micro_batch_conflict():
            raise ValueError(words)
        if self.optimizer == "prodigy" and not MIN_PRODIGY_RATE <= self.learning_rate <= 10:
            raise ValueError(
                f"training.optimizer = prodigy finds the learning rate, and training.learning_rate = "
                f"{self.learning_rate:g} multiplies it: set that to 1"
            )
        if self.shard is not True and self.shard is not False and self.shard < 2:
            raise ValueError(
                f"training.shard = {self.shard} is not a group of processes: use true, false, or the number in a group"
            )
        if self.ema_stds is not None and not 0 < self.ema_stds[0] < self.ema_stds[1] < MAX_EMA_STD:
            raise ValueError(f"training.ema_stds rise from the first to the second, which is below {MAX_EMA_STD}")
        if self.student is not None and (self.init_from is None or self.images is None):
            raise ValueError(
                "training.student learns from the model in training.init_from over training.images: run "
                "`darkroom distill`, which sets all three"
            )
        if self.workers > self.prefetch:
            raise ValueError(
                f"training.workers = {self.workers} have training.prefetch = {self.prefetch} batches to make, so some "
                "would have none: raise training.prefetch, or lower training.workers"
            )
        return self

    @property
    def moments(self) -> float:
        """Number of tensors of a weight's size that AdamW or Prodigy keeps of it."""
        return {"prodigy": 4, "adamw_8bit": 0.5}.get(self.optimizer, 2)

    def _micro_batch_conflict(self) -> str | None:
        """Describe why ``micro_batch`` has no effect; None if it has one, is null, or the batch is not known yet."""
        if self.micro_batch is None or self.batch_size is None or self.micro_batch < self.batch_size:
            return None
        return (
            f"training.micro_batch = {self.micro_batch} splits no batch of {self.batch_size} images: lower it, or "
            "leave it out"
        )

    def with_batch_size(self, model: BaseFamilyConfig, size: int) -> "TrainingConfig":
        """Set ``batch_size`` for images of ``size`` pixels unless it is set.

        The default is doubled until each thread has an image, so that it can be shared by as many processes as before.
        Raises UserError if ``micro_batch`` does not split it.
        """
        if self.batch_size is not None:
            return self
        batch_size = model.default_batch_size(size)
        while batch_size < self.cpu_threads:
            batch_size *= 2
        config = self.model_copy(update={"batch_size": batch_size})
        if words := config._micro_batch_conflict():
            raise UserError(words)
        return config


class DistillationConfig(Config):
    """Distillation of a diffusion model into a student of few evaluations, by `darkroom distill`."""

    teacher: str = "champion"
    """Model to distil: champion, a registered version (models:/NAME@ALIAS, models:/NAME/NUMBER), or with --local the
    path of its final.safetensors. It is guided as it samples; the student then needs no guidance. Where a student
    is named, its teacher is distilled."""
    steps: int = Field(2, ge=1, le=8)
    """Network evaluations in which the student generates an image."""
    images: int = Field(120_000, ge=1)
    """Images to see."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""


def student_training(
    training: TrainingConfig, config: DistillationConfig, sampling: SamplingConfig, teacher: str, header: "ModelHeader"
) -> TrainingConfig:
    """Configure the training of a student of ``teacher``, the file or URI of a model with this ``header``.

    The rest is as in ``training``; the teacher is guided as it samples where ``sampling`` is configured.
    """
    sampling, shape = header.sampling(sampling), header.latents.shape if header.latents else header.square
    names = ("guidance", "guidance_interval") if sampling.guides else ("autoguidance",) if sampling.autoguides else ()
    fields = {
        "init_from": teacher,
        "images": config.images,
        "minutes": None,
        "learning_rate": config.learning_rate,
        # Prodigy would need a rate of 1.
        "optimizer": "muon" if training.optimizer == "prodigy" else training.optimizer,
        "warmup_images": min(training.warmup_images, config.images // 10),
        "student": {
            "steps": config.steps,
            "landing": last_level(math.prod(shape)) if config.steps > 1 else None,
            **{name: getattr(sampling, name) for name in names},
        },
        "guide": None,
        "mask": None,
    }
    return TrainingConfig.model_validate(training.model_dump() | fields)
