"""A network as a denoiser: from a noisy image and its σ to the clean one."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from diffusion.process.parametrization import Parametrization
from diffusion.process.samplers import fixed_large, fixed_small
from diffusion.process.schedules import NoiseSchedule
from diffusion.process.variance import deviation_between


@dataclass(frozen=True)
class Denoiser:
    """D(x; σ) for x = x_0 + σ ε, whatever the network predicts (the view of arXiv 2206.00364).

    Samplers see nothing else of a model. ``clip`` keeps the estimate inside [−1, 1], the range of images;
    ``learned_variance`` says that there is a ``posterior``.
    """

    network: Callable[[Tensor, Tensor], Tensor]
    schedule: NoiseSchedule
    parametrization: Parametrization
    clip: bool = True
    learned_variance: bool = False
    around: Tensor | None = None
    """What is known of the clean images, (N, C, H, W): the network is asked about what they have beyond it. None:
    about them."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Estimate x_0 (N, C, H, W) from ``x`` of the same shape; ``sigma`` is a number or (N,)."""
        x0, _ = self.answer(x, sigma)
        return x0

    def posterior(self, x: Tensor, sigma: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """The estimate, and the standard deviation of each value of x at σ = ``following``, as the network learned it.

        Both (N, C, H, W); ``sigma`` and the lower ``following`` are numbers.
        """
        x0, v = self.answer(x, sigma)
        return x0, deviation_between(v, fixed_small(sigma, following), fixed_large(sigma, following))

    def answer(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The estimate of x_0, and what there is besides: v (N, C, H, W) of a learned variance, or no channels."""
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
