"""The section ``training``. Every schedule counts images seen, so batch size and resumption change none."""

from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, PositiveFloat, model_validator

from diffusion.common.config import LARGEST_EMA_STD, DeviceName, unset
from diffusion.process.objective_config import ObjectiveConfig


class TrainingConfig(ObjectiveConfig):
    """How long, how fast, on what, and what is kept."""

    model_config = ConfigDict(allow_inf_nan=False)

    dataset: str = "digits"
    """Name of the data set, a folder in data/."""
    output: Path | None = None
    """The run's folder: checkpoints, history.csv, sample grids, at the end final.safetensors; null: runs/DATASET."""
    init_from: str | None = Field(None, exclude_if=unset)
    """Initial weights: null, random; or those of a model of the same kind, the path of its final.safetensors, a
    registered one (models:/NAME@ALIAS, models:/NAME/NUMBER), or champion, the registered model's champion, as it is
    when data and configuration are first trained on; while there is none, at random."""
    images: int | None = Field(None, ge=1)
    """How many images to see in all; or give minutes."""
    minutes: float | None = Field(None, gt=0)
    """How long to train: measured once at the start, turned into images, and never measured again. Ten, if neither is
    given."""
    cpu_threads: int = Field(2, ge=1)
    """Threads that each compute a part of a batch on a core of their own: as many as there are cores to spare.
    Decides the last bits of the weights, while the number of cores does not."""
    learning_rate: float = Field(4e-3, gt=0)
    """Peak learning rate of AdamW."""
    warmup_images: int = Field(4_000, ge=0)
    """Images over which the learning rate rises from zero; it then falls to zero by a cosine."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients of a larger norm are clipped to it."""
    max_nonfinite_steps: int = Field(20, ge=1)
    """Steps in a row without a finite loss and gradient, each of them left out, after which training gives up."""
    ema_decay: float | None = Field(None, ge=0, lt=1)
    """Largest decay of the averaged weights, reached after a warm-up; null: 0.999."""
    ema_stds: tuple[PositiveFloat, PositiveFloat] | None = None
    """Null: one exponential average. Two numbers, such as [0.05, 0.1]: two power-function averages with these relative
    standard deviations, which forget in proportion to how long training has gone on (arXiv 2312.02696). The first is
    the model; from snapshots of both, evaluation.ema_stds makes averages of other standard deviations after the end."""
    condition_dropout: float = Field(0.1, ge=0, lt=1)
    """Conditioning dropout: share of the images for which class and caption are both dropped, so that the network can
    be used without; with class and caption both, one of them is dropped for as many again (arXiv 2211.09800)."""
    flip: bool = False
    """Mirror every second image, chosen by seed. Wrong for digits and letters, right for most photographs."""
    gradient_checkpointing: bool = False
    """Whether inner values are computed again in the backward pass instead of kept: a third more work, and a fraction
    of the memory. Changes no weights."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Number format of matrix products; auto: bf16 where the device has it. On a GPU fp32 is TF32."""
    device: DeviceName = "auto"
    """What computes: cpu, cuda, or auto, a GPU where there is one. Decides the last bits of the weights."""
    compile: bool | None = None
    """Whether the network is compiled before the first step; null: on a GPU. On processors it was measured slower."""
    shard: bool = False
    """Whether each of several processes keeps only a share of weights, moments and averages (FSDP2), for networks that
    do not fit into one."""
    checkpoints: int = Field(6, ge=1)
    """How many checkpoints a run writes, evenly spaced; each comes with held-out losses and a sample grid."""
    keep: int = Field(3, ge=1)
    """How many of them stay on disk, the newest; evaluation judges each that is there."""
    keep_best: int = Field(0, ge=0)
    """How many more stay: those whose averaged weights had the lowest loss on held-out images."""
    keep_every: int | None = Field(None, ge=1)
    """Every so many checkpoints one stays for good; null: none."""
    workers: int = Field(2, ge=1)
    """Threads that make batches ready while the network computes."""
    prefetch: int = Field(4, ge=1)
    """How many batches they make ready ahead of the step."""
    cache_bytes: int = Field(2 * 2**30, ge=0)
    """Decoded images stay in memory if those of the whole set take at most this many bytes."""
    stream_bytes: int | None = Field(None, ge=1)
    """Null: the shards lie in data/DATASET. A number: they are fetched from the data set's remote as they are needed,
    into a cache on disk of at most this many bytes. Changes no weights."""
    window: int | None = Field(None, ge=1)
    """Null: images are mixed among all shards. A number: among as many shards as this at a time, in a fresh order of
    the shards each epoch, so that few shards are in use at once: for sets larger than memory, or with stream_bytes
    larger than the cache, which must hold two such windows. Changes the weights."""

    @model_validator(mode="before")
    @classmethod
    def _some_length(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("images") is None and given.get("minutes") is None:
            return given | {"minutes": 10.0}
        return given

    @model_validator(mode="after")
    def _one_length(self) -> "TrainingConfig":
        if (self.images is None) == (self.minutes is None):
            raise ValueError("give either training.images or training.minutes, and leave the other out (null)")
        if self.cpu_threads > self.batch_size:
            raise ValueError(
                f"training.cpu_threads = {self.cpu_threads} parts of {self.batch_size} images: use fewer of them"
            )
        return self

    @model_validator(mode="after")
    def _has_an_effect(self) -> "TrainingConfig":
        if self.ema_stds is not None and self.ema_decay is not None:
            raise ValueError("training.ema_decay means nothing to averages with training.ema_stds: leave one out")
        if self.ema_stds is not None and not 0 < self.ema_stds[0] < self.ema_stds[1] < LARGEST_EMA_STD:
            raise ValueError(f"training.ema_stds rise from the first to the second, which is below {LARGEST_EMA_STD}")
        return self

    @model_validator(mode="after")
    def _loading(self) -> "TrainingConfig":
        if self.workers > self.prefetch:
            raise ValueError(
                f"training.workers = {self.workers} have training.prefetch = {self.prefetch} batches to make, so some "
                "would have none: raise training.prefetch, or lower training.workers"
            )
        return self
