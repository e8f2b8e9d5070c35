"""Accelerator in Python, which finds on a machine without one what fails, or is slow, beside one only.

``register`` adds the device ``simulated`` to torch for the rest of the process, which should be one of its own. Its
tensors are wrappers of CPU tensors, which compute, and obey the rules of CUDA that nothing enforces on a CPU:

- tensors of both devices do not mix, except for CPU tensors without dimensions in pointwise operations, and indices;
- the device has a generator of its own, and refuses the CPU's;
- a copy to the CPU that does not wait has no contents before an event after it was waited for;
- what waits for the device is counted;
- its memory is counted, and what tensors take of it is not free.
"""

import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "simulated"
SCIENCE = str(Path(__file__).parents[2] / "diffusion")
SEED = 2**20
"""Apart from the seeds of the CPU's generator."""
aten = torch.ops.aten

CROSSING = {aten.copy_.default, aten._foreach_copy_.default, aten._to_copy.default}
"""Operations between devices."""
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
"""Operations whose indices may be on the CPU."""

FACTORIES = (
    "empty.memory_format",
    "empty_strided",
    # Others fill an empty tensor, or give an empty one another shape, which wrappers cannot have.
    *("arange", "arange.start", "arange.start_step", "eye", "eye.m", "tril_indices", "triu_indices"),
)


class SimulatedTensor(Tensor):
    """Tensor on the simulated device, whose numbers are those of ``payload``, on the CPU."""

    payload: Tensor
    was_channels_last = False
    """Whether it is the contiguous copy of a tensor that was not."""
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, payload: Tensor) -> "SimulatedTensor":
        tensor: SimulatedTensor = Tensor._make_wrapper_subclass(
            cls,
            payload.size(),
            strides=payload.stride(),
            storage_offset=payload.storage_offset(),
            dtype=payload.dtype,
            device=torch.device(NAME, 0),
        )
        tensor.payload = payload
        STATE.hold(payload)
        return tensor

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        check_mixing(func, args, kwargs)
        STATE.launched += 1
        if func in (aten.copy_.default, aten._to_copy.default):
            return copy(func, args, kwargs)
        if waits(func, args):
            STATE.wait(func.__name__)
        if kwargs.get("device") is not None:
            if torch.device(kwargs["device"]).type == "cpu":
                STATE.wait(func.__name__)
                return func(*payloads(args), **payloads(kwargs))
            kwargs["device"] = "cpu"
        inputs = payloads(args)
        if func is aten.native_group_norm_backward.default and args[1].was_channels_last:
            # Autograd takes such tensors as they are on a CPU alone, which adds in another order then.
            inputs = *(each.contiguous(memory_format=torch.channels_last) for each in inputs[:2]), *inputs[2:]
        with STATE.random_numbers(func):
            result = wrap(func(*inputs, **payloads(kwargs)), (*args, *kwargs.values()))
        if func is aten.clone.default and result.is_contiguous():
            result.was_channels_last = args[0].ndim == 4 and not args[0].is_contiguous()
        return result

    def __repr__(self) -> str:  # type: ignore[override]
        return f"SimulatedTensor({self.payload})"

    def tolist(self) -> Any:
        """Wait, as on CUDA; tensors with ``__torch_dispatch__`` lack it."""
        return self.cpu().tolist()

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The tensor without its history."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.payload = payloads(value)


@dataclass(eq=False)
class Copy:
    """Copy to the CPU that was begun."""

    target: Tensor
    contents: Tensor | None

    def finish(self) -> None:
        """Write the target, once."""
        if self.contents is not None:
            self.target.copy_(self.contents)
        self.contents = None


