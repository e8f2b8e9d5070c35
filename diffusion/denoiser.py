"""A network as a denoiser: from a noisy picture and its σ to the clean one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.models.config import Prediction
from diffusion.objective import to_x0
from diffusion.process import NoiseSchedule, scales


@dataclass(frozen=True)
class Denoiser:
    """D(x; σ) for x = x_0 + σ ε, whatever the network predicts (the view of arXiv 2206.00364).

    Samplers see nothing else of a model. ``clip`` keeps the estimate inside [−1, 1], the range of pictures.
    """

    network: Callable[[Tensor, Tensor], Tensor]
    schedule: NoiseSchedule
    prediction: Prediction
    clip: bool = True

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Estimate x_0 (N, C, H, W) from ``x`` of the same shape; ``sigma`` is a number or (N,)."""
        sigma = sigma.to(x.device).double().expand(len(x))
        alpha_bar = (1 / (1 + sigma**2))[:, None, None, None]
        signal, _ = scales(alpha_bar, x)
        x_t = signal * x
        output = self.network(x_t, self.time(sigma)).to(x.dtype)
        x0 = to_x0(self.prediction, output, x_t, alpha_bar)
        return x0.clamp(-1, 1) if self.clip else x0

    def time(self, sigma: Tensor) -> Tensor:
        """The step t, not always whole, at which the schedule has this σ: linear in ln σ between steps."""
        table = self.schedule.sigmas.to(sigma.device).log()
        value = sigma.double().log().clamp(table[0], table[-1])
        high = torch.searchsorted(table, value).clamp(1, len(table) - 1)
        low = high - 1
        return (low + (value - table[low]) / (table[high] - table[low])).float()
