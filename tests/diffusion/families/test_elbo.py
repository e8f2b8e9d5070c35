"""The evidence lower bound: its likelihood sums to 1, and its divergence is that of the densities."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Independent, Normal
from torch.distributions import kl_divergence as exact_divergence

from diffusion.families.config import VAEConfig
from diffusion.families.vae.network import VAE, kl_divergence, reparameterize

SIZE = 8
CONFIG = VAEConfig(width=16, channel_mult=(1,), latent_channels=3, global_latent=5)
NOISE = 5 + 3 * 4 * 4


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(channels: int = 1) -> VAE:
    """A network whose every weight says something."""
    torch.manual_seed(0)
    vae = VAE(CONFIG, channels, SIZE).requires_grad_(False)
    random = generator(1)
    for parameter in vae.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.1)
    return vae.eval()


def normal(mean: Tensor, log_variance: Tensor) -> Independent:
    return Independent(Normal(mean, (0.5 * log_variance).exp()), mean.ndim - 1)


@given(st.integers(0, 2**32 - 1))
def test_divergence_matches_torch_over_all_values_of_an_image(seed: int) -> None:
    moments = torch.randn(4, 4, 3, 5, 5, generator=generator(seed), dtype=torch.float64)
    mean, log_variance, prior_mean, prior_log_variance = moments
    expected = exact_divergence(normal(mean, log_variance), normal(prior_mean, prior_log_variance))
    assert torch.allclose(kl_divergence(*moments), expected)


def test_divergence_is_the_expected_log_ratio_of_posterior_to_prior() -> None:
    model, count = network(), 4000
    x = (2 * torch.rand(1, 1, SIZE, SIZE, generator=generator(2)) - 1).expand(count, -1, -1, -1)
    noise = torch.randn(count, NOISE, 1, 1, generator=generator(3))
    _, divergence, _ = model(x, noise)
    for_g, for_z = model.prior.split(noise)
    below = model.autoencoder.posterior(x)
    z = reparameterize(*below, for_z)
    above = model.prior.posterior(z)
    g = reparameterize(*above, for_g)
    mean, log_variance, _ = model.prior(g, lambda number, *_: z[:, [number]])
    posteriors = normal(*below).log_prob(z) + normal(*above).log_prob(g)
    priors = normal(mean, log_variance).log_prob(z) + normal(torch.zeros_like(g), torch.zeros_like(g)).log_prob(g)
    gap = divergence - (posteriors - priors)
    assert gap.std().item() > 0.1
    assert gap.mean().item() == pytest.approx(0, abs=4 * gap.std().item() / math.sqrt(count))


@pytest.mark.parametrize("channels", [1, 3])
def test_values_given_latents_are_discretized_logistics(channels: int) -> None:
    model = network(channels)
    noise = torch.randn(1, NOISE, 1, 1, generator=generator(4)).expand(256, -1, -1, -1)
    flat = torch.full((1, channels, SIZE, SIZE), 127 / 127.5 - 1)
    z = reparameterize(*model.autoencoder.posterior(flat), model.prior.split(noise[:1])[1])
    model.autoencoder.posterior = lambda x: (z.expand(len(x), -1, -1, -1), torch.full_like(z, -1e3))  # type: ignore[method-assign]
    each = flat.repeat(256, 1, 1, 1)
    each[:, -1, 3, 5] = torch.arange(256) / 127.5 - 1
    misfit, _, _ = model(each, noise)
    # Each value has the probability of a logistic between halfway to both neighbours; black and white have the tails.
    mean, log_scale = model.autoencoder.decode(z).double(), model.autoencoder.log_scale.double()
    middles = (torch.arange(255).double() + 0.5) / 127.5 - 1
    edges = torch.cat([torch.tensor([-math.inf]), middles, torch.tensor([math.inf])])
    probabilities = ((edges.view(-1, 1, 1, 1) - mean) * (-log_scale).exp()).sigmoid().diff(dim=0)
    assert torch.allclose(probabilities.sum(0), torch.ones_like(mean[0]))
    levels = ((each + 1) * 127.5).round().long()
    expected = -probabilities.gather(0, levels).log().flatten(1).sum(1)
    assert torch.allclose(misfit.double(), expected, rtol=1e-4)


def test_prior_of_a_channel_depends_on_earlier_channels_alone() -> None:
    model = network()

    def moments(g: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance, back = model.prior(g, lambda number, *_: z[:, [number]])
        assert torch.equal(back, z)
        return mean, log_variance

    g, z = torch.randn(2, 5, generator=generator(5)), torch.randn(2, 3, 4, 4, generator=generator(6))
    for channel in range(3):
        changed_latent = z.clone()
        changed_latent[:, channel] += 1
        for one, other in zip(moments(g, z), moments(g, changed_latent), strict=True):
            assert torch.equal(one[:, : channel + 1], other[:, : channel + 1])
            assert channel == 2 or not torch.allclose(one[:, channel + 1 :], other[:, channel + 1 :])
    assert not torch.allclose(moments(g + 1, z)[0], moments(g, z)[0])


def test_generated_images_are_decoded_from_samples_of_the_prior() -> None:
    model = network()
    noise = torch.randn(2, NOISE, 1, 1, generator=generator(7))
    g, fresh = model.prior.split(noise)
    mean, log_variance, z = model.prior(g, lambda number, *moments: reparameterize(*moments, fresh[:, [number]]))
    assert torch.allclose(z, mean + (0.5 * log_variance).exp() * fresh)
    assert torch.equal(model.generate(noise), model.autoencoder.decode(z))


def test_sampled_latents_have_the_moments_of_the_posterior() -> None:
    noise = torch.randn(100_000, 1, generator=generator(0))
    latents = reparameterize(torch.tensor(2.0), torch.tensor(math.log(9.0)), noise)
    assert latents.mean().item() == pytest.approx(2, abs=0.05)
    assert latents.std().item() == pytest.approx(3, rel=0.01)
