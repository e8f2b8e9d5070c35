"""Where the components of an imported pipeline are: on the CPU, and copies on a device while they work there."""

from threading import Lock
from typing import NamedTuple

import torch
from torch import nn

from diffusion.common.device import free_memory, total_memory
from diffusion.families.fine_tuning import TrainableSubset, adapted_layers, share
from diffusion.families.narrow_weights import narrow_weights, widen_weights

WEIGHTS_SHARE = 2 / 3
"""Share of a device's free memory for weights; the rest is for what is computed with them."""
ENCODERS_SHARE = 0.9
"""Share of all its memory that text encoders may take, which compute with little else."""


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
    together, once all prompts are encoded. A ``resident`` network shares its weights with its component. Under autocast
    weights that 16 bits hold exactly have 16 bits.
    """

    def __init__(self, device: torch.device, resident: Resident | None) -> None:
        self.device, self.resident = device, resident
        self.room = int(WEIGHTS_SHARE * free_memory(device))
        """Bytes for weights."""
        self.copies: dict[str, nn.Module] = {}
        """Components on the device by their names, the latest used last."""
        self._narrow: set[str] = set()
        """Those with weights of 16 bits."""
        self._lock = Lock()

    def has_room(self, size: int) -> bool:
        """Whether weights of ``size`` bytes fit on the device when it is empty, whatever else is there now."""
        return size <= ENCODERS_SHARE * total_memory(self.device)

    def bring(self, name: str, component: nn.Module) -> nn.Module:
        """Return the copy of ``component`` on the device; others leave if they have to."""
        is_narrow = torch.is_autocast_enabled(self.device.type)
        with self._lock:
            copy = self.copies.pop(name, None)
            if copy is None or is_narrow != (name in self._narrow):
                del copy
                self._make_room(name, weight_bytes(component))
                copy = self._copy(name, component, is_narrow)
            self.copies[name] = copy
            (self._narrow.add if is_narrow else self._narrow.discard)(name)
            return copy

    def _make_room(self, name: str, size: int) -> None:
        for other in [*self.copies]:
            if size + sum(map(weight_bytes, self.copies.values())) <= self.room:
                return
            if not (name.startswith("text_encoder") and other.startswith("text_encoder")):
                del self.copies[other]

    def _copy(self, name: str, component: nn.Module, is_narrow: bool) -> nn.Module:
        if self.resident is None or name not in dict(self.resident.network.named_children()):
            copy = share(component)
        else:
            copy = share(self.resident.network.get_submodule(name))
            for layer in self.resident.layers:
                owner, _, path = layer.partition(".")
                if owner == name:
                    copy.set_submodule(path, share(component.get_submodule(path)))
            if not is_narrow:
                widen_weights(copy)
        if is_narrow:
            narrow_weights(copy, self.device)
        return copy.to(self.device)


def weight_bytes(module: nn.Module) -> int:
    """Count the bytes of a module's weights."""
    return sum(weight.nbytes for weight in module.parameters())
