"""AdamW whose moments take 8 bits (arXiv 2110.02861): a quarter of the memory, on any device.

The second moment is kept as its root, of which the same levels hold twice as many orders of magnitude.

``bitsandbytes`` has the same idea in kernels for CUDA. These formulas are the same on every device, and skip a step
there without waiting for it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 256
"""Numbers that have one scale."""
SMALL = 4096
"""Tensors of fewer numbers keep moments of 32 bits, as in ``bitsandbytes``: they take little memory."""
DIGITS = 7
"""Orders of magnitude below a block's largest number."""


def levels(signed: bool) -> Tensor:
    """The numbers that codes stand for, ascending, in (−1, 1] or (0, 1] (section 1.3, dynamic tree quantization).

    Each order of magnitude has twice as many as the one below it, in equal distances: small numbers keep their order
    of magnitude, and large ones their digits. Only signed ones have 0: a root that became 0 would be divided by.
    """
    pieces = [torch.ones(1, dtype=torch.float64)]
    for order in range(DIGITS):
        edges = torch.linspace(0.1, 1, 2 ** (order + 1 - signed) + 1, dtype=torch.float64)
        pieces.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (order + 1 - DIGITS))
    numbers = torch.cat(pieces)
    if signed:
        numbers = torch.cat([numbers, torch.zeros(1, dtype=torch.float64), -numbers[1:]])
    return numbers.sort().values.float()


def encode(values: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Round ``values`` to the nearest of ``numbers`` times the scale of their block.

    Returns codes, (⌈n/256⌉, 256) uint8, and scales, (⌈n/256⌉, 1) float32, which are the blocks' largest magnitudes.
    """
    flat = values.flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True)
    relative = blocks / torch.where(scales == 0, 1.0, scales)
    return torch.bucketize(relative, (numbers[1:] + numbers[:-1]) / 2).to(torch.uint8), scales


def decode(codes: Tensor, scales: Tensor, numbers: Tensor, shape: torch.Size) -> Tensor:
    """Undo ``encode`` for values of ``shape``: float32."""
    return (numbers[codes.int()] * scales).flatten()[: shape.numel()].view(shape)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with moments of 8 bits, decoded for one parameter at a time.

    If the attribute ``found_inf``, (), is not 0, ``step`` changes nothing, as with torch's fused optimizers: without
    waiting for the device.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        device = self.param_groups[0]["params"][0].device
        self.levels = {"average": levels(signed=True).to(device), "root_average": levels(signed=False).to(device)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters, each of which has a gradient."""
        group: dict[str, Any] = self.param_groups[0]
        beta1, beta2 = group["betas"]
        for parameter in group["params"]:
            state, gradient = self._state(parameter), parameter.grad
            is_taken = torch.ones_like(state["steps"]) if self.found_inf is None else self.found_inf == 0
            steps = state["steps"] + is_taken
            average = self._read(state, "average", parameter).lerp(gradient, 1 - beta1)
            root_average = (
                self._read(state, "root_average", parameter).square().lerp(gradient.square(), 1 - beta2).sqrt()
            )
            change = average / (1 - beta1**steps) / (root_average / (1 - beta2**steps).sqrt() + 1e-8)
            change = torch.where(is_taken == 0, 0.0, change + group["weight_decay"] * parameter)
            parameter.sub_(change * group["lr"])
            new = self._stored("average", average) | self._stored("root_average", root_average)
            state |= {name: torch.where(is_taken == 0, state[name], value) for name, value in new.items()}
            state["steps"] = steps

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the moments with the types that they have, not the parameters'."""
        for number, parameter in enumerate(self.param_groups[0]["params"]):
            state = state_dict["state"].get(number, {})
            self.state[parameter] = {name: value.to(parameter.device) for name, value in state.items()}

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the moments of ``parameter``, at first zeros."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["steps"] = parameter.new_zeros((), dtype=torch.float32)
            for name in self.levels:
                state |= self._stored(name, torch.zeros_like(parameter))
        return state

    def _stored(self, name: str, moment: Tensor) -> dict[str, Tensor]:
        if moment.numel() < SMALL:
            return {name: moment}
        codes, scales = encode(moment, self.levels[name])
        return {f"{name}_codes": codes, f"{name}_scales": scales}

    def _read(self, state: Mapping[str, Tensor], name: str, parameter: Tensor) -> Tensor:
        if name in state:
            return state[name]
        return decode(state[f"{name}_codes"], state[f"{name}_scales"], self.levels[name], parameter.shape)
