"""A training run: its data, its configuration and its state; one step of it, and where it stands."""

import copy
import math
from collections import deque
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.config_sampling import ANYTHING, Asked
from diffusion.data.captions import Captions, like
from diffusion.data.dataset import SPLITS, Dataset
from diffusion.data.loader import Batch, Loader
from diffusion.data.manifest import Split
from diffusion.data.order import Order, TrainingOrder, WindowedOrder
from diffusion.device import device_name, resolve_device
from diffusion.errors import DarkroomError
from diffusion.fingerprint import CPU, Fingerprint, autocast, resolve_precision
from diffusion.model import DiffusionModel, ModelHeader, Told, classes_of, to_float
from diffusion.models.config import ModelConfig
from diffusion.models.unet import UNet
from diffusion.objective import Objective
from diffusion.random import GaussianNoise, uniform
from diffusion.text import ENCODER
from diffusion.training.checkpoint import TrainingState
from diffusion.training.config import TrainingConfig
from diffusion.training.drawn import Drawn, kept_back
from diffusion.training.identity import data_digest, identity_fields, train_key
from diffusion.training.objective import draw_times, make_objective, times_at
from diffusion.training.ranks import ALONE, Ranks
from diffusion.training.sharding import gathered
from diffusion.training.state import make_state
from diffusion.upscaling import noised, shown_small

LEVELS = 8
"""Parts of the distribution of noise levels, from the least to the most, whose losses are told apart."""
FINGERPRINT = "fingerprint"
PROBES = 256
"""Pictures of each split on which losses are compared over time."""


class NotFinite(DarkroomError):
    """Training gave up; ``batch`` is what it was last shown."""

    def __init__(self, message: str, batch: dict[str, Tensor]) -> None:
        super().__init__(message)
        self.batch = batch


class Step:
    """A step that was begun; whether it changed the weights can be known without waiting for those after it."""

    def __init__(self, images: int, finite: Tensor, batch: Batch, t: Tensor) -> None:
        self.images, self.batch, self.t = images, batch, t
        self._finite = finite.to("cpu", non_blocking=True)
        self._there = torch.cuda.current_stream(finite.device).record_event() if finite.is_cuda else None

    def finite(self) -> bool:
        """Whether loss and gradient were finite; waits until they are there."""
        if self._there is not None:
            self._there.synchronize()
        return bool(self._finite)


