"""Shapes of images: how they are written, and what is done with images of several shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, Union

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from diffusion.common.config import MAX_SIDE
from diffusion.common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Shape: TypeAlias = tuple[int, int]
"""Height and width of an image, in pixels; WIDTHxHEIGHT, as 96x64, where people read or write it."""
Images: TypeAlias = Union["Tensor", "list[Tensor]"]
"""Images, each (C, H, W): a tensor if all have one shape, or else a list."""


def parse_shape(text: str) -> Shape:
    """Parse a shape as people write it, 96x64, to height and width; raises ValueError for anything else."""
    if not (match := re.fullmatch(r"([1-9]\d{0,8})[x×]([1-9]\d{0,8})", text)):
        raise ValueError(f"{text[:30]!r} is not a size: write WIDTHxHEIGHT in pixels, as 96x64")
    return int(match[2]), int(match[1])


def shape_name(shape: Shape) -> str:
    """Write a shape as WIDTHxHEIGHT, as 96x64."""
    return f"{shape[1]}x{shape[0]}"


def _parse_size(value: Any) -> Shape:
    height, width = parse_shape(value) if isinstance(value, str) else value
    if not all(isinstance(side, int) and 8 <= side <= MAX_SIDE for side in (height, width)):
        raise ValueError(f"a size is WIDTHxHEIGHT in pixels, each from 8 to {MAX_SIDE}, such as 96x64")
    return height, width


def parse_size(text: str) -> Shape:
    """Parse a size that a user gives, such as 96x64, to (H, W); raises UserError for anything else, or out of range."""
    try:
        return _parse_size(text)
    except ValueError as error:
        raise UserError(str(error)) from error


Size = Annotated[
    tuple[int, int],
    BeforeValidator(_parse_size),
    PlainSerializer(shape_name, return_type=str),
    WithJsonSchema({"type": "string", "examples": ["96x64"]}),
]
"""(H, W) of an image, in pixels; WIDTHxHEIGHT in configurations, requests and files."""


def height_and_width(images: Tensor) -> Shape:
    """Return (H, W) of an image, or of images of one shape, (…, H, W)."""
    height, width = images.shape[-2:]
    return height, width


def stack_images(images: Sequence[Tensor]) -> Images:
    """Stack ``images``, each (C, H, W), if all have one shape; list them otherwise."""
    import torch

    return torch.stack(list(images)) if len({image.shape for image in images}) == 1 else list(images)


def map_by_shape(images: Images, work: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``work`` to the images of each shape, (n, C, H, W), and return its rows in the order of ``images``."""
    import torch

    if isinstance(images, torch.Tensor):
        return work(images)
    rows: list[Tensor] = [torch.empty(0)] * len(images)
    for numbers in group_by_shape(map(height_and_width, images)).values():
        results = work(torch.stack([images[number] for number in numbers]))
        for number, row in zip(numbers, results, strict=True):
            rows[number] = row
    return torch.stack(rows)


def group_by_shape(shapes: Iterable[Shape]) -> dict[Shape, list[int]]:
    """Group the numbers 0, 1 … of ``shapes`` by shape, in the order in which each comes first."""
    numbers: dict[Shape, list[int]] = {}
    for number, shape in enumerate(shapes):
        numbers.setdefault(shape, []).append(number)
    return numbers


def apportion(counts: Mapping[Shape, int], total: int) -> dict[Shape, int]:
    """Divide ``total`` images among shapes in proportion to ``counts`` (largest remainders), without empty shapes."""
    count_sum = sum(counts.values())
    shares = {shape: total * count // count_sum for shape, count in counts.items()}
    rest = sorted(counts, key=lambda shape: -(total * counts[shape] % count_sum))
    for shape in rest[: total - sum(shares.values())]:
        shares[shape] += 1
    return {shape: count for shape, count in shares.items() if count}


def interleave(counts: Mapping[Shape, int]) -> list[tuple[Shape, int]]:
    """List the images 0, 1 … of each shape so that any first ones have about the shares of all."""
    sequence = [(shape, number) for shape, count in counts.items() for number in range(count)]
    return sorted(sequence, key=lambda item: (item[1] + 0.5) / counts[item[0]])


def mirror(images: Images) -> Images:
    """Mirror images from left to right."""
    return [image.flip(-1) for image in images] if isinstance(images, list) else images.flip(-1)
