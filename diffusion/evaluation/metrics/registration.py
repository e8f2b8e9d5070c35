"""Nearest training images under small shifts, turns, scalings, mirroring, blur, brightness and contrast.

A generated image is compared in two steps. Thumbnails of many transformed versions of it find candidates among all
training images. Then it is registered onto each: the transformation is refined by Gauss–Newton steps on small images
(as in Lucas and Kanade, IJCAI 1981), and the distance is what no transformation, change of brightness and contrast, or
blur explains. Both sides of a comparison, generated and held-out images, gain by that alike, copies far more.
"""

import math
from collections.abc import Callable, Iterable
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.shapes import Images, map_by_shape, mirror
from diffusion.evaluation.metrics.neighbours import NearestNeighbours, find_nearest, map_blocks

SIDE, THUMBNAIL = 28, 7
"""Height and width, in pixels, of images that are registered, and of those that find candidates."""
BLUR = 1.0
"""Standard deviation of the blur of small images, in their pixels, which makes derivatives smooth."""
EDGE = 0.3
"""Weight of the outermost pixels: a shifted image has lost what was there."""
STEPS = 3
"""Gauss–Newton steps."""
LIMITS = torch.tensor([0.26, 0.16, 0.25, 0.25])
"""Largest turn (15°), logarithm of a scaling (17 %) and shifts (an eighth of the width); positions are in [−1, 1]."""
STARTS = torch.tensor(
    [
        (math.radians(rotation), math.log(scale), right, down)
        for rotation, scale in ((0, 1), (-8, 1), (8, 1), (0, 0.93), (0, 1.07))
        for right, down in product((-0.14, -0.07, 0, 0.07, 0.14), repeat=2)
    ]
)
"""Transformations from which registration starts, (125, 4): turn, logarithm of the scale, and shifts."""
CONSTANT, SLOPE = 0.05, 0.02
"""Contrast of small images, as a norm and its square, below which they count as plain: noise is not scaled up."""
BLOCK = 25
"""Images registered at a time per worker thread."""


def shrink_and_blur(images: Images) -> Tensor:
    """Shrink ``images``, each (C, H, W) uint8, to SIDE × SIDE and blur them: (N, C, SIDE, SIDE) float32 in [0, 1]."""
    if isinstance(images, list):
        return map_by_shape(images, shrink_and_blur)
    small_images = functional.interpolate(images.float() / 255, (SIDE, SIDE), mode="bilinear", antialias=True)
    kernel = torch.exp(-(torch.arange(-3, 4) ** 2) / (2 * BLUR**2))
    planes = functional.pad(small_images.flatten(0, 1)[:, None], (3, 3, 3, 3), mode="reflect")
    blurred_rows = functional.conv2d(planes, kernel.view(1, 1, 1, 7) / kernel.sum())
    return functional.conv2d(blurred_rows, kernel.view(1, 1, 7, 1) / kernel.sum()).view_as(small_images)


def describe(small: Tensor) -> Tensor:
    """Make thumbnails of small images without brightness and contrast: (N, D) float32 of length below 1."""
    thumbnails = functional.adaptive_avg_pool2d(small, (THUMBNAIL, THUMBNAIL)).flatten(1)
    weights = _edge_weights(THUMBNAIL).flatten().repeat(small.shape[1])
    centered_thumbnails = (thumbnails - (thumbnails * weights).sum(1, keepdim=True) / weights.sum()) * weights
    descriptors: Tensor = centered_thumbnails / (centered_thumbnails.norm(dim=1, keepdim=True) + CONSTANT)
    return descriptors


def describe_images(images: Images) -> Tensor:
    """Make thumbnails of ``images``, each (C, H, W) uint8, as ``find_registered`` searches them: see ``describe``."""
    return describe(shrink_and_blur(images))