@dataclass
class State:
    """What the device did, and has yet to do."""

    waited: list[str] = field(default_factory=list)
    """Operations that waited for the device, each with its innermost line in the package ``diffusion``."""
    launched: int = 0
    """Number of operations."""
    live: int = 0
    """Bytes of all tensors that there are."""
    peak: int = 0
    """The most that they have been."""
    storages: set[int] = field(default_factory=set)
    copies: list[Copy] = field(default_factory=list)
    """Copies to the CPU that nothing has waited for."""
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(SEED))
    lock: Any = field(default_factory=RLock)
    libraries: list[torch.library.Library] = field(default_factory=list)
    """Kernels, which are there as long as these objects."""

    def hold(self, payload: Tensor) -> None:
        """Count the memory of a tensor until it is freed, once for all views."""
        storage = payload.untyped_storage()
        with self.lock:
            if (key := storage._cdata) not in self.storages:
                self.storages.add(key)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.free, key, storage.nbytes())

    def free(self, key: int, size: int) -> None:
        """Count the memory of a storage no more."""
        with self.lock:
            self.storages.remove(key)
            self.live -= size

    def wait(self, operation: str) -> None:
        """Note that an ``operation`` waits, and finish all work."""
        frame, line = sys._getframe(), ""
        while frame is not None and not line:
            if frame.f_code.co_filename.startswith(SCIENCE):
                line = f" at {frame.f_code.co_filename.removeprefix(SCIENCE + '/')}:{frame.f_lineno}"
            frame = frame.f_back  # type: ignore[assignment]
        with self.lock:
            self.waited.append(operation + line)
            self.finish(self.copies)

    def finish(self, copies: Sequence[Copy]) -> None:
        """Finish these ``copies``."""
        with self.lock:
            for copy in copies:
                copy.finish()
            self.copies = [copy for copy in self.copies if copy.contents is not None]

    @contextmanager
    def random_numbers(self, func: Any) -> Iterator[None]:
        """Have ``func`` take its random numbers, if any, from the device's generator."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            yield
            return
        with self.lock:
            state = torch.get_rng_state()
            torch.set_rng_state(self.generator.get_state())
            try:
                yield
            finally:
                self.generator.set_state(torch.get_rng_state())
                torch.set_rng_state(state)


STATE = State()


def payloads(value: Any) -> Any:
    """Replace simulated tensors in ``value`` by what they wrap."""
    return tree_map_only(SimulatedTensor, lambda tensor: tensor.payload, value)


def wrap(result: Any, arguments: Any) -> Any:
    """Wrap the tensors in ``result``; those of in-place operations are the ``arguments`` themselves."""
    known = {id(each.payload): each for each in tree_leaves(arguments) if isinstance(each, SimulatedTensor)}
    for tensor in known.values():
        if tensor.shape != tensor.payload.shape or tensor.stride() != tensor.payload.stride():
            raise NotImplementedError("an operation changed a shape in place, which is not simulated")
    return tree_map_only(Tensor, lambda each: known[id(each)] if id(each) in known else SimulatedTensor(each), result)


def is_cpu_tensor(value: Any) -> bool:
    """Whether ``value`` is a tensor, and not on the device."""
    return isinstance(value, Tensor) and not isinstance(value, SimulatedTensor)


def check_mixing(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise RuntimeError for CPU tensors and generators that CUDA refuses as arguments of ``func``."""
    values = [*args, *kwargs.values()]
    if any(isinstance(value, torch.Generator) for value in values):
        raise RuntimeError(f"{func}: expected a generator of the device {NAME}, and got the CPU's")
    if func in CROSSING:
        return
    is_in_place = func._schema.name.endswith("_") or "out" in kwargs
    if is_in_place or func in INDEXING:
        targets = tree_leaves([args[:1], kwargs.get("out", ())])
        if any(is_cpu_tensor(target) for target in targets):
            raise RuntimeError(f"{func}: the CPU's tensor is written from, or indexed by, one on {NAME}")
    if func in INDEXING:
        values = args[2:3]
    takes_numbers = torch.Tag.pointwise in func.tags or func in INDEXING
    for value in values:
        if is_cpu_tensor(value) and not value.ndim and takes_numbers:
            continue
        if any(is_cpu_tensor(leaf) for leaf in tree_leaves(value)):
            raise RuntimeError(f"{func}: expected all tensors to be on one device, and got {NAME} and cpu")


