"""Real images made worse in a known way and dose: what a score is for, it must see."""

import torch
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg
from torchvision.transforms.functional import gaussian_blur


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Gaussian, of so many pixels; 0: as they are."""
    return gaussian_blur(images, [13, 13], [sigma]) if sigma else images


def with_noise(images: Tensor, deviation: float, seed: int = 0) -> Tensor:
    """Gaussian, as a share of white."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images.float() + 255 * deviation * noise).round().clamp(0, 255).to(torch.uint8)


def compressed(images: Tensor, quality: int) -> Tensor:
    """JPEG, 100 to 1."""
    return torch.stack([decode_jpeg(encode_jpeg(image, quality)) for image in images])


def shifted(images: Tensor, down: int, right: int) -> Tensor:
    """By whole pixels; what leaves on one side comes in on the other."""
    return torch.roll(images, (down, right), (2, 3))


def averaged(images: Tensor, count: int, seed: int = 0) -> Tensor:
    """As many, each the mean of so many of them."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(len(images), (len(images), count), generator=generator)
    return images.float()[numbers].mean(1).round().to(torch.uint8)


def with_copies(images: Tensor, copies: Tensor) -> Tensor:
    """``copies`` in place of the first of them."""
    return torch.cat([copies, images[len(copies) :]])


def without_classes(images: Tensor, classes: Tensor, dropped: int, count: int) -> Tensor:
    """The first ``count`` images of other classes than the first ``dropped``."""
    return images[classes >= dropped][:count]
