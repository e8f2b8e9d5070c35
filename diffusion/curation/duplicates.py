"""Near-duplicates without chains: each dropped image is near the one that is kept for it, its leader.

Images are taken in an order of preference. One that is near no leader becomes one, all others have the nearest.

Perceptual hashes find other sizes and compressions. Semantic near-duplicates are crops and mirror images, too: features
and thumbnails name a few candidates for each image, and two images are near if registration of one onto the other, by
scale and shift, leaves little unexplained (``evaluation.metrics.registration``).
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.random import generator
from diffusion.curation.config import SemanticCalibration
from diffusion.data.ingest.hash_groups import HashGroups
from diffusion.evaluation.features.feature_extractor import Extractor
from diffusion.evaluation.metrics.neighbours import NearestNeighbours, find_nearest, find_nearly_nearest, map_blocks
from diffusion.evaluation.metrics.registration import (
    LIMITS,
    SIDE,
    describe,
    fit,
    shrink_and_blur,
    transform_images,
)

REFERENCE = 10_000
"""Images, the first by key, among which neighbours are looked for that give outlier scores."""
OUTLIER_NEIGHBOUR = 5
"""The neighbour whose distance is the outlier score."""
CANDIDATES = 4
"""Nearest images by features, and by thumbnails, that are registered onto each."""
MAX_EXACT = 20_000
"""Images up to which all pairs are compared for these."""
CROPS = torch.tensor([(0, 0.08, right, down) for right in (-0.07, 0.07) for down in (-0.07, 0.07)])
"""Crops of an image whose thumbnails are compared as well: parameters of ``transform_images``, (4, 4)."""
UPRIGHT = LIMITS * torch.tensor([0, 1, 1, 1])
"""Limits of registration without turns, which would make many distinct drawings alike."""
WINDOW = 3
"""Height and width in pixels of small images, to which the remaining differences are averaged."""
BLOCK, PIECE = 16, 1024
"""Pairs registered at a time per worker thread, and images of which thumbnails are made at a time."""
CALIBRATION_IMAGES = 100
"""Images whose altered copies calibrate the distance of semantic near-duplicates."""
MIN_CALIBRATION_IMAGES = 50
"""Images without which the share of distinct images that are as near is not estimated."""
CALIBRATION_RECALL = 0.98
"""Share of copies of each kind to find."""
FIT_STEPS, TINY = 50, 1e-6
"""Steps of the fixed-point iteration that fits the distances of distinct images, and a distance as good as 0."""
MAX_MISTAKEN = 0.01
"""Largest estimated share of distinct images that may have another one within the calibrated distance."""
UNCALIBRATED_LIMIT = 0.2
"""Largest distance without MIN_CALIBRATION_IMAGES."""


def leaders_by_hash(phashes: Sequence[str], order: np.ndarray, classes: Sequence[str | None], bits: int) -> np.ndarray:
    """Find the leader of each of N images whose hashes differ in at most ``bits``, among the images of its class: (N,).

    Args:
        phashes: Perceptual hashes, 64 hex digits each.
        order: Numbers of the images to group, the preferred ones first; others are their own leaders.
        classes: Class of each image.
        bits: Largest number of different bits.
    """
    leaders, members = np.arange(len(phashes)), dict[str | None, list[int]]()
    for number in order.tolist():
        members.setdefault(classes[number], []).append(number)
    for numbers in members.values():
        groups = HashGroups(bits, 8)
        groups.expect(bytes.fromhex(phashes[number]) for number in numbers)
        for number in numbers:
            phash = bytes.fromhex(phashes[number])
            if found := groups.find(phash):
                leaders[number] = int.from_bytes(found[0][0], "big")
            else:
                groups.add(phash, "", number.to_bytes(8, "big"))
    return leaders


@dataclass(frozen=True)
class Appearance:
    """What semantic near-duplicates among N images are found by."""

    features: Tensor
    """(N, D) float32."""
    small: Tensor
    """(N, 3·SIDE·SIDE) uint8, of ``shrink_and_blur``."""

    def __getitem__(self, rows: Tensor) -> "Appearance":
        return Appearance(self.features[rows], self.small[rows])

    @cached_property
    def thumbnails(self) -> Tensor:
        """Return the thumbnails of ``describe``, (N, D) float32."""
        return torch.cat([describe(unpack(piece)) for piece in torch.split(self.small, PIECE)])

    def views(self) -> Tensor:
        """Compute thumbnails of the images and of CROPS of them, and the same of their mirror images: (10, N, D)."""
        pieces = []
        for piece in map(unpack, torch.split(self.small, PIECE)):
            both = torch.cat([piece, piece.flip(-1)])
            views = [both, *(transform_images(both, crop[None])[0] for crop in CROPS)]
            pieces.append(torch.stack([describe(view).view(2, len(piece), -1) for view in views]).flatten(0, 1))
        return torch.cat(pieces, 1)


def unpack(small: Tensor) -> Tensor:
    """Return small images, rows of ``Appearance.small``, in [0, 1]: (n, 3, SIDE, SIDE) float32."""
    return small.view(-1, 3, SIDE, SIDE).float() / 255


def find_candidates(queries: Appearance, among: Sequence[Appearance]) -> Tensor:
    """Find the images ``among`` others that may be near-duplicates of each of n: rows (n, ≤ 2·CANDIDATES + 2) int64.

    The images themselves are found as well if they are among the others.
    """
    by_features = _find_nearest(queries.features, [other.features for other in among])
    by_thumbnails = _find_nearest(queries.views(), [other.thumbnails for other in among])
    return torch.cat([by_features.rows, by_thumbnails.rows], 1)


def _find_nearest(points: Tensor, pieces: Sequence[Tensor]) -> NearestNeighbours:
    if points.shape[-2] > MAX_EXACT:
        return find_nearly_nearest(points, torch.cat([*pieces]), CANDIDATES + 1)
    return find_nearest(points, pieces, CANDIDATES + 1)


def register_pairs(small: Tensor, pairs: np.ndarray, progress: Progress = ignore_progress) -> np.ndarray:
    """Compute distances of ``pairs`` (n, 2), rows of ``small`` images as in ``Appearance``: (n,) float32, at least 0.

    The distance is the largest difference that registration leaves anywhere, over WINDOW pixels, in standard deviations
    of the image: compression and size change an image everywhere a little, and distinct images differ in some place.
    Either image may be a part or the mirror image of the other. Registered onto its crop, an image explains all of it;
    the crop lacks what was cut off.
    """

    def compare(one: Tensor, other: Tensor) -> Tensor:
        residual, contrast = fit(one, other, torch.zeros(len(one), len(UPRIGHT)), UPRIGHT)
        energy = avg_pool2d(residual, WINDOW, 1).square().sum(1, keepdim=True)
        distances: Tensor = (avg_pool2d(energy, WINDOW, 1).amax((1, 2, 3)) * SIDE**2 / contrast).sqrt()
        return distances

    def register_block(start: int) -> Tensor:
        one, other = (unpack(small[rows]) for rows in torch.from_numpy(pairs[start : start + BLOCK]).T)
        views = torch.cat([one, one.flip(-1)]), torch.cat([other, other])
        return torch.minimum(compare(*views), compare(*reversed(views))).view(2, -1).amin(0)

    blocks = map_blocks(register_block, len(pairs), BLOCK, "pairs of images registered", progress)
    distances: np.ndarray = torch.cat([torch.empty(0), *blocks]).numpy()
    return distances


class CandidatePairs:
    """Registered pairs of N images: all that may be near-duplicates, of one class each."""

    def __init__(
        self, images: Appearance, rows: np.ndarray, classes: Sequence[str | None], progress: Progress = ignore_progress
    ) -> None:
        """Register all candidates among the images in ``rows`` (n,), each of which has one of ``classes`` (N,)."""
        self.small, members = images.small, dict[str | None, list[int]]()
        for row in sorted(rows.tolist()):
            members.setdefault(classes[row], []).append(row)
        pairs = [np.empty((0, 2), np.int64)]
        for group in map(np.array, members.values()):
            part = images[torch.from_numpy(group)]
            candidates = group[find_candidates(part, [part]).numpy()]
            pairs.append(np.stack([np.repeat(group, candidates.shape[1]), candidates.ravel()], 1))
        ends = np.sort(np.concatenate(pairs), axis=1)
        self.pairs = np.unique(ends[ends[:, 0] != ends[:, 1]], axis=0)
        """Rows of two images, the first one smaller, (P, 2) int64."""
        self.distances = register_pairs(self.small, self.pairs, progress)
        """Their distances, (P,) float32."""

    def nearest_beyond(self, distance: float) -> np.ndarray:
        """Return the distance of images to the nearest other one beyond ``distance``, (n,), if it has one."""
        nearest, is_beyond = np.full(len(self.small), np.inf), self.distances > distance
        for ends in self.pairs[is_beyond].T:
            np.minimum.at(nearest, ends, self.distances[is_beyond])
        found: np.ndarray = nearest[np.isfinite(nearest)]
        return found

    def leaders(self, order: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
        """Find leaders as ``leaders_by_hash`` does, of images at most ``limit`` apart: (N,), and distances to them."""
        near: dict[int, dict[int, float]] = {}
        pairs, distances, tried = self.pairs, self.distances, set[tuple[int, int]]()
        while True:
            for (one, other), distance in zip(pairs[distances <= limit], distances[distances <= limit], strict=True):
                near.setdefault(int(one), {})[int(other)] = near.setdefault(int(other), {})[int(one)] = float(distance)
            leaders, separations, kept = np.arange(len(self.small)), np.zeros(len(self.small)), set[int]()
            for row in order.tolist():
                if found := [(distance, other) for other, distance in near.get(row, {}).items() if other in kept]:
                    separations[row], leaders[row] = min(found)
                else:
                    kept.add(row)
            # In a large group an image may lack the leader among its candidates, but have neighbours of that leader.
            through = {(row, int(leaders[other])) for row in near.keys() & kept for other in near[row]}
            missing = {(min(pair), max(pair)) for pair in through if pair[0] != pair[1]} - tried
            if not missing:
                return leaders, separations
            tried |= missing
            pairs = np.array(sorted(missing))
            distances = register_pairs(self.small, pairs)


def outlier_scores(features: Tensor) -> np.ndarray:
    """Compute for each of ``features`` (N, D) the per cent of images whose fifth neighbour is nearer: (N,)."""
    reference = features[:REFERENCE]
    count = min(OUTLIER_NEIGHBOUR + 1, len(reference))
    distances = torch.cat(
        [find_nearest(rows, [reference], count).distances for rows in torch.split(features, REFERENCE)]
    )
    # Images of the reference are their own nearest neighbours.
    is_reference = torch.arange(len(features)) < len(reference)
    fifth = torch.where(is_reference, distances[:, -1], distances[:, max(count - 2, 0)]).numpy()
    return 100 * np.searchsorted(np.sort(fifth), fifth) / len(fifth)


def calibrate_distance(
    images: Appearance,
    pairs: CandidatePairs,
    samples: Sequence[np.ndarray],
    extractor: Extractor,
    distance: float | None = None,
) -> SemanticCalibration:
    """Choose the distance of semantic near-duplicates by altered copies of images of the data set itself.

    It is the least that finds CALIBRATION_RECALL of the copies of each kind, but at most the one within which an
    estimated MAX_MISTAKEN of distinct images have another one.

    Args:
        images: All images.
        pairs: Their registered pairs.
        samples: Images to copy, each (H, W, 3) uint8: the first rows of ``images``.
        extractor: The network of the features.
        distance: If given, it is not chosen, and only its recall is measured.
    """
    copies = [make_altered_copies(image, number) for number, image in enumerate(samples)]
    originals, found, needed = torch.arange(len(samples)), dict[str, np.ndarray](), 0.0
    for kind in copies[0]:
        batches = [np.ascontiguousarray(each[kind].transpose(2, 0, 1)) for each in copies]
        tensors = [torch.from_numpy(batch)[None] for batch in batches]
        features, small = (torch.cat([make(batch) for batch in tensors]) for make in (extractor, shrink_and_blur))
        altered = Appearance(features, small.mul(255).round().byte().flatten(1))
        # Either of the two may be the one that finds the other.
        found_originals = find_candidates(altered, [images]) == originals[:, None]
        found_copies = find_candidates(images[originals], [images, altered]) == originals[:, None] + len(images.small)
        is_candidate = (found_originals.any(1) | found_copies.any(1)).numpy()
        both = torch.cat([images.small[originals], altered.small])
        distances = register_pairs(both, np.arange(len(both)).reshape(2, -1).T)
        found[kind] = np.where(is_candidate, distances, np.inf)
        needed = max(needed, float(np.quantile(distances, CALIBRATION_RECALL, method="inverted_cdf")))
    distinct = fit_distinct(pairs.nearest_beyond(needed), needed)
    if distance is None:
        distance = min(needed, UNCALIBRATED_LIMIT if distinct is None else math.exp(distinct.inv_cdf(MAX_MISTAKEN)))
    recall = {kind: float((values <= distance).mean()) for kind, values in found.items()}
    mistaken = distinct and distinct.cdf(math.log(max(distance, TINY)))
    return SemanticCalibration(distance=distance, recall=recall, mistaken=mistaken)


def fit_distinct(nearest: np.ndarray, beyond: float) -> NormalDist | None:
    """Estimate the distribution of the logarithm of the distance from distinct images to the nearest other one.

    It is fitted to the lower quartile and the median of those farther than ``beyond``, (n,): nearer images may be
    copies in the data set, of which there may be many. Returns None for fewer than MIN_CALIBRATION_IMAGES.
    """
    if len(nearest) < MIN_CALIBRATION_IMAGES:
        return None
    quartile, median = np.log(np.quantile(nearest, [0.25, 0.5]))
    normal, share = NormalDist(), 0.0
    for _ in range(FIT_STEPS):
        # Quantiles of what is beyond are higher ones of all, of which the estimated share is nearer.
        low, middle = (normal.inv_cdf(share + rank * (1 - share)) for rank in (0.25, 0.5))
        spread = max((median - quartile) / (middle - low), 1e-6)
        distinct = NormalDist(median - middle * spread, spread)
        share = min(distinct.cdf(math.log(max(beyond, TINY))), 0.9)
    return distinct


def make_altered_copies(image: np.ndarray, number: int) -> Mapping[str, np.ndarray]:
    """Make copies of ``image`` (H, W, 3), the ``number``-th of its data set, by the kind of change."""
    original, size = Image.fromarray(image), np.array(image.shape[1::-1])
    data = io.BytesIO()
    original.save(data, "JPEG", quality=60)
    half = original.resize(tuple(np.maximum(1, size // 2)), Image.Resampling.BICUBIC)
    left, top = generator(0, "curation/crops", number).uniform(0, 0.1, 2) * size
    box = (left, top, left + 0.9 * size[0], top + 0.9 * size[1])
    variants = {
        "JPEG": Image.open(data).convert("RGB"),
        "half size": half.resize(original.size, Image.Resampling.BICUBIC),
        "crop": original.resize(original.size, Image.Resampling.BICUBIC, box=box),
        "mirror": original.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    }
    return {kind: np.asarray(variant) for kind, variant in variants.items()}
