"""Moving averages of the weights over training: exponential (EMA) and power-function."""

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor, nn


class WeightAverage(ABC):
    """Moving average of a network's parameters; subclasses define the decay."""

    def __init__(self, network: nn.Module) -> None:
        self.names = [name for name, _ in network.named_parameters()]
        self.averages = [parameter.detach().clone() for parameter in network.parameters()]

    @abstractmethod
    def decay(self, step: int) -> float:
        """Return the decay at ``step`` (1, 2, …), from 0 to 1."""

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Update the averages with the network's parameters after ``step`` (1, 2, …) optimizer steps."""
        torch._foreach_lerp_(self.averages, [p.detach() for p in network.parameters()], 1 - self.decay(step))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages under the names of the network's parameters."""
        return dict(zip(self.names, self.averages, strict=True))

    def load_state_dict(self, averages: dict[str, Tensor]) -> None:
        """Restore ``averages`` as returned by ``state_dict``."""
        for name, average in zip(self.names, self.averages, strict=True):
            average.copy_(averages[name])


class ExponentialAverage(WeightAverage):
    """Exponential average whose decay warms up: min(max_decay, 1 − (1 + step)^−¾).

    Without the warm-up the average would include the random initial weights for 1/(1 − max_decay) steps.
    """

    def __init__(self, network: nn.Module, max_decay: float) -> None:
        super().__init__(network)
        self.max_decay = max_decay

    def decay(self, step: int) -> float:
        """Return the decay at ``step``."""
        return min(self.max_decay, 1 - float((1 + step) ** -0.75))


class PowerAverage(WeightAverage):
    """Power-function average: step τ of t has weight τ^γ, so that its memory grows in proportion to training time.

    ``length`` is the standard deviation of those weights over τ/t (arXiv 2312.02696, equations 1 to 4).
    """

    def __init__(self, network: nn.Module, length: float) -> None:
        super().__init__(network)
        self.gamma = power(length)

    def decay(self, step: int) -> float:
        """Return the decay at ``step``, 0 at the first."""
        return float((1 - 1 / step) ** (self.gamma + 1))


def power(length: float) -> float:
    """Compute γ of the power-function average with relative std ``length`` (arXiv 2312.02696, equation 126)."""
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return float(roots[np.isreal(roots)].real.max())


def mixture(snapshots: list[tuple[int, float]], images: int, length: float) -> list[float]:
    """Compute the weight of each of ``snapshots`` in the average of std ``length`` at ``images``.

    A snapshot is a power-function average of some std at some number of images. The weights are the least-squares fit
    of the snapshots' weight functions to the target's (arXiv 2312.02696, section 3.2).
    """
    profiles = [(at, power(each)) for at, each in snapshots]
    overlaps = np.array([[_overlap(one, other) for other in profiles] for one in profiles])
    target = np.array([_overlap(one, (images, power(length))) for one in profiles])
    return [float(share) for share in np.linalg.lstsq(overlaps, target, rcond=None)[0]]


def _overlap(one: tuple[int, float], other: tuple[int, float]) -> float:
    """Compute ∫ p q of weight functions p(τ) = (γ + 1) τ^γ / t^(γ + 1) up to t (arXiv 2312.02696, appendix C.2)."""
    (t, gamma), (s, delta) = sorted((one, other))
    # With t ≤ s. In logarithms, as the powers overflow a float.
    shape = (gamma + 1) * (delta + 1) / (gamma + delta + 1)
    return shape * math.exp(delta * math.log(t) - (delta + 1) * math.log(s))
