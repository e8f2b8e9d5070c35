"""Memory of a training, computed from configurations alone: a step on fake CPU tensors, whose storages are counted.

Nothing of the network's size is allocated, and of a model's file only the header is read. The step is that of training,
with its autocast and the order in which it frees tensors. On the meta device attention would not be fused, and take
eleven times as much in a block of Stable Diffusion XL.
"""

import copy
import math
import warnings
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from diffusion.common.device import CPU
from diffusion.common.fingerprint import autocast
from diffusion.families import family_of
from diffusion.families.fine_tuning import TrainableSubset, adapted_layers
from diffusion.families.model import Encoder, Model, TrainingBatch, TrainingObjective, use_channels_last
from diffusion.families.text_encoder import Encoding
from diffusion.families.vae.network import latent_shape
from diffusion.training.distributed import SINGLE_PROCESS
from diffusion.training.muon import Muon, group_by_side
from diffusion.training.setup import TrainingSetup
from diffusion.training.trainer import TrainingState, TrainingStep

T = TypeVar("T")
MEASURED = (2, 3)
"""Numbers of images of the measured steps: memory is linear in them. With one image some operations copy nothing."""


class LiveMemory(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Fake CPU tensors, and the bytes that their storages would take."""

    def __init__(self) -> None:
        # Constants, such as noise schedules, are real.
        super().__init__(allow_non_fake_inputs=True)
        self.live = 0
        """Bytes of all storages."""
        self.history: list[int] = []
        """These bytes after each operation."""
        self.forward: int | None = None
        """Number of operations before the first backward pass."""
        self._storages: set[int] = set()
        self._depth = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.forward is None and torch._C._current_graph_task_id() >= 0:
            self.forward = len(self.history)
        if func is torch.ops.aten._local_scalar_dense.default:
            # What depends on values is done, which takes most.
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        self._depth += 1
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._depth -= 1
        # Modules cannot be converted as long as there are weak references to their weights.
        self.fake_tensor_converter.meta_converter.tensor_memo.clear()
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor):
                storage = tensor.untyped_storage()
                if (key := storage._cdata) not in self._storages:
                    self._storages.add(key)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._free, key, storage.nbytes())
        if not self._depth:  # others are in a cache the next time
            self.history.append(self.live)
        return out

    def _free(self, key: int, size: int) -> None:
        self._storages.remove(key)
        self.live -= size

    def record(self, work: Callable[[], object]) -> np.ndarray:
        """Do ``work``; returns the bytes after each operation beyond those before it, (operations,) int64."""
        start, self.history, self.forward = self.live, [], None
        with self:
            work()
        return np.array(self.history, np.int64) - start


class _Inline(Executor):
    """Does what it is given at once, in the thread that has the mode."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a process takes for a training: between steps, and beyond that in a step."""

    trained: int
    """Weights that are trained; their gradients are as many."""
    frozen: int
    """Weights of the network that are not trained, and of a teacher."""
    encoders: int
    """Text encoders and autoencoder, as far as they stay beside the network: a text encoder with an adapter."""
    initial: int
    """Weights of the initial model that are only in the memory of the CPU, such as other encoders."""
    optimizer: int
    """Moments."""
    averages: int
    """Averages and guide."""
    prompt: int
    """An encoded prompt."""
    network: int
    """All weights of an imported pipeline, or of another initial model; 0: there is none."""
    text_encoders: int
    """Weights of a pipeline's text encoders, which encode captions before the first step."""
    autoencoder: int
    """Weights of its autoencoder, which encodes images before, and decodes those of sample grids."""
    adapted: int
    """Weights of the layers that an adapter changes, once it is merged into them."""
    matrices: list[nn.Parameter]
    """Weights that Muon can train."""
    encodings: list[np.ndarray]
    """Bytes beyond ``network`` after each operation that encodes images as latents; empty: none are."""
    steps: list[np.ndarray]
    """Bytes beyond the above after each operation of a step, for the numbers of images in ``MEASURED``."""
    forwards: list[int]
    """Numbers of operations before the backward passes of ``steps``."""
    validations: list[np.ndarray]
    """Bytes after each operation that computes the losses of held-out images."""

    @property
    def checkpoint(self) -> int:
        """Return the bytes of a checkpoint."""
        return self.trained + self.optimizer + self.averages

    @property
    def state(self) -> int:
        """Return the bytes between steps, on a GPU."""
        return self.checkpoint + self.frozen + self.encoders

    def activations(self, images: int) -> int:
        """Compute what the forward pass of ``images`` at once takes, most of which it leaves for the backward pass."""
        return _peak([step[:count] for step, count in zip(self.steps, self.forwards, strict=True)], images)

    def step(self, images: int) -> int:
        """Compute the peak of a step of ``images`` beyond the state: activations, gradients, temporary tensors."""
        return _peak(self.steps, images)

    def validation(self, images: int) -> int:
        """Compute the peak of the losses of ``images``, beyond the weights."""
        return _peak(self.validations, images)

    def encoding(self, images: int) -> int:
        """Compute the peak of encoding ``images`` as latents, beyond the weights."""
        return _peak(self.encodings, images)


def _peak(histories: list[np.ndarray], images: int) -> int:
    """Extrapolate the bytes after each operation from the numbers of images in ``MEASURED``; returns the largest."""
    first, second = histories
    if len(first) != len(second):
        # Some networks take one image after another.
        first, second = first.max(keepdims=True), second.max(keepdims=True)
    return max(0, int((first + (images - MEASURED[0]) * (second - first)).max(initial=0)))


def measure_step(setup: TrainingSetup) -> StepMemory:
    """Measure a training step on images of the largest shape, in one thread; takes none of the memory."""
    memory = LiveMemory()
    setup = _outline(setup, memory)
    config, initial = setup.config, setup.initial
    objective, prompt = setup.make_objective(), _make_prompt(setup)
    batches = [_make_batch(setup, objective, images, prompt) for images in MEASURED]
    with memory, warnings.catch_warnings():
        # Copies of buffers ask for their addresses, which are not used.
        warnings.filterwarnings("ignore", message="Accessing the data pointer")
        objective = _with_fakes(objective)
        network = setup.make_network(config.gradient_checkpointing)
        use_channels_last(network)
        state = TrainingState(network, objective, config, CPU, {}, None, setup.has_guide)
        before = memory.live
        for step, optimizers in zip(state.steps, state.optimizers, strict=True):
            for parameter in step.parameters:
                parameter.grad = torch.zeros_like(parameter)
            for optimizer in optimizers.values():
                optimizer.step()  # makes the moments
                optimizer.zero_grad(set_to_none=True)
        optimizer_bytes = memory.live - before
    computation = TrainingStep(setup, state, _Inline())
    computation.total = 2**40  # the guide still learns

    def validate(batch: TrainingBatch) -> None:
        with torch.no_grad(), autocast(config.precision, CPU):
            objective.losses(network, batch.map(torch.empty_like))

    def update(batch: TrainingBatch) -> None:
        computation.update(batch.map(torch.empty_like), 0.0)

    memory.record(partial(validate, batches[0]))  # fills caches
    validations = [memory.record(partial(validate, batch)) for batch in batches]
    steps, forwards = [], []
    for batch in batches:
        steps.append(memory.record(partial(update, batch)))
        assert memory.forward is not None
        forwards.append(memory.forward)
    averages = [*state.guide.values(), *(value for average in state.averages for value in average.averages.values())]
    trained = _storages(parameter for step in state.steps for parameter in step.parameters)
    return StepMemory(
        trained=sum(trained.values()),
        **_untrained_sizes(setup, network, trained.keys()),
        optimizer=optimizer_bytes,
        averages=sum(_storages(averages).values()),
        prompt=sum(value.nbytes for value in prompt.values()),
        network=0 if initial is None else sum(_storages(initial.network.parameters()).values()),
        **_encoder_sizes(initial),
        adapted=_adapted_size(network),
        matrices=[matrix for step in state.steps for matrix in step.matrices],
        encodings=_encode_images(setup, memory),
        steps=steps,
        forwards=forwards,
        validations=validations,
    )


def _outline(setup: TrainingSetup, memory: LiveMemory) -> TrainingSetup:
    """Copy a setup for one part of a batch on the CPU, with fake tensors in its models."""
    changes = {"device": "cpu", "compile": False, "shard": False, "cpu_threads": 1, "micro_batch": None}
    config = setup.config.model_copy(update=changes)
    if (initial := setup.initial) is not None:
        # What its noise schedule caches would be fake as well.
        initial = copy.deepcopy(
            initial, {id(each): each for each in vars(initial).values() if isinstance(each, nn.Module)}
        )
    with memory:
        initial = initial and _with_fakes(initial)
        setup = replace(setup, config=config, ranks=SINGLE_PROCESS, captions=None, initial=initial)
        return cast(TrainingSetup, _with_fakes(setup))


def _untrained_sizes(setup: TrainingSetup, network: nn.Module, trained: Iterable[int]) -> dict[str, int]:
    """Compute ``frozen``, ``encoders`` and ``initial`` of StepMemory."""
    modules = [network.network if isinstance(network, TrainableSubset) else network]
    encoders = _storages(() if setup.autoencoder is None else setup.autoencoder.parameters())
    first: dict[int, int] = {}
    if (initial := setup.initial) is not None:
        first, names = _storages(initial.network.parameters()), initial.trained_names()
        encoders |= _storages(weight for name, weight in initial.network.named_parameters() if name not in names)
        if setup.config.student is not None:
            modules += [module for module in (initial.network, initial.guide) if module is not None]
    held = _storages(weight for module in modules for weight in module.parameters())
    held |= _storages(() if setup.autoencoder is None else setup.autoencoder.parameters())
    known = {*trained}
    return {
        "frozen": sum(size for key, size in held.items() if key not in known | encoders.keys()),
        "encoders": sum(size for key, size in held.items() if key in encoders.keys() - known),
        "initial": sum(size for key, size in first.items() if key not in held),
    }


def _encoder_sizes(initial: Model | None) -> dict[str, int]:
    """Compute ``text_encoders`` and ``autoencoder`` of StepMemory."""
    weights = {} if initial is None else initial.encoders()
    sizes = {name: sum(_storages(weights.get(name, [])).values()) for name in ("prompts", "latents")}
    return {"text_encoders": sizes["prompts"], "autoencoder": sizes["latents"]}


def _adapted_size(network: nn.Module) -> int:
    """Compute ``adapted`` of StepMemory."""
    layers = adapted_layers(network.network).values() if isinstance(network, TrainableSubset) else ()
    return sum(layer.get_submodule("base_layer").weight.nbytes for layer in layers)  # type: ignore[misc]


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the bytes of the different storages of ``tensors``."""
    return {(storage := tensor.untyped_storage())._cdata: storage.nbytes() for tensor in tensors}


def _with_fakes(holder: Any) -> Any:
    """Copy a dataclass with fake CPU tensors in place of those of its modules; called inside the mode."""
    fakes: dict[int, nn.Module] = {}
    for module in vars(holder).values():
        if isinstance(module, nn.Module) and not any(isinstance(each, FakeTensor) for each in module.parameters()):
            # Some tensors are neither weights nor buffers. Copies of what is in the memo are its values.
            others = [each for part in module.modules() for each in vars(part).values() if isinstance(each, Tensor)]
            memo: dict[int, Any] = {
                id(each): torch.empty_like(each, device=CPU) for each in (*module.buffers(), *others)
            }
            for weight in module.parameters():
                memo[id(weight)] = nn.Parameter(torch.empty_like(weight, device=CPU), weight.requires_grad)
            fakes[id(module)] = copy.deepcopy(module, memo)
    return replace(holder, **{name: fakes[id(value)] for name, value in vars(holder).items() if id(value) in fakes})


def _make_prompt(setup: TrainingSetup) -> Encoding:
    """Make an encoded prompt of the size of all; empty: there are no prompts."""
    adapter = setup.config.adapter
    if not setup.model.text:
        return {}
    if setup.initial is None:
        return family_of(setup.model).own_caption_encoder(setup.model).none
    if adapter is not None and adapter.text_encoder:
        return setup.initial.caption_encoder(adapter, CPU).none
    return {name: torch.zeros(shape) for name, shape in setup.initial.encoding_shapes().items()}


def _encode_images(setup: TrainingSetup, memory: LiveMemory) -> list[np.ndarray]:
    """Record the encoding of images by an autoencoder; empty: there is none."""
    encoder: Encoder | None = setup.autoencoder
    if (initial := setup.initial) is not None and initial.has_frozen_parts and initial.autoencoder is not None:
        encoder = initial
    if encoder is None:
        return []
    height, width = max(setup.dataset.shapes, key=math.prod)
    images = [torch.zeros(count, setup.dataset.manifest.channels, height, width) for count in MEASURED]

    def encode(batch: Tensor) -> None:
        with torch.no_grad():
            encoder.encode(torch.empty_like(batch))

    return [memory.record(partial(encode, batch)) for batch in images]


def _make_batch(setup: TrainingSetup, objective: TrainingObjective, images: int, prompt: Encoding) -> TrainingBatch:
    """Make a batch of ``images`` of the largest shape, with all that a training conditions on."""
    manifest, (height, width) = setup.dataset.manifest, max(setup.dataset.shapes, key=math.prod)
    shape: tuple[int, ...] = (manifest.channels, height, width)
    conditioning = setup.task.conditioning(torch.zeros(images, *shape, dtype=torch.uint8))
    if setup.classes:
        conditioning["label"] = torch.zeros(images, dtype=torch.long)
    # Without a mask, as if prompts were as long as they can be.
    conditioning |= {name: value.expand(images, *value.shape) for name, value in prompt.items() if name != "mask"}
    if setup.initial is not None and setup.initial.has_frozen_parts:
        shape = setup.initial.with_size((height, width)).noise_shape
    elif setup.autoencoder is not None:
        shape = latent_shape(setup.autoencoder.space.autoencoder, height, width)
    x0 = torch.zeros(images, *shape).contiguous(memory_format=torch.channels_last)
    batch = replace(objective.make_batch(x0, range(images), {}), conditioning=conditioning)
    weights = None if setup.config.mask is None else torch.zeros(images, 1, height, width)
    setup = replace(setup, prior_prompt=None if setup.config.prior is None else prompt)
    return setup.with_prior(replace(batch, pixel_weights=weights))


def muon_size(matrices: Iterable[nn.Parameter], threads: int) -> int:
    """Compute the bytes of the temporary tensors of a step of Muon on ``matrices``, at most; takes no memory.

    Each of ``threads`` threads updates the matrices with shorter sides of one length at a time.
    """
    shapes = (
        tuple((matrix.shape, matrix.stride(), matrix.dtype) for matrix in group) for group in group_by_side(matrices)
    )
    return sum(sorted(map(_muon_peak, shapes))[-threads:])


@cache
def _muon_peak(matrices: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]) -> int:
    """Compute the bytes of a step of Muon on matrices of one shape, strides and type each; plans need it many times."""
    memory = LiveMemory()
    with memory:
        parameters = [
            nn.Parameter(torch.empty_strided(*layout, dtype=dtype, device=CPU)) for *layout, dtype in matrices
        ]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer = Muon(parameters, lr=1.0, weight_decay=0.0)
        optimizer.step()  # makes the momentum, which is not temporary
    return int(memory.record(optimizer.step).max())
