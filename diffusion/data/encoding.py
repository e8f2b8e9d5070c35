"""Work of a network on the items of a fan-out, with the bits of the process that hands it out."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from threading import RLock
from typing import Any, Generic, TypeVar

import torch

from diffusion.common.config import DeviceName
from diffusion.common.device import compute_deterministically, device_name, resolve_device
from diffusion.common.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class NetworkWork(Generic[Item, Result]):
    """Function of items by a network that is loaded once per process, and shared by its threads.

    Raises UserError in a worker that would give other bits.
    """

    load: Callable[[], Callable[[Item], Result]]
    """Loads the function, for ``device``; pickled for other processes."""
    device: DeviceName
    hardware: str
    """What determines the bits: see ``hardware_of``."""
    _lock: Any = field(default_factory=RLock, init=False, compare=False)

    @classmethod
    def here(cls, load: Callable[[], Callable[[Item], Result]], device: DeviceName) -> "NetworkWork[Item, Result]":
        """Make work with the bits that this process gives."""
        return cls(load, device, hardware_of(device))

    def __reduce__(self) -> Any:
        return type(self), (self.load, self.device, self.hardware)

    @cached_property
    def _loaded(self) -> Callable[[Item], Result]:
        if (hardware := hardware_of(self.device)) != self.hardware:
            raise UserError(
                f"a worker of ingest.runner would give other bits ({hardware}) than this process ({self.hardware}): "
                "use machines like this one, or threads"
            )
        return self.load()

    def __call__(self, item: Item) -> Result:
        """Compute the function, in one thread; on a GPU, which is in parallel by itself, threads take turns."""
        torch.set_num_threads(1)
        device = resolve_device(self.device)
        with self._lock:
            compute = self._loaded
        with nullcontext() if device.type == "cpu" else self._lock, compute_deterministically(device):
            return compute(item)


def hardware_of(device: DeviceName) -> str:
    """Name what determines the bits of a network besides its weights: hardware and torch."""
    return f"{device_name(resolve_device(device))}, torch {torch.__version__}"
