"""Ablation: an autoencoder whose latents may be scaled and turned (EQ-VAE, arXiv 2502.09509), for latent diffusion.

    python benchmarks/equivariance.py --images emoji.tar.gz

The default autoencoder trains twice on as many images: as it is; and so that, in half of the steps, latents that are
made smaller or turned by right angles are decoded to images just so. In the latents of each the default denoiser
trains. Darkroom reads the models of both: only the training differs.
"""

import argparse
import os
from collections.abc import Callable
from contextlib import ExitStack, chdir
from pathlib import Path
from unittest import mock

import torch
from quality import FrechetScorer, workspace_of
from torch import Tensor
from torch.nn import functional

import diffusion
from diffusion.checkpoints import load_model
from diffusion.data.dataset import Dataset
from diffusion.families.autoregressive.network import log_logistic
from diffusion.families.vae.network import VAE, kl_divergence, reparameterize
from diffusion.generation.generate import sample
from diffusion.process.samplers import sampling_config

SHARE = 0.5
"""Of the steps in which latents are transformed."""
SMALLEST = 0.25
"""Factor of their size."""


class EquivariantVAE(VAE):
    """The default autoencoder, whose loss in training is of transformed images and latents."""

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ``VAE.forward``, with the misfit of the transformed image on the scale of a whole one."""
        if not self.training or x.is_meta:
            return super().forward(x, noise)
        choice, turns, scale = (torch.special.ndtr(noise[0, place, 0, 0]).item() for place in range(3))
        global_noise, latent_noise = self.prior.split(noise)
        posterior = self.autoencoder.posterior(x)
        z = reparameterize(*posterior, latent_noise)
        side, factor = z.shape[-1], x.shape[-1] // z.shape[-1]
        # Sizes of latents are whole numbers, and the images follow them.
        small = round(side * (SMALLEST + (1 - SMALLEST) * scale)) if choice < SHARE else side
        transform = transformation(small / side, int(4 * turns) if choice < SHARE else 0)
        moments = self.prior.posterior(z)
        g = reparameterize(*moments, global_noise)
        mean, log_variance, _ = self.prior(g, lambda number, *_: z[:, number : number + 1])
        target, reconstruction = transform(x), self.autoencoder.decode(transform(z))
        assert target.shape[-1] == small * factor
        misfit = -log_logistic(target, reconstruction, self.autoencoder.log_scale).flatten(1).sum(1)
        divergence = kl_divergence(*posterior, mean, log_variance)
        zero = torch.zeros_like(moments[0])
        return misfit * (side / small) ** 2, divergence + kl_divergence(*moments, zero, zero), reconstruction


def transformation(scale: float, turns: int) -> Callable[[Tensor], Tensor]:
    """Make what scales images or latents (N, C, S, S) and turns them by right angles."""

    def transform(x: Tensor) -> Tensor:
        side = round(x.shape[-1] * scale)
        smaller = x if scale == 1 else functional.interpolate(x, [side, side], mode="bilinear", antialias=True)
        return torch.rot90(smaller, turns, (2, 3))

    return transform


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="a source to train on")
    parser.add_argument("--size", type=int, default=64, help="of its images")
    parser.add_argument("--encoded", type=int, default=32_000, help="images that the autoencoder sees")
    parser.add_argument("--seen", type=int, default=96_000, help="images that the denoiser sees")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/quality"))
    args = parser.parse_args()

    workspace = workspace_of(args.scratch, args.images, args.size).resolve()
    dataset = Dataset.open(workspace / "data" / "images")
    scorer = FrechetScorer(dataset, workspace)
    held_out = dataset.images(dataset.rows("held_out"))
    for name, change in {"as-it-is": None, "equivariant": EquivariantVAE}.items():
        with ExitStack() as stack:
            stack.enter_context(chdir(workspace))
            if change is not None:
                stack.enter_context(mock.patch("diffusion.families.vae.model.VAE", change))
            output = Path("runs", f"{name}-vae-{args.encoded}-{args.seed}")
            options = {"seed": args.seed, "cpu_threads": 1}
            encoder = diffusion.train(
                "images", images=args.encoded, output=os.fspath(output), model={"family": "vae"}, **options
            )
        with chdir(workspace):
            output = Path("runs", f"{name}-latent-{args.encoded}-{args.seen}-{args.seed}")
            latent = diffusion.train(
                "images",
                images=args.seen,
                output=os.fspath(output),
                model={"autoencoder": os.fspath(encoder.final)},
                **options,
            )
            model, network = load_model(latent.final), load_model(encoder.final).network
        assert isinstance(network, VAE)
        x = held_out.float() / 127.5 - 1
        with torch.no_grad():
            restored = torch.cat(
                [
                    network.autoencoder.decode(network.autoencoder.encode(part)).clamp(-1, 1)
                    for part in torch.split(x, 64)
                ]
            )
        psnr = (10 * (4 / (x - restored).square().mean((1, 2, 3))).log10()).mean().item()
        own = scorer.distance(((restored + 1) * 127.5).round().to(torch.uint8).numpy())
        distances = [
            scorer.distance(sample(model, range(args.samples), seed, sampling_config()).numpy()) for seed in (0, 1)
        ]
        print(f"{name:12} PSNR {psnr:.1f}, restored {own:.0f}; sampled {distances[0]:.0f}, {distances[1]:.0f}", end="")
        print(f", real {scorer.real_baseline(args.samples):.0f}", flush=True)


if __name__ == "__main__":
    main()
