"""Parametrization of the network's prediction.

Every prediction is a case of D(x; σ) = c_skip x + c_out F(c_in x, t), where x = x_0 + σ ε, F is the network, D the
clean image, and the coefficients are functions of σ (arXiv 2206.00364, equation 7).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.process.config import Prediction, SchedulerPrediction
from diffusion.process.likelihood import broadcast_to_images


@dataclass(frozen=True)
class Parametrization:
    """The coefficients of ``prediction`` as functions of σ, (N,) float64, for images of deviation ``sigma_data``."""

    prediction: Prediction | SchedulerPrediction
    sigma_data: float = 1.0

    def c_in(self, sigma: Tensor) -> Tensor:
        """Scale of the network's input, to unit variance; except for EDM the input is x_t = √ᾱ x_0 + √(1 − ᾱ) ε.

        The input for flow matching is x_t = (1 − t) x_0 + t ε with σ = t/(1 − t) (arXiv 2209.03003).
        """
        if self.prediction == "flow_prediction":
            return 1 / (1 + sigma)
        spread = self.sigma_data if self.prediction == "edm" else 1.0
        return (sigma**2 + spread**2).rsqrt()

    def c_skip(self, sigma: Tensor) -> Tensor:
        """Weight of the noisy image in the clean one."""
        match self.prediction:
            case "epsilon":
                return torch.ones_like(sigma)
            case "sample":
                return torch.zeros_like(sigma)
            case "v_prediction":
                return 1 / (1 + sigma**2)
            case "flow_prediction":
                return 1 / (1 + sigma)
            case "edm":
                return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def c_out(self, sigma: Tensor) -> Tensor:
        """Scale of the network's output. v is √ᾱ ε − √(1 − ᾱ) x_0 (arXiv 2202.00512), and for flow matching ε − x_0."""
        match self.prediction:
            case "epsilon":
                return -sigma
            case "sample":
                return torch.ones_like(sigma)
            case "v_prediction" | "flow_prediction":
                return -sigma * self.c_in(sigma)
            case "edm":
                return sigma * self.sigma_data * self.c_in(sigma)

    def make_noisy_input(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Compute the network's input from images ``x0`` and standard Gaussian ``noise``, both (N, C, H, W)."""
        scale = self.c_in(sigma)
        return broadcast_to_images(x0, scale) * x0 + broadcast_to_images(x0, scale * sigma) * noise

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Compute the target of the network, F with D(x_0 + σ ε; σ) = x_0, without cancellation."""
        c_skip, c_out = self.c_skip(sigma), self.c_out(sigma)
        return (
            broadcast_to_images(x0, (1 - c_skip) / c_out) * x0 - broadcast_to_images(x0, c_skip * sigma / c_out) * noise
        )

    def to_x0(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Compute the clean image from the network's ``output`` at x = x_0 + σ ε."""
        return broadcast_to_images(x, self.c_skip(sigma)) * x + broadcast_to_images(x, self.c_out(sigma)) * output
