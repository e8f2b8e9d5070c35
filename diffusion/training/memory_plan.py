"""How much memory a training takes, and what of it fits into which GPU, computed from configurations alone."""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from humanize import naturalsize

from diffusion.checkpoints import outline_model
from diffusion.common.config import Config
from diffusion.common.device import free_memory
from diffusion.common.errors import UserError
from diffusion.common.escaping import pluralize
from diffusion.common.fingerprint import resolve_precision
from diffusion.data.caption_texts import list_texts
from diffusion.data.dataset import Dataset
from diffusion.data.latents import images_at_once
from diffusion.data.shards import ShardStore
from diffusion.families.adapters import AdapterConfig, LoRAConfig
from diffusion.families.config import FamilyConfig, shape_conflict, training_conflict
from diffusion.families.header import Base
from diffusion.training.config import TrainingConfig
from diffusion.training.data import open_dataset
from diffusion.training.distributed import SINGLE_PROCESS
from diffusion.training.logging import VALIDATION_IMAGES
from diffusion.training.setup import TrainingSetup
from diffusion.training.starting_models import load_initial, make_latents
from diffusion.training.step_memory import StepMemory, measure_step, muon_size
from diffusion.training.trainer import thread_count

GIB = 2**30
GPU_SIZES = (8, 12, 16, 24, 48, 80)
"""Memory of common GPUs, in GiB."""
CUDA_CONTEXT = 768 * 2**20
"""Bytes of a GPU for CUDA's context, about 500 MiB, and the workspaces of cuBLAS and cuDNN."""
FRAGMENTATION = 0.05
"""Share of all other memory for what torch's allocator holds and cannot use."""

ROWS = {
    "weights": "weights",
    "encoders": "encoders, in training",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "averages": "averages",
    "activations": "activations of an image",
    "validation": "held-out losses",
    "encoding": "encoding before training",
    "allowance": "CUDA",
    "peak": "at most, with 1 image",
}
"""Titles of the rows of a table, by the fields of MemoryPlan."""


class MemoryPlan(Config):
    """Bytes of memory that a training takes in one process, by what takes them; not all is there at the same time."""

    weights: int
    """Weights, trained and frozen ones."""
    encoders: int
    """Text encoders and autoencoder that stay in memory."""
    gradients: int
    """Gradients, of each thread and their sum."""
    optimizer: int
    """Moments."""
    averages: int
    """Averages of the weights, and the guide's."""
    captions: int
    """Encoded captions that the main of several processes has sent, in the CPU's memory; it maps them itself."""
    activations: int
    """What the forward pass of ``images_at_once`` takes, and mostly leaves for the backward pass."""
    images_at_once: int
    """Images that are in the network at once, of all threads."""
    step: int
    """Peak of a step beyond what is there between steps: activations, gradients and temporary tensors."""
    muon: int
    """Temporary tensors of Muon, a part of ``step``; 0: the optimizer is AdamW."""
    written: int
    """Copy of a checkpoint, which is written during the next steps; 0 on a GPU, whose copy is in the CPU's memory."""
    validation: int
    """Copies of networks and peak of the losses of held-out images, before a checkpoint is written."""
    encoding: int
    """Pipeline and images whose latents are encoded before the first step; 0: there are none."""
    allowance: int
    """CUDA's context, workspaces, and what fragments of memory cannot be used for; 0 on a CPU."""
    peak: int
    """Bytes at most."""

    @property
    def summary(self) -> str:
        """Describe the plan in a line."""
        peak, step, copy = (naturalsize(size, binary=True) for size in (self.peak, self.step, self.written))
        muon = f", with {naturalsize(self.muon, binary=True)} for Muon" if self.muon else ""
        copied = f", {copy} for the copy of a checkpoint while it is written" if self.written else ""
        return f"{peak} at most: {step} for a step with {pluralize(self.images_at_once, 'image')} at once{muon}{copied}"


