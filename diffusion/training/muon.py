"""Muon: momentum whose singular values are made equal, for the matrices of hidden layers.

After K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); for diffusion models studied
in arXiv 2510.19376. ``torch.optim.Muon`` takes 2-D weights only and computes in bf16, which CPUs without AMX emulate.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
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
            shares = group_by_side(group["params"])
            list((self.threads.map if self.threads else map)(partial(self._update, group), shares))

    @torch.no_grad()
    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Update ``parameters``, whose matrices have one length of the shorter side."""
        skip = torch.zeros((), device=parameters[0].device) if self.found_inf is None else self.found_inf
        momenta, updates = [self.state[parameter]["momentum"] for parameter in parameters], list[Tensor]()
        for parameter, momentum in zip(parameters, momenta, strict=True):
            assert parameter.grad is not None
            # The average of the momentum with itself leaves it as it is.
            updates.append(torch.where(skip == 0, parameter.grad, momentum))
        torch._foreach_lerp_(momenta, updates, 1 - MOMENTUM)
        torch._foreach_lerp_(updates, momenta, MOMENTUM)
        changes = orthogonalize([change.flatten(1) for change in updates])
        scale = torch.where(skip == 0, group["lr"], 0.0)
        torch._foreach_mul_(changes, [RMS * max(change.shape) ** 0.5 for change in changes])
        torch._foreach_mul_(changes, scale)
        torch._foreach_mul_(parameters, 1 - scale * group["weight_decay"])
        torch._foreach_sub_(parameters, [change.view(p.shape) for change, p in zip(changes, parameters, strict=True)])


def group_by_side(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group ``parameters`` by the shorter side of their matrices: a group is updated together.

    The group with the most elements is the first, so that threads get even shares.
    """
    groups = defaultdict[int, list[Tensor]](list)
    for parameter in parameters:
        groups[min(parameter.flatten(1).shape)].append(parameter)
    return sorted(groups.values(), key=lambda group: -sum(map(torch.numel, group)))


def orthogonalize(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Bring the singular values of ``matrices``, (M, N) each, to between 0.7 and 1.2 by Newton–Schulz iterations.

    Each multiplies X, which begins with norm 1, by the factor a I + b G + c G², G = X Xᵀ. Only G and the product of the
    factors are iterated: they are square, and of one size, as the shorter sides of all matrices are equal.
    """
    wide = [matrix if len(matrix) <= matrix.shape[1] else matrix.mT for matrix in matrices]
    gram = torch.stack([matrix @ matrix.mT for matrix in wide])
    norms = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp(min=1e-14)
    gram = gram / norms
    factor = _factor(gram)
    product = norms.rsqrt() * factor
    for _ in range(ITERATIONS - 1):
        gram = factor @ gram @ factor
        factor = _factor(gram)
        product = factor @ product
    outputs = [factors @ matrix for factors, matrix in zip(product, wide, strict=True)]
    return [out if len(matrix) <= matrix.shape[1] else out.mT for out, matrix in zip(outputs, matrices, strict=True)]


def _factor(gram: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=1, dim2=2).add_(a)
    return factor
