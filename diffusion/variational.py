"""The evidence lower bound of a variational autoencoder (arXiv 1312.6114), in nats; posteriors are Gaussians."""

import math

from torch import Tensor

from diffusion.variance import HALF_A_LEVEL

LOG_VARIANCE = (-20.0, 10.0)
"""Range of a posterior's log-variance: beyond it float32 has no more to say."""


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) ‖ N(0, I)) of each picture, (N,), of (N, …) each (1312.6114, appendix B)."""
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)


def drawn_from(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """The posterior's latents for standard Gaussian ``noise``, all (N, …): the reparametrisation (1312.6114, 2.4)."""
    return mean + (0.5 * log_variance).exp() * noise


def negative_log_likelihood(x: Tensor, reconstruction: Tensor, log_scale: Tensor) -> Tensor:
    """−ln p(x | z) of each picture, (N,): every value Gaussian about its reconstruction, (N, …), with one deviation.

    ``log_scale``, its logarithm, is learned with the rest: at its best it is the reconstruction's own error, so that
    the weight of the divergence means the same whatever the contrast of the pictures (σ-VAE, arXiv 2006.13202). Half a
    level is the least: pixels are no more exact, and what comes back exactly would drive it to 0.
    """
    log_scale = log_scale.clamp(min=math.log(HALF_A_LEVEL))
    error = (x - reconstruction) * (-log_scale).exp()
    return (0.5 * error**2 + log_scale + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
