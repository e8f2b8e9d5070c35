"""Error of each sampler over the number of network evaluations, against the exact solution from the same noise.

    python benchmarks/samplers.py runs/digits/final.safetensors

Prints the root of the mean squared distance (images reach from −1 to 1), averaged over images.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from diffusion.checkpoints import load_model
from diffusion.common.random import GaussianNoise
from diffusion.families.diffusion_model import DiffusionModel
from diffusion.generation.generate import make_conditioning
from diffusion.process.samplers import SamplingConfig, sampling_config

EVALUATIONS = (5, 8, 10, 15, 20, 30)
CONTESTANTS = {
    "ddim, euler": sampling_config(sampler="ddim"),
    "heun": sampling_config(sampler="heun"),
    "dpmpp_2m": sampling_config(sampler="dpmpp_2m"),
    "deis, order 2": sampling_config(sampler="deis", order=2),
    "deis": sampling_config(sampler="deis"),
    "unipc": sampling_config(sampler="unipc"),
    "unipc, order 3": sampling_config(sampler="unipc", order=3),
}
EXACT = 300
"""Steps of DPM-Solver++ after which its image counts as exact."""


def distance(one: Tensor, other: Tensor) -> float:
    return (one - other).square().mean((1, 2, 3)).sqrt().mean().item()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    model = load_model(arguments.model)
    assert isinstance(model, DiffusionModel)
    numbers = range(arguments.count)
    conditioning = make_conditioning(model, numbers, arguments.seed)
    denoiser = model.denoiser(conditioning)

    def generate(config: SamplingConfig, steps: int) -> Tensor:
        config = config.with_changes({"steps": steps})
        noise = GaussianNoise(arguments.seed, "sampling", numbers, model.shape)
        return config.run(denoiser, config.sigma_grid(model.schedule), noise, model.start(conditioning))

    exact = generate(CONTESTANTS["dpmpp_2m"], EXACT)
    print("evaluations", *(f"{count:7}" for count in EVALUATIONS))
    for name, config in CONTESTANTS.items():
        steps = [(count + 1) // 2 if config.sampler == "heun" else count for count in EVALUATIONS]
        print(f"{name:14}", *(f"{distance(generate(config, count), exact):7.4f}" for count in steps), flush=True)
    print(f"exact within {distance(generate(CONTESTANTS['unipc'], EXACT), exact):.4f}")


if __name__ == "__main__":
    main()
