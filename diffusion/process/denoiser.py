"""Denoiser: a network as a function from a noisy image and its σ to the clean one."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from diffusion.process.parametrization import Parametrization
from diffusion.process.samplers import fixed_large, fixed_small
from diffusion.process.schedules import NoiseSchedule
from diffusion.process.variance import deviation_between


@dataclass(frozen=True)
class Denoiser:
    """D(x; σ) for x = x_0 + σ ε, for any prediction of the network (arXiv 2206.00364).

    It is the only interface between samplers and models. ``clip`` limits the estimate to [−1, 1], the range of images;
    ``learned_variance`` says whether ``posterior`` is available.
    """

    network: Callable[[Tensor, Tensor], Tensor]
    schedule: NoiseSchedule
    parametrization: Parametrization
    clip: bool = True
    learned_variance: bool = False
    around: Tensor | None = None
    """Known part of the clean images, (N, C, H, W), to which the network predicts the residual; None: it predicts the
    images themselves."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Estimate x_0 (N, C, H, W) from ``x`` of the same shape; ``sigma`` is a number or (N,)."""
        x0, _ = self.answer(x, sigma)
        return x0

    def posterior(self, x: Tensor, sigma: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """Estimate x_0, and the learned standard deviation of each value of x at σ = ``following``.

        Both are (N, C, H, W); ``sigma`` and the lower ``following`` are numbers.
        """
        x0, v = self.answer(x, sigma)
        return x0, deviation_between(v, fixed_small(sigma, following), fixed_large(sigma, following))

    def answer(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Estimate x_0; also returns v (N, C, H, W) of a learned variance, or a tensor without channels."""
        sigma = sigma.to(x.device).double().expand(len(x))
        if self.around is not None:
            x = x - self.around
        scaled = self.parametrization.c_in(sigma).to(x.dtype)[:, None, None, None] * x
        output = self.network(scaled, self.schedule.time(sigma)).to(x.dtype)
        prediction, v = output.tensor_split([x.shape[1]], dim=1)
        x0 = self.parametrization.to_x0(prediction, x, sigma)
        if self.around is not None:
            x0 = x0 + self.around
        return x0.clamp(-1, 1) if self.clip else x0, v