def waits(func: Any, args: Sequence[Any]) -> bool:
    """Whether ``func`` waits for the device: its result, or the result's shape, is known to the CPU."""
    if func in INDEXING:
        indices = [index for index in args[1] if index is not None]
        return any(is_cpu_tensor(index) or index.dtype in (torch.bool, torch.uint8) for index in indices)
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def copy(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Copy a tensor, possibly between devices, with or without waiting."""
    if func is aten.copy_.default:
        target, source = args[:2]
        transfer(target, source, args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        return target
    goes_to_cpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
    non_blocking = kwargs.pop("non_blocking", False)
    result = func(args[0].payload, **kwargs | {"device": "cpu"})
    if not goes_to_cpu:
        return SimulatedTensor(result)
    target = torch.empty_like(result)
    transfer(target, SimulatedTensor(result), non_blocking)
    return target


def transfer(target: Tensor, source: Tensor, non_blocking: bool) -> None:
    """Copy ``source`` to ``target``, of which one or both are on the device."""
    if isinstance(target, SimulatedTensor):
        target.payload.copy_(payloads(source))
        # Without pinned memory CUDA waits until it has read the source.
        if is_cpu_tensor(source) and source.ndim and not (non_blocking and getattr(source, "in_pinned_memory", False)):
            STATE.wait("copy to the device")
    elif non_blocking:
        # Not what was computed, and not finite.
        target.fill_(float("nan") if target.is_floating_point() else 0)
        with STATE.lock:
            STATE.copies.append(Copy(target, payloads(source).clone()))
    else:
        target.copy_(payloads(source))
        STATE.wait("copy to the CPU")


class Event:
    """Place in the work of the device."""

    def __init__(self) -> None:
        self.copies, self.launched = [*STATE.copies], STATE.launched

    def synchronize(self) -> None:
        """Wait for the work before this place: counted if none was begun behind it, so that the device idles."""
        if STATE.launched == self.launched and any(copy.contents is not None for copy in self.copies):
            STATE.wait("event")
        STATE.finish(self.copies)


class Stream:
    """The only stream of the device."""

    def record_event(self) -> Event:
        """Mark the place after all work so far."""
        return Event()


class Module:
    """What ``torch.simulated`` is, after ``torch.cuda``."""

    Event = Event

    def __init__(self, memory: int) -> None:
        self.memory = memory
        """Bytes of memory."""

    def is_available(self) -> bool:
        """There is a device."""
        return True

    def is_initialized(self) -> bool:
        """Nothing is left to do."""
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        """There is one."""
        return 1

    def current_device(self) -> int:
        """It is the first one."""
        return 0

    def set_device(self, device: torch.device) -> None:
        """Only the first can be chosen."""
        assert torch.device(device).index == 0

    def get_device_name(self, device: torch.device | None = None) -> str:
        """Name the hardware."""
        return "simulated device"

    def current_stream(self, device: torch.device | None = None) -> Stream:
        """Return the only stream."""
        return Stream()

    def synchronize(self, device: torch.device | None = None) -> None:
        """Wait for all work."""
        STATE.wait("synchronize")

    def mem_get_info(self, device: torch.device | None = None) -> tuple[int, int]:
        """Count free bytes and all."""
        return self.memory - STATE.live, self.memory

    def memory_reserved(self, device: torch.device | None = None) -> int:
        """Count the bytes that tensors take: nothing is cached."""
        return STATE.live

    def memory_allocated(self, device: torch.device | None = None) -> int:
        """Count the bytes that tensors take."""
        return STATE.live

    def max_memory_allocated(self, device: torch.device | None = None) -> int:
        """Count the most bytes that tensors took."""
        return STATE.peak

    def empty_cache(self) -> None:
        """Nothing is cached."""

    def manual_seed_all(self, seed: int) -> None:
        """Seed the generator of the device, to other numbers than the CPU's."""
        STATE.generator.manual_seed(SEED + seed)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Types of autocast, which changes no operation here."""
        return [torch.bfloat16]


def register(memory: int = 2**34) -> State:
    """Add the device, with ``memory`` bytes, to this process, and return its state; call it before other imports."""
    _setup_privateuseone_for_python_backend(NAME, Module(memory))
    # Wrappers have no views among inference tensors.
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode else nullcontext()  # type: ignore[misc, assignment]
    # As ``Module.to`` does for CUDA, parameters stay the same objects.
    torch.__future__.set_swap_module_params_on_conversion(True)
    # Attention of the CPU's kernel gives other bits than that of matrix products, which other devices fall back to.
    torch.backends.cuda.enable_flash_sdp(False)
    library = torch.library.Library("aten", "IMPL")
    for name in FACTORIES:
        library.impl(name, partial(_make, _operation(name)), "PrivateUse1")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::") and has_kernel(name, "CPU") and has_kernel(name, "CompositeImplicitAutograd"):
            # Else made of other operations, to other bits.
            library.impl(name, partial(_compute, _operation(name.removeprefix("aten::"))), "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    library.impl("_pin_memory", _pin_memory, "CPU")
    STATE.libraries.append(library)
    return STATE


def _operation(name: str) -> Any:
    name, _, overload = name.partition(".")
    return getattr(getattr(aten, name), overload or "default")


def _make(operation: Any, *args: Any, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> Tensor:
    return SimulatedTensor(operation(*args, **kwargs, device="cpu"))


def _compute(operation: Any, *args: Any, **kwargs: Any) -> Any:
    return wrap(operation(*payloads(args), **payloads(kwargs)), args)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy where torch has taken the key of Python classes away, as in ``torch.tensor``."""
    transfer(target, source, non_blocking)
    return target


def _pin_memory(tensor: Tensor, device: Any = None) -> Tensor:
    # Of the same strides, so that one that repeats elements fails, as on CUDA.
    pinned = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)
    pinned.in_pinned_memory = True  # type: ignore[attr-defined]
    return pinned
