"""The training state, and the loop: batch, noise, forward, loss, backward, clip, step, EMA, log, checkpoint."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from diffusion.checkpoints import AUTOENCODER, GUIDE
from diffusion.common.device import CopyToCPU, peak_memory, resolve_device
from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.fingerprint import autocast
from diffusion.data.loader import Batch, Loader, make_order
from diffusion.families.model import OptimizerStep, TrainingBatch, TrainingObjective, use_channels_last
from diffusion.training.adamw_8bit import AdamW8bit
from diffusion.training.checkpointing import write_together
from diffusion.training.config import TrainingConfig
from diffusion.training.distributed import (
    GradientReducer,
    Ranks,
    full_tensor,
    local_part,
    make_mesh,
    shard_like,
    shard_module,
    sum_over_replicas,
)
from diffusion.training.ema import EMA, PREFIXES, exponential_decay, power_decay
from diffusion.training.logging import TrainingLog
from diffusion.training.muon import Muon
from diffusion.training.prodigy import Prodigy
from diffusion.training.setup import COUNTS, FINGERPRINT, TrainingSetup

LOGS_PER_CHECKPOINT = 20
FEWER_CHECKPOINTS = "fewer_checkpoints"
"""Name of ``Trainer.checkpoints`` in the header of a checkpoint, if there are fewer than configured."""
WINDOW = "window"
"""Name of ``Trainer.window`` in the header of a checkpoint that was written at a signal."""


class NotFiniteError(DarkroomError):
    """Too many consecutive steps without a finite loss and gradient; ``batch`` is the last one."""

    def __init__(self, message: str, batch: dict[str, Tensor]) -> None:
        super().__init__(message)
        self.batch = batch


class TrainingState:
    """Weights, averages, optimizer moments and counts; random numbers are functions of ``images`` and need no state."""

    def __init__(
        self,
        network: nn.Module,
        objective: TrainingObjective,
        config: TrainingConfig,
        device: torch.device,
        frozen: dict[str, Tensor],
        mesh: DeviceMesh | None,
        has_guide: bool = False,
    ) -> None:
        self.network = network
        self.frozen = {AUTOENCODER + name: value for name, value in frozen.items()}
        """Tensors of the model's autoencoder, which training does not change."""
        self.steps = objective.optimizer_steps(network)
        for module in [module for step in self.steps for module in step.modules.values()]:
            if mesh is not None:
                shard_module(module, mesh)
            module.to(device)
        self.optimizers = [make_optimizers(step, config, objective.betas) for step in self.steps]
        """Optimizers of each step, by the prefix of their moments' names in checkpoints."""
        decays = [exponential_decay(0.999 if config.ema_decay is None else config.ema_decay)]
        if config.ema_stds is not None:
            decays = [power_decay(std) for std in config.ema_stds]
        self.averages = [EMA(network, decay) for decay in decays]
        """Averages of the network's weights; the first is the model."""
        self.guide: dict[str, Tensor] = {}
        """Weights of the model's guide: the first average's until ``update_guide`` is no longer called."""
        if has_guide:
            self.guide = {name: value.clone() for name, value in self.averages[0].averages.items()}
        self.images = self.skipped = self.skipped_in_a_row = 0
        """Images seen, and optimizer steps skipped because of a non-finite loss or gradient: in all, most recently."""

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors, named by module or optimizer."""
        tensors = self._weights()
        for prefix, optimizer in self._named_optimizers():
            for index, moments in optimizer.state_dict()["state"].items():
                tensors |= {f"{prefix}{index}.{name}": value for name, value in moments.items()}
        return tensors

    @torch.no_grad()
    def load_guide(self, weights: Mapping[str, Tensor]) -> None:
        """Set the guide to ``weights``, or to this process' shards of them."""
        for name, value in self.guide.items():
            value.copy_(shard_like(weights[name], value))

    @torch.no_grad()
    def update_guide(self) -> None:
        """Set the guide to the first average."""
        averages = self.averages[0].averages
        pairs = [(local_part(value), local_part(averages[name])) for name, value in self.guide.items()]
        torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])

    def _named_optimizers(self) -> list[tuple[str, torch.optim.Optimizer]]:
        return [item for optimizers in self.optimizers for item in optimizers.items()]

    def _weights(self) -> dict[str, Tensor]:
        weights = self.frozen | {GUIDE + name: value for name, value in self.guide.items()}
        for prefix, average in zip(PREFIXES, self.averages, strict=False):
            weights |= {prefix + name: value for name, value in average.averages.items()}
        return weights | self._raw_weights()

    def _raw_weights(self) -> dict[str, Tensor]:
        modules = {prefix: module for step in self.steps for prefix, module in step.modules.items()}
        return {
            f"{prefix}.{name}": value
            for prefix, module in modules.items()
            for name, value in module.state_dict().items()
        }

    def counts(self) -> dict[str, int]:
        """Return the counts for the header of a checkpoint."""
        return {"images": self.images, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], counts: dict[str, int]) -> None:
        """Restore the state from ``tensors`` and ``counts``, or this process' shard of it."""
        for name, value in self._weights().items():
            # In place: network and optimizer share these tensors.
            value.copy_(shard_like(tensors[name], value))
        self._load_moments(tensors)
        self.images, self.skipped = counts["images"], counts["skipped"]
        self.skipped_in_a_row = counts["skipped_in_a_row"]

    @torch.no_grad()
    def take_over(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from raw weights and optimizer moments of another training of the same network and optimizer."""
        weights = self._raw_weights()
        if missing := sorted(weights.keys() - tensors.keys()):
            raise UserError(f"training.init_from has no {missing[0]} in its training state: name another checkpoint")
        for name, value in weights.items():
            value.copy_(shard_like(tensors[name], value))
        self._load_moments(tensors)

    def _load_moments(self, tensors: Mapping[str, Tensor]) -> None:
        for prefix, optimizer in self._named_optimizers():
            parameters, moments = optimizer.param_groups[0]["params"], dict[int, dict[str, Tensor]]()
            for name in tensors:
                if name.startswith(prefix):
                    index, moment = name.removeprefix(prefix).split(".", 1)
                    value = tensors[name]
                    if value.ndim and value.is_floating_point() and value.shape == parameters[int(index)].shape:
                        # Fused AdamW walks parameter and moments in step through memory: their strides must agree.
                        like = parameters[int(index)]
                        value = torch.empty_like(like).copy_(shard_like(value, like))
                    moments.setdefault(int(index), {})[moment] = value
            groups: Any = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": moments, "param_groups": groups})


class PendingStep(NamedTuple):
    """An optimizer step in flight, whose outcome can be read without waiting for later steps."""

    images: int
    batch: Batch
    t: Tensor | None
    finite: CopyToCPU
    """Whether loss and gradient are finite."""


class Trainer:
    """Trainer of one network, of which each process has one; on a CPU ``threads`` compute the parts of a batch.

    ``output`` is the folder of the run, where processes that share a network write its checkpoints.
    """

    def __init__(self, setup: TrainingSetup, threads: Executor, output: Path | None = None) -> None:
        config, device = setup.config, setup.device
        self.output = output
        with torch.random.fork_rng(devices=[]):
            # Initial weights are a function of the seed.
            torch.manual_seed(config.seed)
            network = setup.make_network(config.gradient_checkpointing)
            self.objective = setup.make_objective()
        use_channels_last(network)
        mesh = make_mesh(device, setup.shard) if setup.shard > 1 else None
        frozen = setup.autoencoder.to(device).state_dict() if setup.autoencoder else {}
        if setup.base is not None:
            frozen = {}
        state = TrainingState(network, self.objective, config, device, frozen, mesh, setup.has_guide)
        if setup.given_guide is not None:
            state.load_guide(dict(setup.given_guide[0].named_parameters()))
        if setup.state_file is not None:
            state.take_over(load_file(setup.state_file))
        self.setup, self.config, self.state, self.threads, self.device = setup, config, state, threads, device
        self.reducers: list[GradientReducer | None] = [None for _ in state.steps]
        """Sums of the gradients of each step over the processes; None: there is one, or the network is sharded."""
        if setup.ranks.count > 1 and setup.shard == 1:
            parts = thread_count(config, setup.ranks)
            self.reducers = [GradientReducer(step.parameters, parts) for step in state.steps]
        self.total = 0
        """Total number of images to see, a whole number of batches."""
        if setup.compiled:
            # A program per shape of the images.
            dynamo = torch._dynamo.config
            dynamo.recompile_limit = max(dynamo.recompile_limit, 2 * len(setup.dataset.shapes))
            network.compile(dynamic=False)
        self.loader = Loader(
            setup.dataset,
            setup.dataset.rows("train"),
            make_order(setup.dataset, config.seed, config.images_per_step, config.window, config.weights),
            config.images_per_step,
            rank=setup.ranks.rank,
            ranks=setup.ranks.count,
            flip_seed=config.seed if config.flip else None,
            prefetch=config.prefetch,
            workers=config.workers,
            latents=setup.latents,
            masks=config.mask is not None,
        )
        self.checkpoints = self.config.checkpoints
        """Number of checkpoints: fewer than configured on a machine that is too slow for them."""
        self.window: list[Tensor] = []
        """Loss and gradient norm, (2,), of each step since the last ones were logged."""
        self.pending: deque[PendingStep] = deque()
        self.lag = 0 if self.device.type == "cpu" else 1
        """Steps after which a step is checked for finiteness: checking at once would stall a GPU."""

    def train(self, log: TrainingLog | None, stop: Callable[[], bool], is_unlogged: bool = False) -> bool:
        """Train until ``total`` images are seen or ``stop`` is true in any process; returns whether all were seen.

        Only the main process has a ``log``. Once ``stop`` is true, the current step ends, of several processes also the
        next one, and a checkpoint is written without the validation that belongs to a regular one. ``is_unlogged`` says
        that the state is from such a checkpoint.
        """
        state, config, ranks = self.state, self.config, self.setup.ranks
        steps = self.total // config.images_per_step
        log_every = max(1, steps // (self.checkpoints * LOGS_PER_CHECKPOINT)) * config.images_per_step
        save_every = math.ceil(self.total / self.checkpoints / log_every) * log_every
        is_due = is_unlogged and (state.images % save_every == 0 or state.images == self.total)
        start_images, start_time, start_wait = state.images, time.perf_counter(), self.loader.waited
        while is_due or state.images < self.total:
            wait_for_stop = ranks.any(stop)
            if not is_due:
                learning_rate = scheduled_learning_rate(config, state.images, self.total)
                self.window.append(torch.stack(self.train_step(learning_rate)))
                is_last = state.images == self.total
                if state.images % log_every == 0 or is_last:
                    # The first operation of these steps that waits for the device.
                    finite = torch.stack(self.window).cpu()
                    loss, norm = finite[finite.isfinite().all(1)].mean(0).tolist()
                    self.check_finite()
                    seconds = time.perf_counter() - start_time
                    metrics = {
                        "loss": loss,
                        "gradient_norm": norm,
                        "learning_rate": learning_rate,
                        "images_per_second": (state.images - start_images) / seconds,
                        "data_wait": (self.loader.waited - start_wait) / seconds,
                        "peak_memory": peak_memory(self.device),
                        "skipped": state.skipped,
                    }
                    if log:
                        log.log_metrics(metrics, state.images)
                    self.window, start_images, start_time = [], state.images, time.perf_counter()
                    start_wait = self.loader.waited
                is_due = state.images % save_every == 0 or is_last
            is_over = wait_for_stop()
            if is_due and not is_over:
                header, is_due = self.checkpoint_header(), False
                tensors = self.checkpoint_tensors(header)
                save = partial(log.checkpoint, tensors, header, save_every) if log else None
                is_over = not ranks.run_in_main(save, stop)
                start_time = time.perf_counter()
            if is_over:
                self.check_finite()
                header = self.checkpoint_header() | {WINDOW: [row.tolist() for row in self.window]}
                tensors = self.checkpoint_tensors(header)
                if log:
                    log.interrupt(tensors, header)
                # torchrun would kill a process that still writes when others have ended.
                ranks.barrier()
                return False
        return True

    def train_step(self, learning_rate: float) -> tuple[Tensor, Tensor]:
        """Take one training step; returns loss and gradient norm, both (), which may not be finite.

        A non-finite step changes no weights and is counted. Raises NotFiniteError after too many in a row.
        """
        batch = self.loader.batch(self.state.images, self.total)
        conditioning = self.setup.training_conditioning(batch)
        inputs = self.objective.make_batch(self.setup.x0(batch), batch.indices, conditioning)
        inputs = self.setup.with_prior(self.setup.with_masks(inputs, batch))
        t, inputs = inputs.random.get("t"), inputs.to(self.device)
        try:
            loss, norm, finite = self.update(inputs, learning_rate)
        except torch.OutOfMemoryError as error:
            images = self.config.micro_batch or self.config.images_per_step
            raise UserError(
                f"a training step does not fit into the memory of the GPU: set training.micro_batch below {images}, or "
                "training.gradient_checkpointing=true"
            ) from error
        self.pending.append(PendingStep(self.state.images, batch, t, CopyToCPU(finite)))
        self.check_finite(self.lag)
        return loss, norm

    def update(self, inputs: TrainingBatch, learning_rate: float) -> tuple[Tensor, Tensor, Tensor]:
        """Update weights and averages; returns loss and gradient norm, both (), and whether they are finite, () bool.

        If they are not, no weights change.
        """
        config, state = self.config, self.state
        finite, norms = torch.ones((), dtype=torch.bool, device=self.device), []
        for step, optimizers, reducer in zip(state.steps, state.optimizers, self.reducers, strict=True):
            loss = self.backward(step, inputs, reducer)
            norm = full_tensor(torch.nn.utils.clip_grad_norm_(step.parameters, config.max_grad_norm))
            norms.append(norm)
            finite = finite & loss.isfinite() & norm.isfinite()
            for optimizer in optimizers.values():
                optimizer.param_groups[0]["lr"] = learning_rate
                # The optimizer skips the step on the device, without synchronization.
                optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
                optimizer.threads = self.threads  # type: ignore[attr-defined]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        state.images += config.images_per_step
        for average in state.averages:
            average.update(state.network, state.images // config.images_per_step)
        if state.guide and state.images <= self.setup.guide_images(self.total):
            state.update_guide()
        return loss, torch.stack(norms).amax(), finite

    def backward(self, step: OptimizerStep, batch: TrainingBatch, reducer: GradientReducer | None) -> Tensor:
        """Compute the loss () of the batch of all processes, and set the gradients of the parameters of ``step``."""
        config, ranks = self.config, self.setup.ranks

        def forward(part: TrainingBatch) -> tuple[Tensor, Tensor]:
            """Compute the share of these images in the loss of the batch and in the minimized value."""
            with autocast(config.precision, self.device):
                losses = step.losses(part)
            value = step.compute_objective(losses, part).sum() / config.images_per_step
            return losses.detach().sum() / config.images_per_step, value

        def micro_batches(part: TrainingBatch) -> list[TrainingBatch]:
            return part.split(math.ceil(len(part.x0) / (config.micro_batch or len(part.x0))))

        def compute_gradients(number: int, part: TrainingBatch) -> tuple[Tensor, tuple[Tensor, ...]]:
            total: tuple[Tensor, tuple[Tensor, ...]] | None = None
            passes = micro_batches(part)
            for images in passes:
                loss, value = forward(images)
                is_last = images is passes[-1]
                with reducer.last_pass(number, total and total[1]) if reducer and is_last else nullcontext():
                    # In some pipelines the last block's weights for words have no effect; elsewhere all have to.
                    grads = torch.autograd.grad(value, step.parameters, materialize_grads=self.setup.base is not None)
                total = (loss, grads) if total is None else (total[0] + loss, torch._foreach_add(total[1], grads))
            assert total is not None
            return total

        if config.shard:
            # Each process gets the gradients of its shard of the weights.
            loss, passes = torch.zeros((), device=self.device), micro_batches(batch)
            for images in passes:
                # Gradients are summed within each group at once, as the sums need a share of the memory alone.
                sum_over_replicas(step.modules.values(), images is passes[-1])
                share, value = forward(images)
                value.backward()  # type: ignore[no-untyped-call]
                loss = loss + share
            ranks.sum(loss)
            return loss
        split = batch.split(thread_count(config, ranks))
        parts = list(self.threads.map(compute_gradients, range(len(split)), split))
        loss = torch.stack([part_loss for part_loss, _ in parts]).sum()
        ranks.sum(loss)
        if reducer is not None:
            reducer.wait()
            return loss
        for parameter, *grads in zip(step.parameters, *(part for _, part in parts), strict=True):
            # In the parameter's own memory format, which autograd.grad does not promise and the optimizer relies on.
            parameter.grad = torch.zeros_like(parameter)
            for gradient in grads:
                parameter.grad.add_(gradient)
        return loss

    def check_finite(self, lag: int = 0) -> None:
        """Count skipped steps among all but the last ``lag``; raises NotFiniteError after too many in a row."""
        state, config = self.state, self.config
        while len(self.pending) > lag:
            step = self.pending.popleft()
            if step.finite.wait():
                state.skipped_in_a_row = 0
                continue
            state.skipped += 1
            state.skipped_in_a_row += 1
            if state.skipped_in_a_row >= config.max_nonfinite_steps:
                raise NotFiniteError(
                    f"loss or gradient was not finite in {config.max_nonfinite_steps} steps in a row, up to image "
                    f"{step.images}: lower training.learning_rate and give --restart, or look at the last batch",
                    {"images": step.batch.images, "rows": torch.from_numpy(np.asarray(step.batch.rows))}
                    | ({} if step.t is None else {"t": step.t}),
                )

    def checkpoint_tensors(self, header: dict[str, Any], prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
        """Collect the tensors of a checkpoint with ``header`` in the main process, whose names begin with ``prefixes``.

        Tensors of a sharded network are written to the folder of the run: all processes must call this together.
        """
        tensors = {name: value for name, value in self.state.tensors().items() if name.startswith(prefixes)}
        if self.setup.shard == 1:
            return tensors
        assert self.output is not None
        return write_together(self.output, tensors, header, self.setup.ranks)

    def checkpoint_header(self) -> dict[str, Any]:
        """Build the header of a checkpoint: a model's header, the counts of the state and the machine's fingerprint."""
        header = self.setup.header(self.state.images, self.total)
        if self.checkpoints < self.config.checkpoints:
            header |= {FEWER_CHECKPOINTS: self.checkpoints}
        return header | {COUNTS: self.state.counts(), FINGERPRINT: self.setup.fingerprint.model_dump(mode="json")}


def scheduled_learning_rate(config: TrainingConfig, images: int, total: int) -> float:
    """Compute the learning rate after ``images`` of ``total``: a linear warm-up, then the configured decay."""
    warmup, share = min(1.0, (images + config.images_per_step) / max(config.warmup_images, 1)), min(images / total, 1.0)
    match config.learning_rate_decay:
        case "cosine":
            return config.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * share))
        case "linear":
            return config.learning_rate * warmup * (1 - share)
        case "constant":
            return config.learning_rate * warmup


def thread_count(config: TrainingConfig, ranks: Ranks) -> int:
    """Return the number of threads per process that compute parts of a batch: one on a GPU or for a sharded network."""
    if config.shard or resolve_device(config.device).type != "cpu":
        return 1
    return max(1, config.cpu_threads // ranks.count)


def make_optimizers(
    step: OptimizerStep, config: TrainingConfig, betas: tuple[float, float]
) -> dict[str, torch.optim.Optimizer]:
    """Make AdamW for the parameters of ``step``, and Muon for its matrices if configured, or another one for all."""
    name, muon = next(iter(step.modules)), {id(matrix) for matrix in step.matrices if config.optimizer == "muon"}
    if config.optimizer in ("prodigy", "adamw_8bit"):
        kind = Prodigy if config.optimizer == "prodigy" else AdamW8bit
        optimizer = kind(step.parameters, config.learning_rate, betas, config.weight_decay)
        return {f"{config.optimizer}.{name}.": optimizer}
    adamw_parameters = [parameter for parameter in step.parameters if id(parameter) not in muon]
    optimizers: dict[str, torch.optim.Optimizer] = {
        f"adamw.{name}.": torch.optim.AdamW(
            adamw_parameters, config.learning_rate, betas, weight_decay=config.weight_decay, fused=True
        )
    }
    if muon:
        optimizers[f"muon.{name}."] = Muon(step.matrices, config.learning_rate, config.weight_decay)
    return optimizers
