"""An exponential moving average of the weights: the largest free gain in quality there is."""

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Averages a network's parameters with a decay that warms up: min(max_decay, 1 − (1 + step)^−¾).

    Without the warm-up the average would remember the random start for 1/(1 − max_decay) steps.
    """

    def __init__(self, network: nn.Module, max_decay: float) -> None:
        self.max_decay = max_decay
        self.names = [name for name, _ in network.named_parameters()]
        self.averages = [parameter.detach().clone() for parameter in network.parameters()]

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move towards the network's parameters as they are after ``step`` (1, 2, …) optimizer steps."""
        decay = min(self.max_decay, 1 - (1 + step) ** -0.75)
        torch._foreach_lerp_(self.averages, [p.detach() for p in network.parameters()], 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages under the names of the network's parameters."""
        return dict(zip(self.names, self.averages, strict=True))

    def load_state_dict(self, averages: dict[str, Tensor]) -> None:
        """Go on from ``averages``, as ``state_dict`` gave them."""
        for name, average in zip(self.names, self.averages, strict=True):
            average.copy_(averages[name])
