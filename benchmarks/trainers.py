"""Training recipes of other libraries, which ``quality.py`` runs in their environment.

    python benchmarks/trainers.py diffusers images.npy --rate 20
    python benchmarks/trainers.py diffusers images.npy --folder samples --images 30000 --samples 2048 --seed 0

Networks, optimizers, averages and samplers are the libraries' own, with the values that their training scripts have by
default, but for those named in ``benchmarks/README.md``. Images are decoded in memory: nothing is waited for.
Sampling is in bfloat16, which takes half as long; the difference is reported.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

BATCH = 16
STEPS = 50
WARM_UP = 10
"""Steps before a rate is measured."""
SHARES = (1 / 3, 2 / 3)
"""Of the training, after which images are generated on the way."""
SAMPLES_PER_BATCH = 64

Step = Callable[[Tensor, float], None]
"""One optimizer step on images in [0, 1], (N, C, H, W), at this share of the whole training."""
Generate = Callable[[int], Tensor]
"""So many images in [0, 1], generated with the average of the weights."""


def diffusers(channels: int, size: int, network: nn.Module | None = None) -> tuple[nn.Module, Step, Generate]:
    """``examples/unconditional_image_generation/train_unconditional.py``, by default with 1.6 million parameters."""
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    rate, warmup = 1e-3, 500
    network = network or UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=2,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon")
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    average = EMAModel(
        network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75, model_cls=UNet2DModel
    )
    steps = 0

    def step(images: Tensor, share: float) -> None:
        nonlocal steps
        clean = images * 2 - 1
        noise, t = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
        loss = nn.functional.mse_loss(network(schedule.add_noise(clean, noise, t), t).sample, noise)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        steps += 1
        # A cosine after a warm-up, as its script has it.
        optimizer.param_groups[0]["lr"] = rate * min(steps / warmup, 1) * 0.5 * (1 + np.cos(np.pi * share))
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())

    def generate(count: int) -> Tensor:
        average.store(network.parameters())
        average.copy_to(network.parameters())
        sampler = DDIMScheduler.from_config(schedule.config)
        sampler.set_timesteps(STEPS)
        x = torch.randn(count, channels, size, size)
        for t in sampler.timesteps:
            x = sampler.step(network(x, t).sample, t, x).prev_sample
        average.restore(network.parameters())
        return x / 2 + 0.5

    return network, step, generate


def denoising_diffusion_pytorch(channels: int, size: int) -> tuple[nn.Module, Step, Generate]:
    """Its ``Trainer`` with a network of 32 channels."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    network = Unet(dim=32, channels=channels)
    diffusion = GaussianDiffusion(network, image_size=size, sampling_timesteps=STEPS)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    average = EMA(diffusion, beta=0.995, update_every=10)

    def step(images: Tensor, share: float) -> None:
        diffusion(images).backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()

    def generate(count: int) -> Tensor:
        images: Tensor = average.ema_model.eval().sample(batch_size=count)
        return images

    return network, step, generate


RECIPES: dict[str, Callable[[int, int], tuple[nn.Module, Step, Generate]]] = {
    "diffusers": diffusers,
    "denoising-diffusion-pytorch": denoising_diffusion_pytorch,
}


def batches(images: Tensor) -> Iterator[Tensor]:
    """Batches in one random order, over and over, in [0, 1]."""
    order, at = torch.randperm(len(images)), 0
    while True:
        yield images[order[at : at + BATCH]].float() / 255
        at = at + BATCH if at + 2 * BATCH <= len(images) else 0


def rate(step: Step, images: Tensor, seconds: float) -> float:
    """Images per second over so many seconds."""
    training_batches = batches(images)
    for _ in range(WARM_UP):
        step(next(training_batches), 0.0)
    start, image_count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        step(next(training_batches), 0.0)
        image_count += BATCH
    return image_count / (time.perf_counter() - start)


def train(step: Step, generate: Generate, images: Tensor, args: argparse.Namespace) -> float:
    """Steps on random batches, and images generated at the end and on the way; returns as ``save_samples``."""
    stops = {round(share * args.images / BATCH) * BATCH: args.on_the_way for share in SHARES if args.on_the_way}
    training_batches, start = batches(images), time.perf_counter()
    for image_count in range(BATCH, args.images + 1, BATCH):
        step(next(training_batches), image_count / args.images)
        if image_count % (50 * BATCH) == 0:
            pace = image_count / (time.perf_counter() - start)
            print(f"\r{image_count} of {args.images} images, {pace:5.1f}/s", end="", file=sys.stderr)
        if image_count in stops:
            save_samples(generate, stops[image_count], args.folder / f"{image_count}.npy")
    return save_samples(generate, args.samples, args.folder / f"{args.images}.npy")


@torch.inference_mode()
def save_samples(generate: Generate, count: int, path: Path) -> float:
    """Generate so many images into a file; returns the mean difference of the first to those in float32, of 255."""
    state = torch.random.get_rng_state()
    exact = to_uint8(generate(SAMPLES_PER_BATCH))
    torch.random.set_rng_state(state)
    with torch.autocast("cpu", torch.bfloat16):
        parts = [to_uint8(generate(SAMPLES_PER_BATCH)) for _ in range(-(-count // SAMPLES_PER_BATCH))]
    images = torch.cat(parts)[:count]
    np.save(path, images.numpy())
    return (images[:SAMPLES_PER_BATCH].float() - exact[:count].float()).abs().mean().item()


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8."""
    return (images.float().clamp(0, 1) * 255).round().byte()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("source", type=Path, help="(N, C, H, W) uint8, as .npy")
    parser.add_argument("--rate", type=float, metavar="SECONDS", help="only measure how fast it trains, for so long")
    parser.add_argument("--folder", type=Path, help="for generated images, each file named for the images seen")
    parser.add_argument("--images", type=int, help="images to train on")
    parser.add_argument("--samples", type=int, default=2048, help="images to generate at the end")
    parser.add_argument("--on-the-way", type=int, default=0, help="images to generate before the end")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    images = torch.from_numpy(np.load(args.source))
    network, step, generate = RECIPES[args.recipe](images.shape[1], images.shape[2])
    if args.rate:
        print(json.dumps({"images_per_second": rate(step, images, args.rate)}))
        return
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir()
    difference = train(step, generate, images, args)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(json.dumps({"parameters": parameters, "evaluations": STEPS, "changed_by_bfloat16": difference}))


if __name__ == "__main__":
    main()
