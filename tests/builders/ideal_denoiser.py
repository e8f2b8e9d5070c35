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
    """What a perfectly trained network answers to its input and t, whole or not, for each kind of prediction.

    ``sigmas`` (T,) are the schedule's; between its steps ln σ is a straight line.
    """

    points: Tensor
    sigmas: np.ndarray
    prediction: str
    sigma_data: float = 1.0

    def __call__(self, seen: Tensor, time: Tensor) -> Tensor:
        steps = np.arange(len(self.sigmas))
        sigma = torch.from_numpy(np.exp(np.interp(time.numpy(), steps, np.log(self.sigmas))))
        level = sigma[:, None, None, None]
        norm = (level**2 + (self.sigma_data**2 if self.prediction == "edm" else 1)).sqrt()
        x = seen.double() * norm
        x0 = IdealDenoiser(self.points.double())(x, sigma)
        noise = (x - x0) / level
        if self.prediction == "edm":  # arXiv 2206.00364, equation 8, solved for the network
            return (x0 - self.sigma_data**2 / norm**2 * x) * norm / (level * self.sigma_data)
        v = (noise - level * x0) / norm
        return {"epsilon": noise, "sample": x0, "v_prediction": v}[self.prediction]


def two_tone_points(count: int = 4, size: int = 4) -> Tensor:
    """Distinct images of −1 and 1, (count, 1, size, size)."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 2, (count, 1, size, size), generator=generator) * 2.0 - 1.0
