"""Where the components of an imported pipeline are: on the CPU, and copies on a device while they work there."""

from threading import Lock
from typing import NamedTuple

import torch
from torch import nn

from diffusion.common.device import free_memory
from diffusion.families.fine_tuning import TrainableSubset, adapted_layers, share

WEIGHTS_SHARE = 2 / 3
"""Share of a device's free memory for weights; the rest is for what is computed with them."""


class Resident(NamedTuple):
    """Weights that training keeps on a device, beside which only those of ``layers`` differ."""

    network: nn.Module
    layers: frozenset[str]

    @classmethod
    def of(cls, trained: TrainableSubset) -> "Resident":
        """Take the frozen weights below the adapter of ``trained``, on the device that they are on now."""
        return cls(trained.base, frozenset(adapted_layers(trained.network)))


class Placement:
    """Copies of a pipeline's components on a ``device``, which come when they are used.

    If not all fit beside each other, those that were used the longest time ago leave: text encoders, which work
    together, once all prompts are encoded. A ``resident`` network shares its weights with its component.
    """

    def __init__(self, device: torch.device, resident: Resident | None) -> None:
        self.device, self.resident = device, resident
        self.room = int(WEIGHTS_SHARE * free_memory(device))
        """Bytes for weights."""
        self.copies: dict[str, nn.Module] = {}
        """Components on the device by their names, the latest used last."""
        self._lock = Lock()

    def bring(self, name: str, component: nn.Module) -> nn.Module:
        """Return the copy of ``component`` on the device; others leave if they have to."""
        with self._lock:
            copy = self.copies.pop(name, None)
            if copy is None:
                self._make_room(name, weight_bytes(component))
                copy = self._copy(name, component)
            self.copies[name] = copy
            return copy

    def _make_room(self, name: str, size: int) -> None:
        for other in [*self.copies]:
            if size + sum(map(weight_bytes, self.copies.values())) <= self.room:
                return
            if not (name.startswith("text_encoder") and other.startswith("text_encoder")):
                del self.copies[other]

    def _copy(self, name: str, component: nn.Module) -> nn.Module:
        if self.resident is None or name not in dict(self.resident.network.named_children()):
            return share(component).to(self.device)
        copy = share(self.resident.network.get_submodule(name))
        for layer in self.resident.layers:
            owner, _, path = layer.partition(".")
            if owner == name:
                copy.set_submodule(path, share(component.get_submodule(path)).to(self.device))
        return copy


def weight_bytes(module: nn.Module) -> int:
    """Count the bytes of a module's weights."""
    return sum(weight.nbytes for weight in module.parameters())