def plan_memory(setup: TrainingSetup, memory: StepMemory, images: int, is_gpu: bool) -> MemoryPlan:
    """Plan the memory of a training with up to ``images`` at once in a thread, of its process or on its GPU."""
    config, threads = setup.config, 1 if is_gpu else thread_count(setup.config, setup.ranks)
    part = math.ceil(config.images_per_step / setup.ranks.count / threads)
    images, has_muon = min(part, images), config.optimizer == "muon" and memory.matrices
    # The sum of the gradients of earlier images.
    step = threads * (memory.step(images) + (memory.trained if images < part else 0))
    muon = muon_size(memory.matrices, threads) if has_muon else 0
    captions = 0
    if setup.model.text and not is_gpu and setup.ranks.count > 1:
        captions = len(list_texts(setup.dataset.different_captions()[0], config.tags, config.seed).texts)
    # A CPU keeps encoders that do nothing in a step.
    idle = 0 if is_gpu else max(0, memory.text_encoders + memory.autoencoder - memory.encoders)
    state = memory.checkpoint + memory.frozen + memory.encoders + captions * memory.prompt
    state += 0 if is_gpu else memory.initial
    # Networks with raw and averaged weights, and the guide; with a base, a GPU holds one of them at a time beside the
    # autoencoder, and they share what an adapter does not change, which on a CPU may be up to a half.
    copies = memory.trained * (2 + setup.has_guide)
    if setup.base is not None and is_gpu:
        copies = memory.network
        if memory.text_encoders or memory.autoencoder:
            copies = memory.autoencoder + (memory.trained if config.adapter is None else memory.adapted)
    elif setup.base is not None and config.adapter is not None:
        copies = memory.frozen
    held_out = min(VALIDATION_IMAGES, max(len(setup.dataset.rows(split)) for split in ("train", "held_out")))
    at_once = min(held_out, config.micro_batch or config.images_per_step)
    validation = copies + min(threads, 4) * memory.validation(at_once)
    largest = max(setup.dataset.shapes, key=math.prod)
    encoding = memory.encoding(images_at_once(largest)) if memory.encodings else 0
    if is_gpu:  # whose encoders take turns
        encoding = max(memory.text_encoders, encoding + memory.autoencoder)
    elif encoding:
        encoding += memory.network
    written = 0 if is_gpu else memory.checkpoint
    peak = max(state + max(step + written, muon + written, validation), encoding)
    allowance = CUDA_CONTEXT + int(FRAGMENTATION * peak) if is_gpu else 0
    return MemoryPlan(
        weights=memory.trained + memory.frozen + (0 if is_gpu else memory.initial - idle),
        encoders=memory.encoders + idle,
        gradients=memory.trained * (1 + threads),
        optimizer=memory.optimizer,
        averages=memory.averages,
        captions=captions * memory.prompt,
        activations=threads * memory.activations(images),
        images_at_once=threads * images,
        step=max(step, muon),
        muon=muon,
        written=written,
        validation=validation,
        encoding=encoding,
        allowance=allowance,
        peak=peak + allowance,
    )


def plan_here(setup: TrainingSetup, measured: Mapping[str, StepMemory] | None = None) -> MemoryPlan:
    """Plan the memory of a training on the device of ``setup``; ``measured`` are known steps by their configuration."""
    config, is_gpu = setup.config, setup.device.type != "cpu"
    setup = replace(
        setup, config=config.model_copy(update={"precision": resolve_precision(config.precision, setup.device)})
    )
    memory = (measured or {}).get(setup.config.model_dump_json()) or measure_step(setup)
    return plan_memory(setup, memory, config.micro_batch or config.images_per_step, is_gpu)


class GPUPlan(Config):
    """What of a training fits into GPUs with one kind of training."""

    adapter: AdapterConfig | None
    """The adapter that is trained; None: all weights are."""
    gradient_checkpointing: bool
    image: MemoryPlan
    """Memory with one image at once."""
    images: dict[int, int]
    """Images at once, at most, by the GPU's memory in GiB; 0: not even one."""

    @property
    def name(self) -> str:
        """Return the kind of training in words."""
        kind = "all weights"
        if self.adapter is not None:
            kind = type(self.adapter).__name__.removesuffix("Config")
            kind += f" {rank}" if (rank := getattr(self.adapter, "rank", None)) else ""
        return f"{kind}, checkpointing" if self.gradient_checkpointing else kind


