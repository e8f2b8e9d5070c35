"""Prodigy: Adam whose learning rate is estimated from how far the weights have moved (arXiv 2306.06101).

The package ``prodigyopt`` has the same formulas, but waits for the device at each step, cannot skip one there, and
keeps its estimate outside of the tensors that a checkpoint has.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

INITIAL = 1e-6
"""d_0, the first estimate of the distance, small against any that is found."""


class Prodigy(torch.optim.Optimizer):
    """Prodigy with decoupled weight decay, bias correction and the safeguard for a warm-up.

    ``lr`` multiplies the rate that is found: 1, or a schedule from 1 to 0. If the attribute ``found_inf``, (), is not
    0, ``step`` changes nothing, as with torch's fused optimizers: without waiting for the device.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters, each of which has a gradient (algorithm 4)."""
        group: dict[str, Any] = self.param_groups[0]
        parameters: list[Tensor] = group["params"]
        states = [self._state(parameter) for parameter in parameters]
        first, (beta1, beta2) = states[0], group["betas"]
        distance, steps = first["distance"], first["steps"]
        is_taken = torch.ones_like(steps) if self.found_inf is None else (self.found_inf == 0).to(steps)
        rate = group["lr"] * (1 - beta2 ** (steps + 1)).sqrt() / (1 - beta1 ** (steps + 1)) * distance
        # A step that is not taken keeps all sums.
        keep1, keep2, keep3 = ((beta - 1) * is_taken + 1 for beta in (beta1, beta2, beta2**0.5))
        relative = distance / INITIAL
        moved, total = torch.zeros_like(distance), torch.zeros_like(distance)
        for parameter, state in zip(parameters, states, strict=True):
            assert parameter.grad is not None
            gradient = torch.where(is_taken == 0, 0.0, parameter.grad)
            moved += (gradient * (state["origin"] - parameter)).sum()
            state["average"].mul_(keep1).add_(gradient * ((1 - beta1) * distance))
            state["square_average"].mul_(keep2).add_(gradient.square() * ((1 - beta2) * distance.square()))
            state["gradients"].mul_(keep3).add_(gradient * (relative * distance))
            total += state["gradients"].abs().sum()
        if group["lr"] > 0:
            first["numerator"].mul_(keep3).add_(relative * rate * moved)
            estimate = torch.where(total == 0, 0.0, first["numerator"] / total)
            first["distance"] = torch.maximum(distance, estimate)
        for parameter, state in zip(parameters, states, strict=True):
            change = state["average"] / (state["square_average"].sqrt() + distance * 1e-8)
            change = torch.where(is_taken == 0, 0.0, change + group["weight_decay"] * parameter)
            parameter.sub_(change * rate)
        first["steps"] = steps + is_taken

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the moments of ``parameter``; those of the first one have the estimate as well."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["origin"] = parameter.clone()
            state |= {name: torch.zeros_like(parameter) for name in ("average", "square_average", "gradients")}
            if parameter is self.param_groups[0]["params"][0]:
                zero = parameter.new_zeros((), dtype=torch.float32)
                state |= {"distance": zero + INITIAL, "numerator": zero, "steps": zero.clone()}
        return state
