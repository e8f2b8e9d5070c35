"""Pseudo-classes (arXiv 2403.00570): images sorted into folders by k-means, for a training with classes.

    python benchmarks/quality.py --peers                  # labels; without: --set model.conditional=false
    python benchmarks/pseudo_classes.py /tmp/quality/32-px-grey/images.npy /tmp/clusters --clusters 100
    python benchmarks/quality.py --images /tmp/clusters --size 32 --set sampling.autoguidance=2 --peers

Clusters are of the pixels' first principal components: of no network, so that they share nothing with the judge.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from diffusion.common.image_grids import to_pil_image

COMPONENTS = 64
ROUNDS = 40


def principal_components(images: Tensor) -> Tensor:
    """Project uint8 images (N, C, H, W) on their first principal components: (N, COMPONENTS)."""
    pixels = images.flatten(1).float() / 127.5 - 1
    pixels -= pixels.mean(0)
    _, _, directions = torch.svd_lowrank(pixels, COMPONENTS, niter=4)
    return pixels @ directions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="(N, C, H, W) uint8, a .npy")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clusters", type=int, default=100)
    args = parser.parse_args()

    torch.manual_seed(0)
    images = torch.from_numpy(np.load(args.images))
    features = principal_components(images).numpy()
    _, numbers = kmeans2(features, args.clusters, ROUNDS, minit="points", seed=0)
    for row, number in enumerate(numbers.tolist()):
        folder = args.folder / f"{number:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        to_pil_image(images[row]).save(folder / f"{row:06d}.png", compress_level=1)


if __name__ == "__main__":
    main()
