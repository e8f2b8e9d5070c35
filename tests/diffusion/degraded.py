"""Real pictures made worse in a known way and dose: what a score is for, it must see."""

import torch
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg
from torchvision.transforms.functional import gaussian_blur


def blurred(pictures: Tensor, sigma: float) -> Tensor:
    """Gaussian, of so many pixels; 0: as they are."""
    return gaussian_blur(pictures, [13, 13], [sigma]) if sigma else pictures


def with_noise(pictures: Tensor, deviation: float, seed: int = 0) -> Tensor:
    """Gaussian, as a share of white."""
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(seed))
    return (pictures.float() + 255 * deviation * noise).round().clamp(0, 255).to(torch.uint8)


def compressed(pictures: Tensor, quality: int) -> Tensor:
    """JPEG, 100 to 1."""
    return torch.stack([decode_jpeg(encode_jpeg(picture, quality)) for picture in pictures])


def shifted(pictures: Tensor, down: int, right: int) -> Tensor:
    """By whole pixels; what leaves on one side comes in on the other."""
    return torch.roll(pictures, (down, right), (2, 3))


def averaged(pictures: Tensor, count: int, seed: int = 0) -> Tensor:
    """As many, each the mean of so many of them."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(pictures), (len(pictures), count), generator=generator)
    return pictures.float()[chosen].mean(1).round().to(torch.uint8)


def with_copies(pictures: Tensor, copies: Tensor) -> Tensor:
    """``copies`` in place of the first of them."""
    return torch.cat([copies, pictures[len(copies) :]])


def without_classes(pictures: Tensor, classes: Tensor, dropped: int, count: int) -> Tensor:
    """The first ``count`` pictures of other classes than the first ``dropped``."""
    return pictures[classes >= dropped][:count]