@dataclass
class Run:
    """A training run: its data, its configuration, and its state."""

    dataset: Dataset
    model: ModelConfig
    config: TrainingConfig
    state: TrainingState
    objective: Objective
    loader: Loader
    classes: list[str]
    """What the network is told of; empty: nothing."""
    pool: Executor
    """Lanes to compute in."""
    ranks: Ranks = ALONE
    """The processes that share each batch."""
    captions: Captions | None = None
    """What the network is told besides; None: nothing."""
    device: torch.device = CPU
    """Where the network is."""
    compiled: bool = False
    """Whether it was compiled."""
    total: int = 0
    """Images to see in all, a whole number of batches."""
    behind: int = 0
    """After how many further steps it is looked at whether a step was finite: a GPU would else wait for it."""
    probes: dict[Split, Batch] = field(default_factory=dict)
    """Fixed pictures of each split, as soon as losses were compared on them."""
    unsettled: deque[Step] = field(default_factory=deque)
    """The steps that nobody has looked at yet."""

    @classmethod
    def new(
        cls,
        dataset: Dataset,
        model: ModelConfig,
        config: TrainingConfig,
        pool: Executor,
        ranks: Ranks = ALONE,
        captions: Captions | None = None,
    ) -> "Run":
        """A run that has seen nothing yet; its initial weights are a function of the seed."""
        device = resolve_device(config.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            classes = classes_of(model, dataset.manifest.class_histogram)
            network = UNet(model, dataset.manifest.channels, dataset.manifest.size, len(classes))
        network.recompute = config.recompute
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        state = make_state(network, config, ranks if config.shard else ALONE, device)
        compiled = config.compile if config.compile is not None else device.type == "cuda"
        if compiled:
            network.compile(dynamic=False)
        objective = make_objective(model, config, dataset.manifest.sigma_data)
        loader = make_loader(dataset, config, ranks)
        behind = 1 if device.type == "cuda" else 0
        return cls(
            dataset,
            model,
            config,
            state,
            objective,
            loader,
            classes,
            pool,
            ranks,
            captions,
            device,
            compiled,
            behind=behind,
        )

    def step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns loss and gradient norm as 0-dimensional tensors, which may not be finite.

        Then the step changes no weights, and is counted. Raises NotFinite if too many in a row did not.
        """
        config, state = self.config, self.state
        batch = self.loader.batch(state.images, self.total)
        x0 = to_float(batch.pictures).contiguous(memory_format=torch.channels_last)
        t = draw_times(config, self.objective.schedule, batch.indices)
        noise = GaussianNoise(config.seed, "noise", batch.indices, self.dataset.shape)()
        draws = (uniform(config.seed, "dropout", batch.indices) * 2**62).long()
        drawn = Drawn(x0, t, noise, draws, self._told(batch)).on(self.device)
        loss = self._sharded_gradients(drawn) if config.shard else self._gradients(drawn)
        norm = gathered(torch.nn.utils.clip_grad_norm_(state.parameters(), config.clip_norm))
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(config, state.images, self.total)
        finite = loss.isfinite() & norm.isfinite()
        # The optimizer itself leaves the step out, on its device, without anyone waiting to know.
        state.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.images += config.batch_size
        for average in state.averages:
            average.update(state.network, state.images // config.batch_size)
        self.unsettled.append(Step(state.images, finite, batch, t))
        self.settle(self.behind)
        return loss, norm

    def settle(self, left: int = 0) -> None:
        """Count which steps changed nothing, of all but the last ``left``; raises NotFinite if too many did not."""
        while len(self.unsettled) > left:
            step = self.unsettled.popleft()
            if step.finite():
                self.state.skipped_in_a_row = 0
            else:
                self._skipped(step)

    def _skipped(self, step: Step) -> None:
        state, config = self.state, self.config
        state.skipped += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row < config.most_skipped:
            return
        raise NotFinite(
            f"loss or gradient was not finite in {config.most_skipped} steps in a row, up to image {step.images}: "
            "lower training.learning_rate and give --restart, or look at the last batch",
            {
                "pictures": step.batch.pictures,
                "t": step.t,
                "rows": torch.from_numpy(np.asarray(step.batch.rows)),
            },
        )

    def _gradients(self, drawn: Drawn) -> Tensor:
        """Give the parameters the batch's gradients, of all processes; returns its loss."""
        state = self.state
        parts = list(self.pool.map(self._lane, drawn.split(lanes_of(self.config, self.ranks))))
        loss = torch.stack([part_loss for part_loss, _ in parts]).sum()
        for parameter, *gradients in zip(state.parameters(), *(part for _, part in parts), strict=True):
            # In the parameter's own memory format, which autograd.grad does not promise and the optimizer relies on.
            parameter.grad = torch.zeros_like(parameter)
            for gradient in gradients:
                parameter.grad.add_(gradient)
        self.ranks.sum([loss, *(parameter.grad for parameter in state.parameters() if parameter.grad is not None)])
        return loss

    def _lane(self, drawn: Drawn) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A part's share of the batch's loss, and its gradients."""
        loss, minimised = self._share(drawn)
        return loss, torch.autograd.grad(minimised, self.state.parameters())

    def _sharded_gradients(self, drawn: Drawn) -> Tensor:
        """As ``_gradients``; each process gets those of its share of the weights."""
        loss, minimised = self._share(drawn)
        minimised.backward()  # type: ignore[no-untyped-call]
        self.ranks.sum([loss])
        return loss

    def _share(self, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """What these pictures add to the loss of the batch, and to what is minimised."""
        with autocast(self.config.precision, self.device):
            losses = self._losses(self.state.network, drawn)
        minimised = self.state.uncertainty(losses, drawn.t) if self.state.uncertainty else losses
        return losses.detach().sum() / self.config.batch_size, minimised.sum() / self.config.batch_size

    def _told(self, batch: Batch) -> Told:
        """What the network is told of the pictures of a batch."""
        if self.model.low_resolution is not None:
            return noised(self._known(batch), self.model.most_low_resolution_noise, self.config.seed, batch.indices)
        if not (told := self._known(batch)):
            return told
        u = uniform(self.config.seed, "class", batch.indices)
        return kept_back(told, u, self.config.condition_dropout, len(self.classes))

    def _known(self, batch: Batch) -> Told:
        """Class, caption and small version of the pictures of a batch, as far as the network is told any."""
        known = shown_small(self.model, batch.pictures)
        if self.classes:
            known["label"] = self.dataset.classes(batch.rows, self.classes)
        if self.captions is not None:
            known["text"] = self.captions.of(batch.rows)
        return known

    def _losses(self, network: UNet, drawn: Drawn) -> Tensor:
        return self.objective.loss(partial(network, draws=drawn.draws, **drawn.told), drawn.x0, drawn.t, drawn.noise)

    def averaged(self) -> DiffusionModel:
        """The averaged network as it is now."""
        with torch.device("meta"):
            network = self._network()
        weights = {name: value.clone() for name, value in self.state.averages[0].state_dict().items()}
        network.load_state_dict(weights, assign=True)
        network.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return DiffusionModel(self.model_header(), network, self.objective.schedule)

    def _network(self) -> UNet:
        manifest = self.dataset.manifest
        return UNet(self.model, manifest.channels, manifest.size, len(self.classes))

    def gathered(self) -> "Run":
        """This run with all of its state in the process that leads, of which each may have a share; all ask at once."""
        if not self.config.shard:
            return self
        tensors: dict[str, Tensor] = {}
        for name, value in self.state.tensors().items():
            # One at a time, and kept outside the device: a network that is shared out does not fit on it.
            of_all = gathered(value)
            if self.ranks.leads:
                tensors[name] = of_all.cpu()
        if not self.ranks.leads:
            return self
        state = make_state(self._network(), self.config, ALONE, CPU)
        state.load(tensors, self.state.counts())
        return replace(self, state=state)

    def probe(self, averaged: UNet) -> dict[str, float]:
        """Losses of raw and averaged weights on fixed pictures, times and noise of both splits."""
        networks = {"": self.state.network, "_ema": averaged}
        figures = {
            f"{split}_loss{suffix}": self.pool.submit(self._probe, split, batch, network)
            for split, batch in self.probed().items()
            for suffix, network in networks.items()
        }
        losses = {name: figure.result() for name, figure in figures.items()}
        means = {name: each.mean().item() for name, each in losses.items()}
        return means | by_level(losses.get("held_out_loss_ema"))

    def probed(self) -> dict[Split, Batch]:
        """The pictures of each split to compare losses on, kept: they may have come from far away."""
        probes = self.probes
        for split in SPLITS if not probes else ():
            rows = self.dataset.rows(split)
            if self.config.window is not None:  # from as few shards as possible
                rows = rows[np.argsort(self.dataset.shards(rows), kind="stable")]
            rows = rows[:PROBES]
            if len(rows):
                probes[split] = Batch(range(len(rows)), rows, self.dataset.pictures(rows))
        return probes

    def _probe(self, split: Split, batch: Batch, network: UNet) -> Tensor:
        with torch.inference_mode(), autocast(self.config.precision, self.device):
            x0 = to_float(batch.pictures)
            u = (torch.arange(len(x0)) + 0.5) / len(x0)
            t = times_at(self.config, self.objective.schedule, u)
            noise = GaussianNoise(0, f"probe/{split}", batch.indices, self.dataset.shape)()
            drawn = Drawn(x0, t, noise, None, self._known(batch)).on(self.device)
            if next(network.parameters()).device != self.device:
                network = copy.deepcopy(network).to(self.device)
            return self._losses(network, drawn).cpu()

    def shown(self, count: int) -> Asked:
        """What ``count`` pictures drawn to be looked at are to show: as held-out ones, where there are captions."""
        if self.captions is None:
            return ANYTHING
        rows = np.concatenate([self.dataset.rows("held_out"), self.dataset.rows("train")])
        return like(self.dataset, rows[self.captions.numbers[rows] >= 0][:count], self.classes)

    def model_header(self) -> ModelHeader:
        """What a model made of the present state says of itself."""
        manifest = self.dataset.manifest
        return ModelHeader(
            model=self.model,
            channels=manifest.channels,
            size=manifest.size,
            dataset=manifest.name,
            content_digest=manifest.content_digest,
            sigma_data=manifest.sigma_data,
            class_histogram=manifest.class_histogram,
            encoder=ENCODER if self.model.text else None,
            images=self.state.images,
            training=identity_fields(self.config),
        )

    def fingerprint(self) -> Fingerprint:
        """What the last bits of the weights depend on besides configuration, data and seed."""
        return Fingerprint(
            batch=self.config.batch_size,
            precision=resolve_precision(self.config.precision, self.device),
            device=device_name(self.device),
            torch=torch.__version__,
            compile=self.compiled,
            ranks=self.ranks.count,
        )

    def checkpoint_header(self) -> dict[str, Any]:
        """The header of a checkpoint, which says where it was computed."""
        return self.header() | {FINGERPRINT: self.fingerprint().model_dump(mode="json")}

    def header(self) -> dict[str, Any]:
        """The header of a checkpoint or final model."""
        manifest = self.dataset.manifest
        header = {
            "model_header": self.model_header().model_dump(mode="json"),
            "train_key": train_key(data_digest(manifest, self.config), self.model, self.config),
            "total": self.total,
        }
        return header if self.config.window is None else header | {"layout_digest": manifest.layout_digest}


def by_level(losses: Tensor | None) -> dict[str, float]:
    """The mean of ``losses`` (N,), ordered by how noisy the pictures were, in each of so many equal parts."""
    if losses is None or len(losses) < LEVELS:
        return {}
    parts = losses.tensor_split(LEVELS)
    return {f"held_out_loss_ema_level_{number}": part.mean().item() for number, part in enumerate(parts, start=1)}


def lanes_of(config: TrainingConfig, ranks: Ranks) -> int:
    """How many lanes each process has: as many as there would be in one process, shared out.

    A GPU shares its work out by itself, and what is gathered for a block of a sharded network is there once.
    """
    if config.shard or resolve_device(config.device).type != "cpu":
        return 1
    return max(1, config.lanes // ranks.count)


def make_loader(dataset: Dataset, config: TrainingConfig, ranks: Ranks) -> Loader:
    """The training pictures of ``dataset`` in the order and batches that ``config`` asks for."""
    manifest, rows = dataset.manifest, dataset.rows("train")
    order: Order
    if config.window is None:
        order = TrainingOrder(manifest.content_digest, config.seed, len(rows))
    else:
        order = WindowedOrder(manifest.layout_digest, config.seed, config.window, dataset.shards(rows))
    return Loader(
        dataset,
        rows,
        order,
        config.batch_size,
        rank=ranks.rank,
        ranks=ranks.count,
        flip_seed=config.seed if config.flip else None,
        prefetch=config.prefetch,
        workers=config.workers,
    )


def learning_rate(config: TrainingConfig, images: int, total: int) -> float:
    """Linear warm-up, then a cosine to zero, as a function of ``images`` seen out of ``total``."""
    warmup = min(1.0, (images + config.batch_size) / max(config.warmup_images, 1))
    return config.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * min(images / total, 1.0)))
