"""Cost of the presets: parameters, FLOPs, and images per second of training on this machine.

python benchmarks/presets.py
"""

import argparse
import time
from typing import get_args

import torch

from diffusion.common.fingerprint import autocast
from diffusion.common.threads import cores
from diffusion.families.config import ModelConfig
from diffusion.families.ddpm.network import UNet
from diffusion.presets import PresetName, preset
from diffusion.training.preflight import count_flops

SHAPES = ((1, 32, 32), (3, 64, 64))


def rate(config: ModelConfig, shape: tuple[int, int, int], batch: int, seconds: float) -> float:
    """Images per second, forward and backward, on all cores."""
    torch.set_num_threads(cores())
    network = UNet(config, shape[0], shape[1]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(batch, *shape).contiguous(memory_format=torch.channels_last)
    start, image_count = time.perf_counter(), -batch
    while image_count <= 0 or time.perf_counter() - start < seconds:
        with autocast("auto"):
            loss = network(x, torch.full((batch,), 500.0)).square().mean()
        loss.backward()
        if image_count < 0:  # the first is not counted: it sets up what the others use
            start = time.perf_counter()
        image_count += batch
    return image_count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10)
    args = parser.parse_args()
    print("| preset | images | parameters | GFLOP an image, forward and backward | images/s |")
    print("|---|---|---:|---:|---:|")
    for name in get_args(PresetName):
        config = ModelConfig.model_validate(preset(name)["model"])
        for shape in SHAPES:
            with torch.device("meta"):
                count = sum(p.numel() for p in UNet(config, shape[0], shape[1]).parameters())
            work = count_flops(config, shape, 0) / 1e9
            speed = rate(config, shape, args.batch, args.seconds)
            image = f"{shape[2]}×{shape[1]}×{shape[0]}"
            print(f"| {name} | {image} | {count / 1e6:.2f} M | {work:.2f} | {speed:.1f} |", flush=True)


if __name__ == "__main__":
    main()
