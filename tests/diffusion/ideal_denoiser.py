"""The best denoiser there can be, in closed form: an oracle that owes nothing to our code."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class IdealDenoiser:
    """E[x_0 | x_0 + σ ε = x] for x_0 uniform over ``points`` (K, C, H, W) (arXiv 2206.00364, appendix B.3)."""

    points: Tensor

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.to(x).expand(len(x))
        distances = (x[:, None] - self.points).flatten(2).square().sum(-1)
        weights = torch.softmax(-distances / (2 * sigma[:, None] ** 2), dim=1)
        return torch.einsum("nk,kchw->nchw", weights, self.points)


@dataclass(frozen=True)
class IdealNetwork:
    """What a perfectly trained network answers at x_t and t, whole or not, for each kind of prediction.

    ``sigmas`` (T,) are the schedule's; between its steps ln σ is a straight line.
    """

    points: Tensor
    sigmas: np.ndarray
    prediction: str

    def __call__(self, x_t: Tensor, time: Tensor) -> Tensor:
        steps = np.arange(len(self.sigmas))
        sigma = torch.from_numpy(np.exp(np.interp(time.numpy(), steps, np.log(self.sigmas))))
        norm = (1 + sigma**2).sqrt()[:, None, None, None]
        x_t = x_t.double()
        x0 = IdealDenoiser(self.points.double())(x_t * norm, sigma)
        noise = (x_t * norm - x0) / sigma[:, None, None, None]
        v = (noise - sigma[:, None, None, None] * x0) / norm
        return {"noise": noise, "x0": x0, "v": v}[self.prediction]


def two_tone_points(count: int = 4, size: int = 4) -> Tensor:
    """Distinct pictures of −1 and 1, (count, 1, size, size)."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 2, (count, 1, size, size), generator=generator) * 2.0 - 1.0