def transform_images(small: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Transform small images (N, C, S, S) by ``parameters``, (N, 4) or (1, 4) for all.

    Also returns which pixels come from inside, (N, S, S) or (1, S, S).
    """
    rotation, scale, right, down = parameters.unbind(1)
    cosine, sine = rotation.cos() * (-scale).exp(), rotation.sin() * (-scale).exp()
    matrix = torch.stack([cosine, -sine, right, sine, cosine, down], 1).view(-1, 2, 3)
    grid = functional.affine_grid(matrix, [len(matrix), *small.shape[1:]], align_corners=False)
    inside_mask = (grid.abs() <= 1 + 1 / SIDE).all(-1)
    grids = grid.expand(len(small), -1, -1, -1)
    return functional.grid_sample(small, grids, padding_mode="border", align_corners=False), inside_mask


def register(small: Tensor, onto: Tensor, parameters: Tensor) -> Tensor:
    """Register small images onto others, both (N, C, S, S), from ``parameters`` (N, 4): distances (N,) in [0, 1].

    The distance is the share of the standard deviation of ``onto`` that remains unexplained.
    """
    residual, contrast = fit(small, onto, parameters)
    distances: Tensor = (residual.square().sum((1, 2, 3)) / contrast).clamp(0, 1).sqrt()
    return distances


def fit(small: Tensor, onto: Tensor, parameters: Tensor, limits: Tensor = LIMITS) -> tuple[Tensor, Tensor]:
    """Register small images onto others, both (N, C, S, S), from ``parameters`` (N, 4), which ``limits`` (4,) bound.

    Returns what remains unexplained of ``onto``, (N, C, S, S), and its weighted sum of squared deviations, (N,).
    """
    x = (torch.arange(SIDE) * 2 + 1) / SIDE - 1
    x, y = x.view(1, 1, 1, -1), x.view(1, 1, -1, 1)
    for step in range(STEPS + 1):
        z, inside_mask = transform_images(small, parameters)
        weights = (inside_mask * _edge_weights(SIDE))[:, None].expand_as(z)
        padded_images = functional.pad(z, (1, 1, 1, 1), mode="replicate")
        left, right = padded_images[..., 1:-1, :-2], padded_images[..., 1:-1, 2:]
        above, below = padded_images[..., :-2, 1:-1], padded_images[..., 2:, 1:-1]
        # An image as a sum of a constant, itself and its blur, and its derivatives by the parameters, all weighted; in
        # place where possible, as most of the time goes to memory.
        terms = [weights, z * weights, (left + right + above + below).sub_(z, alpha=4).mul_(weights)]
        if step < STEPS:
            slopes = weights * (SIDE / 4)
            dx, dy = (right - left).mul_(slopes), (below - above).mul_(slopes)
            terms += [(x * dy).sub_(y * dx), (x * dx).add_(y * dy).neg_(), dx, dy]
        matrix = torch.stack(terms, 1).flatten(2)
        target = (onto * weights).flatten(1)[..., None]
        # Damped, so that a plain image does not send the parameters anywhere.
        damping = torch.tensor([1e-4] * 3 + [2e-3] * (len(terms) - 3)).diag()
        solution, failures = torch.linalg.solve_ex(matrix @ matrix.mT + damping, matrix @ target)
        if (failed := failures != 0).any():
            # White images, say: in single precision, the damping is lost beside their terms.
            exact_terms = matrix[failed].double()
            products = exact_terms @ exact_terms.mT + damping
            solution[failed] = torch.linalg.solve(products, exact_terms @ target[failed].double()).float()
        if step < STEPS:
            change = solution[:, 3:, 0] / solution[:, 1].clamp(min=0.3)
            parameters = (parameters + change.clamp(-0.1, 0.1)).clamp(-limits, limits)
    residual = (target - matrix.mT @ solution).view_as(onto)
    mean = target.sum((1, 2)) / weights.sum((1, 2, 3))
    contrast = ((onto - mean[:, None, None, None]) * weights).square().sum((1, 2, 3))
    return residual, contrast + SLOPE


def find_registered(
    pieces: Iterable[Images],
    training: Iterable[Tensor],
    load_rows: Callable[[np.ndarray], Images],
    progress: Progress = ignore_progress,
) -> NearestNeighbours:
    """Find the nearest training images of others, which come in ``pieces`` of uint8, by registration.

    ``training``: ``describe_images`` of all training images in pieces; ``load_rows`` returns the images in some rows.
    """
    thumbnails = [*training]
    parts = [_find_in_piece(piece, thumbnails, load_rows, progress) for piece in pieces]
    return NearestNeighbours(torch.cat([part.distances for part in parts]), torch.cat([part.rows for part in parts]))


def _find_in_piece(
    images: Images, training: list[Tensor], load_rows: Callable[[np.ndarray], Images], progress: Progress
) -> NearestNeighbours:
    sides = torch.stack([shrink_and_blur(images), shrink_and_blur(mirror(images))])
    starts = STARTS.repeat(2, 1)
    views = [describe(transform_images(sides.flatten(0, 1), start[None])[0]) for start in STARTS]
    points = torch.stack([view.view(2, len(images), -1) for view in views], 1).flatten(0, 1)
    neighbours = find_nearest(points, training, progress=progress)
    # Only candidates are kept as small images: all of a large training set would fill the memory.
    rows, places = np.unique(neighbours.rows.numpy(), return_inverse=True)
    candidates = torch.cat(
        [shrink_and_blur(load_rows(rows[first : first + 1000])) for first in range(0, len(rows), 1000)]
    )
    thumbnails, candidate_places = describe(candidates), torch.from_numpy(places).view(neighbours.rows.shape)

    def register_block(first: int) -> Tensor:
        block = slice(first, first + BLOCK)
        nearest = candidate_places[block]
        nearest_thumbnails, block_views = thumbnails[nearest], points[:, block]
        # |x|² − 2 x·y, which has the least view where the distance has; their difference would fill the memory.
        products = torch.einsum("nkd,vnd->vnk", nearest_thumbnails, block_views)
        squares = block_views.square().sum(-1, keepdim=True) - 2 * products
        best = squares.argmin(0)
        numbers = torch.arange(len(nearest))[:, None].expand_as(nearest)
        sources = sides[:, block][(best >= len(STARTS)).long(), numbers]
        distances = register(sources.flatten(0, 1), candidates[nearest.flatten()], starts[best.flatten()])
        return distances.view(nearest.shape)

    distances = torch.cat([*map_blocks(register_block, len(images), BLOCK, "images registered", progress)])
    sorted_distances, order = distances.sort(dim=1, stable=True)
    return NearestNeighbours(sorted_distances, neighbours.rows.gather(1, order))


def _edge_weights(side: int) -> Tensor:
    weights = torch.full((side, side), EDGE)
    weights[1:-1, 1:-1] = 1
    return weights
