"""Muon: momentum whose singular values are made equal, for the matrices of hidden layers.

After K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); for diffusion models studied
in arXiv 2510.19376. ``torch.optim.Muon`` takes 2-D weights only and computes in bf16, which CPUs without AMX emulate.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, chosen by its authors so that small singular values grow fastest."""
ITERATIONS, MOMENTUM = 5, 0.95
RMS = 0.2
"""Root mean square of an update relative to the learning rate: about AdamW's, so that both share one learning rate
(arXiv 2502.16982, section 2.2)."""


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay.

    Convolutions (O, I, k, k) count as matrices (O, I·k·k). If the attribute ``found_inf``, (), is not 0, ``step``
    changes nothing, as with torch's fused optimizers: without waiting for the device.
    """

    found_inf: Tensor | None = None
    threads: Executor | None = None
    """Threads that share the matrices, which changes no bits; None: the calling thread alone."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters, each of which has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            shares = group_by_shape(group["params"])
            list((self.threads.map if self.threads else map)(partial(self._update, group), shares))

    @torch.no_grad()
    def _update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        """Update ``parameters`` of one shape."""
        skip = torch.zeros((), device=parameters[0].device) if self.found_inf is None else self.found_inf
        # lerp by 0 leaves the momentum as it is.
        weight = torch.where(skip == 0, 1 - MOMENTUM, 0.0)
        scale = torch.where(skip == 0, group["lr"], 0.0)
        matrices = []
        for parameter in parameters:
            assert parameter.grad is not None
            gradient = torch.where(skip == 0, parameter.grad, 0)
            momentum = self.state[parameter]["momentum"].lerp_(gradient, weight)
            matrices.append(gradient.lerp(momentum, MOMENTUM).flatten(1))
        changes = orthogonalize(torch.stack(matrices)) * RMS * max(matrices[0].shape) ** 0.5
        for parameter, change in zip(parameters, changes, strict=True):
            parameter.mul_(1 - scale * group["weight_decay"]).sub_(scale * change.view(parameter.shape))


def group_by_shape(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group ``parameters`` by the shape of their matrices, which are updated together: hidden layers have few shapes.

    The group with the most elements is the first, so that threads get even shares.
    """
    groups = defaultdict[torch.Size, list[nn.Parameter]](list)
    for parameter in parameters:
        groups[parameter.flatten(1).shape].append(parameter)
    return sorted(groups.values(), key=lambda each: -len(each) * each[0].numel())


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of ``matrices`` (B, M, N) to between 0.7 and 1.2 by Newton–Schulz iterations."""
    a, b, c = COEFFICIENTS
    wide: Tensor = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if matrices.shape[1] <= matrices.shape[2] else wide.mT
