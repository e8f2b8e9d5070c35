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
from torch import Tensor, nn

from diffusion.config_sampling import ANYTHING, Asked
from diffusion.data.captions import Captions, like
from diffusion.data.dataset import SPLITS, Dataset
from diffusion.data.loader import Batch, Loader, Order, TrainingOrder, WindowedOrder
from diffusion.data.manifest import Split
from diffusion.device import device_name, resolve_device
from diffusion.errors import DarkroomError
from diffusion.families import family_of
from diffusion.families.base import Data, Learner
from diffusion.families.config import FamilyConfig
from diffusion.fingerprint import CPU, Fingerprint, autocast, resolve_precision
from diffusion.model import Model, ModelHeader, Told, classes_of, to_float
from diffusion.random import uniform
from diffusion.text import ENCODER
from diffusion.training.checkpoint import TrainingState
from diffusion.training.config import TrainingConfig
from diffusion.training.drawn import Drawn, kept_back
from diffusion.training.first_stage import FirstStage, known_as
from diffusion.training.identity import data_digest, identity_fields, train_key
from diffusion.training.ranks import ALONE, Ranks
from diffusion.training.sharding import gathered
from diffusion.training.state import deviation, frozen_tensors, make_network, make_state, worked_on
from diffusion.training.turn import Turn
from diffusion.training.warm_start import WarmStart, identified_start
from diffusion.upscaling import noised, shown_small

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

    def __init__(self, images: int, finite: Tensor, batch: Batch, t: Tensor | None) -> None:
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
    model: FamilyConfig
    """Its autoencoder, if it has one, named by its digest."""
    config: TrainingConfig
    """Its start, if it has one, named by its digest."""
    state: TrainingState
    learner: Learner
    """How its family learns."""
    loader: Loader
    classes: list[str]
    """What the network is told of; empty: nothing."""
    pool: Executor
    """Lanes to compute in."""
    ranks: Ranks = ALONE
    """The processes that share each batch."""
    captions: Captions | None = None
    """What the network is told besides; None: nothing."""
    first_stage: FirstStage | None = None
    """What leads to the latents that the network works on; None: it works on pictures."""
    device: torch.device = CPU
    """Where the network is."""
    compiled: bool = False
    """Whether it was compiled."""
    sigma_data: float = 1.0
    """Standard deviation of what the network works on."""
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
        model: FamilyConfig,
        config: TrainingConfig,
        pool: Executor,
        ranks: Ranks = ALONE,
        captions: Captions | None = None,
        first_stage: FirstStage | None = None,
        start: WarmStart | None = None,
    ) -> "Run":
        """A run that has seen nothing yet; its initial weights are a function of the seed, or those of ``start``."""
        device = resolve_device(config.device)
        model = known_as(model, first_stage.space.digest) if first_stage else model
        config = identified_start(config, start)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            classes = classes_of(model, dataset.manifest.class_histogram)
            network = make_network(model, dataset, classes, first_stage, config.recompute)
            latents = first_stage.latents if first_stage else None
            sigma_data = deviation(dataset, model, first_stage)
            data = Data(dataset.shape, worked_on(dataset, first_stage), sigma_data, latents, len(classes))
            learner = family_of(model).learner(model, config, data)
        if start:
            start.fill(network, model, dataset, classes)
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        frozen = frozen_tensors(first_stage, device)
        state = make_state(network, learner, config, ranks if config.shard else ALONE, device, frozen)
        compiled = config.compile if config.compile is not None else device.type == "cuda"
        if compiled:
            network.compile(dynamic=False)
        loader = make_loader(dataset, config, ranks)
        behind = 1 if device.type == "cuda" else 0
        return cls(
            dataset,
            model,
            config,
            state,
            learner,
            loader,
            classes,
            pool,
            ranks,
            captions,
            first_stage,
            device,
            compiled,
            sigma_data,
            behind=behind,
        )

    def step(self) -> tuple[Tensor, Tensor]:
        """One step; returns loss and largest gradient norm as 0-dimensional tensors, which may not be finite.

        Then nothing moves from there on in this step, and it is counted. Raises NotFinite if too many in a row were so.
        """
        config, state = self.config, self.state
        batch = self.loader.batch(state.images, self.total)
        x0 = to_float(batch.pictures).contiguous(memory_format=torch.channels_last)
        drawn = self.learner.drawn(x0, batch.indices, self._told(batch))
        t, drawn = drawn.t, drawn.on(self.device)
        rate = learning_rate(config, state.images, self.total)
        finite, norms = torch.ones((), dtype=torch.bool, device=self.device), []
        for turn in self.turns():
            loss, norm = turn.gradients(drawn, config, self.device, self.pool, self.ranks)
            norms.append(norm)
            finite = finite & loss.isfinite() & norm.isfinite()
            turn.move(rate, finite)
        norm = torch.stack(norms).amax()
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
            {"pictures": step.batch.pictures, "rows": torch.from_numpy(np.asarray(step.batch.rows))}
            | ({} if step.t is None else {"t": step.t}),
        )

    def turns(self) -> list[Turn]:
        """The parts of a step: what the network learns against moves before it."""
        state, learner = self.state, self.learner

        def minimised(losses: Tensor, drawn: Drawn) -> Tensor:
            return state.uncertainty(losses, drawn.t) if state.uncertainty else losses

        own = Turn(state.optimizer, state.parameters(), partial(learner.losses, state.network), minimised)
        if learner.contest is None or state.opponent is None:
            return [own]
        losses = partial(learner.contest.losses, state.network)
        return [Turn(state.opponent.optimizer, list(state.opponent.network.parameters()), losses), own]

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

    def averaged(self) -> Model:
        """The averaged network as it is now."""
        with torch.device("meta"):
            network = self._network()
        weights = {name: value.clone() for name, value in self.state.averages[0].state_dict().items()}
        network.load_state_dict(weights, assign=True)
        network.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        latents = self.first_stage.latents if self.first_stage else None
        model: Model = family_of(self.model).model(self.model_header(), network, latents)
        return model

    def _network(self) -> nn.Module:
        return make_network(self.model, self.dataset, self.classes, self.first_stage)

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
        state = make_state(self._network(), self.learner, self.config, ALONE, CPU, self.state.frozen)
        state.load(tensors, self.state.counts())
        return replace(self, state=state)

    def probe(self, averaged: nn.Module) -> dict[str, float]:
        """Losses of raw and averaged weights on fixed pictures, times and noise of both splits."""
        networks = {"": self.state.network, "_ema": averaged}
        figures = [
            self.pool.submit(self._probe, split, batch, suffix, network)
            for split, batch in self.probed().items()
            for suffix, network in networks.items()
        ]
        return {name: value for each in figures for name, value in each.result().items()}

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

    def _probe(self, split: Split, batch: Batch, suffix: str, network: nn.Module) -> dict[str, float]:
        with torch.inference_mode(), autocast(self.config.precision, self.device):
            drawn = self.learner.probed(to_float(batch.pictures), split, batch.indices, self._known(batch))
            if drawn is None:
                return {}
            drawn = drawn.on(self.device)
            if next(network.parameters()).device != self.device:
                network = copy.deepcopy(network).to(self.device)
            losses = self.learner.losses(network, drawn).cpu()
            figures = {f"{split}_loss{suffix}": losses.mean().item()}
            if (split, suffix) == ("held_out", "_ema"):
                figures |= self.learner.figures(network, drawn, losses)
            return figures

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
            sigma_data=self.sigma_data,
            class_histogram=manifest.class_histogram,
            encoder=ENCODER if self.model.text else None,
            latents=self.first_stage.space if self.first_stage else None,
            images=self.state.images,
            training=identity_fields(self.config, self.model),
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
