"""A network as a denoiser: from a noisy picture and its σ to the clean one."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from diffusion.objective import Parametrization
from diffusion.process import NoiseSchedule


@dataclass(frozen=True)
class Denoiser:
    """D(x; σ) for x = x_0 + σ ε, whatever the network predicts (the view of arXiv 2206.00364).

    Samplers see nothing else of a model. ``clip`` keeps the estimate inside [−1, 1], the range of pictures.
    """

    network: Callable[[Tensor, Tensor], Tensor]
    schedule: NoiseSchedule
    parametrization: Parametrization
    clip: bool = True

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Estimate x_0 (N, C, H, W) from ``x`` of the same shape; ``sigma`` is a number or (N,)."""
        sigma = sigma.to(x.device).double().expand(len(x))
        scaled = self.parametrization.c_in(sigma).to(x.dtype)[:, None, None, None] * x
        output = self.network(scaled, self.schedule.time(sigma)).to(x.dtype)
        x0 = self.parametrization.to_x0(output, x, sigma)
        return x0.clamp(-1, 1) if self.clip else x0
