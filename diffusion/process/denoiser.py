"""Denoiser, a network as a function from a noisy image and its σ to the clean one; and guidance between two of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.common.device import copy_to_device
from diffusion.process.likelihood import broadcast_to_images, interpolate_deviation
from diffusion.process.parametrization import Parametrization
from diffusion.process.samplers import Denoise, fixed_large, fixed_small
from diffusion.process.schedules import NoiseSchedule


@dataclass(frozen=True)
class Denoiser:
    """D(x; σ) for x = x_0 + σ ε, for any prediction of the network (arXiv 2206.00364).

    ``clip`` limits the estimate to [−1, 1], the range of images; with ``learned_variance`` there is a ``posterior``.
    """

    network: Callable[[Tensor, Tensor], Tensor]
    schedule: NoiseSchedule
    parametrization: Parametrization
    clip: bool = True
    learned_variance: bool = False
    around: Tensor | None = None
    """Known part of the clean images, broadcast to (N, C, H, W): their mean, or for super-resolution the small images
    enlarged. The network predicts the residual; None: it predicts the images themselves."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Estimate x_0 (N, C, H, W) from ``x`` of the same shape; ``sigma`` is a number or (N,)."""
        x0, _ = self.estimate(x, sigma)
        return x0

    def posterior(self, x: Tensor, sigma: Tensor, next_sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Estimate x_0, and the learned standard deviation of x at the lower σ ``next_sigma``: both (N, C, H, W)."""
        x0, v = self.estimate(x, sigma)
        return x0, interpolate_deviation(v, fixed_small(sigma, next_sigma), fixed_large(sigma, next_sigma))

    def estimate(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Estimate x_0; also returns v (N, C, H, W) of a learned variance, or a tensor without channels."""
        sigma = copy_to_device(sigma, x.device).double().expand(len(x))
        center = None if self.around is None else copy_to_device(self.around, x.device).to(x.dtype)
        if center is not None:
            x = x - center
        inputs = broadcast_to_images(x, self.parametrization.c_in(sigma)) * x
        output = self.network(inputs, self.schedule.time(sigma)).to(x.dtype)
        prediction, v = output.tensor_split([x.shape[1]], dim=1)
        x0 = self.parametrization.to_x0(prediction, x, sigma)
        if center is not None:
            x0 = x0 + center
        return x0.clamp(-1, 1) if self.clip else x0, v


@dataclass(frozen=True)
class ReportingDenoiser:
    """Denoiser that reports how many of the steps between ``sigmas``, falling to 0, are done, and how many there are.

    It is called at the start of each step, and again within one by some samplers, or after going back (``repaint``).
    """

    denoise: Denoise
    sigmas: Tensor
    report: Callable[[int, int], None]

    @property
    def learned_variance(self) -> bool:
        """Whether there is a ``posterior``."""
        return getattr(self.denoise, "learned_variance", False)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Estimate x_0 (N, C, H, W) from ``x`` of the same shape."""
        self._report(sigma)
        return self.denoise(x, sigma)

    def posterior(self, x: Tensor, sigma: Tensor, next_sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Estimate x_0, and the learned standard deviation of x at ``next_sigma``."""
        self._report(sigma)
        return self.denoise.posterior(x, sigma, next_sigma)  # type: ignore[attr-defined, no-any-return]

    def _report(self, sigma: Tensor) -> None:
        self.report(int((self.sigmas[:-1] > float(sigma)).sum()), len(self.sigmas) - 1)


def apply_guidance(
    conditional: Denoise,
    unconditional: Denoise,
    scale: float,
    interval: tuple[float, float] | None = None,
    rescale: float | None = None,
) -> Denoise:
    """Combine two denoisers as D_u + w (D_c − D_u), with ``scale`` w (arXiv 2207.12598, equation 6, where w is 1 less).

    Guides only for σ above the first number of ``interval`` and up to the second (2404.07724); None: for all σ.
    ``rescale`` is the share for ``rescale_guidance``, if any. The unconditional denoiser is never called if ``scale``
    is 1.
    """
    if scale == 1:
        return conditional

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        # One batch for both would be no faster on a CPU.
        x0 = conditional(x, sigma)
        mask = None if interval is None else (sigma > interval[0]) & (sigma <= interval[1])
        # Levels of samplers are on the CPU. To look at those of a training would wait for the device.
        if mask is not None and mask.is_cpu and not mask.any():
            return x0
        # lerp is exact at either end.
        estimate = torch.lerp(unconditional(x, sigma), x0, scale)
        if rescale is not None:
            estimate = rescale_guidance(estimate, x0, rescale)
        if mask is None:
            return estimate
        return torch.where(copy_to_device(mask, x.device).expand(len(x))[:, None, None, None], estimate, x0)

    return denoise


def rescale_guidance(estimate: Tensor, reference: Tensor, share: float) -> Tensor:
    """Rescale a ``share`` of ``estimate`` to the contrast of ``reference`` (arXiv 2305.08891, equations 15, 16)."""
    std, reference_std = (values.std((1, 2, 3), keepdim=True) for values in (estimate, reference))
    return torch.lerp(estimate, estimate * (reference_std / std.clamp(min=1e-12)), share)


def clip_estimates(denoise: Denoise) -> Denoise:
    """Clip the estimates of ``denoise`` to [−1, 1], the range of images."""
    return lambda x, sigma: denoise(x, sigma).clamp(-1, 1)