class MemoryPlans(Config):
    """The memory of a training here, and on a GPU for several kinds of training, with what fits into which GPU."""

    here: MemoryPlan
    free: int
    """Bytes that are free here."""
    precision: str
    """Number format of matrix products on a GPU."""
    batch_size: int
    gpus: list[GPUPlan]

    def lines(self) -> list[str]:
        """Format the plans for GPUs as a table with a column for each kind of training."""
        rows = [["", *(plan.name for plan in self.gpus)]]
        for name, title in ROWS.items():
            if any(sizes := [getattr(plan.image, name) for plan in self.gpus]):
                rows.append([title, *(f"{size / GIB:.2f}" for size in sizes)])
        for size in GPU_SIZES:
            counts = (plan.images[size] for plan in self.gpus)
            rows.append([f"images on {size} GB", *(f"{count}" if count else "–" for count in counts)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        title = (
            f"memory of a GPU in GiB, with {self.precision}; then how many images of a batch of {self.batch_size} fit"
        )
        return [f"{title} at once (training.micro_batch)", *table]


def estimate_memory(
    data: Path, model: FamilyConfig, config: TrainingConfig, store: ShardStore | None = None
) -> MemoryPlans:
    """Compute what memory ``train`` with the same arguments takes here and on a GPU, and what fits into which.

    Reads no weights, measures and writes nothing. Raises UserError as ``train`` for what it reads.
    """
    with open_dataset(data, config, store) as dataset:
        return make_plans(outline_setup(dataset, model, config))


def make_plans(setup: TrainingSetup) -> MemoryPlans:
    """Plan a training here, and on one GPU as configured, with and without checkpointing and an adapter.

    On GPUs precision is bf16 unless the configuration says fp32.
    """
    config, gpus, measured = setup.config, [], {}
    precision: Literal["bf16", "fp32"] = "fp32" if config.precision == "fp32" else "bf16"
    kinds: list[AdapterConfig | None] = [config.adapter]
    has_adapters = "adapters" in setup.model.abilities and find_spec("peft") is not None
    if setup.initial is not None and has_adapters and config.student is None:
        kinds = [config.adapter or LoRAConfig(), None]
    for adapter in kinds:
        for recomputes in (False, True) if "gradient_checkpointing" in setup.model.abilities else (False,):
            changes = {
                "adapter": adapter,
                "prior": adapter and config.prior,
                "gradient_checkpointing": recomputes,
                "precision": precision,
            }
            has_base = setup.initial is not None and (adapter is not None or setup.initial.has_frozen_parts)
            base = setup.base or Base(sha256="0" * 64) if has_base else None
            variant = replace(setup, config=config.model_copy(update=changes), base=base)
            measured[variant.config.model_dump_json()] = memory = measure_step(variant)
            gpus.append(_fit_gpus(variant, memory))
    here, batch_size = plan_here(setup, measured), config.images_per_step
    return MemoryPlans(here=here, free=free_memory(setup.device), precision=precision, batch_size=batch_size, gpus=gpus)


def _fit_gpus(setup: TrainingSetup, memory: StepMemory) -> GPUPlan:
    config = setup.config

    def peak(images: int) -> int:
        return plan_memory(setup, memory, images, is_gpu=True).peak

    counts = range(1, config.images_per_step + 1)
    return GPUPlan(
        adapter=config.adapter,
        gradient_checkpointing=config.gradient_checkpointing,
        image=plan_memory(setup, memory, 1, is_gpu=True),
        images={size: bisect_right(counts, size * GIB, key=peak) for size in GPU_SIZES},
    )


def outline_setup(dataset: Dataset, model: FamilyConfig, config: TrainingConfig) -> TrainingSetup:
    """Set a training up without reading weights, which are on the meta device; encodes no captions and images.

    Raises UserError for a file that is missing or does not match, as ``make_setup`` does.
    """
    size, autoencoder, base = dataset.manifest.size, None, None
    if words := training_conflict(model, config) or shape_conflict(model, size, dataset.shapes):
        raise UserError(words)
    config = config.with_batch_size(model, size)
    if model.autoencoder is not None:
        with torch.device("meta"):
            autoencoder = make_latents(model.autoencoder, dataset.manifest, outline_model)
        model = model.model_copy(update={"autoencoder": f"sha256:{autoencoder.space.digest}"})
    resolved = model.resolve(autoencoder.space.size if autoencoder else size)
    if (initial := load_initial(resolved, config, dataset, outline_model)) is not None:
        if config.adapter is not None or initial.has_frozen_parts:
            base = Base(sha256="0" * 64)
        model = initial.config if initial.has_frozen_parts else model
    return TrainingSetup(dataset, model, config, SINGLE_PROCESS, None, autoencoder, initial, base)
