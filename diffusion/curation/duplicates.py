"""Near-duplicates without chains: each dropped image is near the one that is kept for it, its leader.

Images are taken in an order of preference. One that is near no leader becomes one, all others have the nearest.
"""

import io
import sqlite3
from collections.abc import Sequence
from contextlib import closing

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion.data.ingest.index import HashGroups
from diffusion.evaluation.features.feature_extractor import Extractor
from diffusion.evaluation.metrics.copies import NEAR_DUPLICATE
from diffusion.evaluation.metrics.neighbours import find_nearest, squared_distances

BLOCK = 1024
"""Images and leaders compared at a time."""
REFERENCE = 10_000
"""Images, the first by key, among which neighbours are looked for that scale distances."""
OUTLIER_NEIGHBOUR = 5
"""The neighbour whose distance is the outlier score."""
CALIBRATION_IMAGES = 100
"""Images whose altered copies calibrate the distance of semantic near-duplicates."""
CALIBRATION_RECALL = 0.95
"""Share of these copies that the calibrated distance finds."""


def leaders_by_hash(phashes: Sequence[str], order: np.ndarray, classes: Sequence[str | None], bits: int) -> np.ndarray:
    """Find the leader of each of N images whose hashes differ in at most ``bits``, among those of its class: (N,).

    Args:
        phashes: Perceptual hashes, 64 hex digits each.
        order: Numbers of the images to group, the preferred ones first; others are their own leaders.
        classes: Class of each image.
        bits: Largest number of different bits.
    """
    leaders = np.arange(len(phashes))
    with closing(sqlite3.connect("")) as database:  # a temporary one, which goes to disk where memory is short
        groups = HashGroups(database, bits)
        for number in order.tolist():
            phash, label = bytes.fromhex(phashes[number]), repr(classes[number])
            matches = (int.from_bytes(root, "big") for root, category in groups.groups_near(phash) if category == label)
            if (leader := next(matches, None)) is None:
                groups.add_group(phash, label, number.to_bytes(8, "big"))
            else:
                leaders[number] = leader
    return leaders


def leaders_by_features(features: Tensor, order: np.ndarray, classes: Sequence[str | None], limit: float) -> np.ndarray:
    """Find leaders as ``leaders_by_hash`` does, of images whose ``features`` (N, D) are at most ``limit`` apart."""
    names = {name: number for number, name in enumerate(sorted(set(map(repr, classes))))}
    labels = torch.tensor([names[repr(label)] for label in classes])
    centre, leaders = features.mean(0), np.arange(len(features))
    leader_rows = torch.empty(len(order), dtype=torch.int64)  # the leaders, in the order of their finding
    count = 0
    for start in range(0, len(order), BLOCK):
        rows = torch.from_numpy(order[start : start + BLOCK].copy())
        x = features[rows] - centre
        # Rows are compared with the leaders before this block by blocks, and with those in it one by one.
        best, nearest_leaders = torch.full((len(rows),), torch.inf), torch.full((len(rows),), -1)
        for offset in range(0, count, BLOCK):
            others = leader_rows[offset : min(offset + BLOCK, count)]
            minima, places = _distances_within(x, features[others] - centre, labels[rows], labels[others], limit).min(1)
            nearest_leaders = torch.where(minima < best, others[places], nearest_leaders)
            best = torch.minimum(best, minima)
        block_distances = _distances_within(x, x, labels[rows], labels[rows], limit)
        new_leaders: list[int] = []
        for number, row in enumerate(rows.tolist()):
            nearest, leader = best[number].item(), int(nearest_leaders[number])
            if new_leaders and (closest := block_distances[number, new_leaders].min(0)).values.item() < nearest:
                nearest, leader = closest.values.item(), int(rows[new_leaders[int(closest.indices)]])
            if nearest < torch.inf:
                leaders[row] = leader
            else:
                new_leaders.append(number)
        leader_rows[count : count + len(new_leaders)] = rows[new_leaders]
        count += len(new_leaders)
    return leaders


def _distances_within(x: Tensor, y: Tensor, labels: Tensor, others: Tensor, limit: float) -> Tensor:
    """Compute squared distances of rows of one class that are at most ``limit`` apart: (n, m), others are infinite."""
    squares = squared_distances(x, y)
    is_far = (squares > limit**2) | (labels[:, None] != others[None])
    return squares.masked_fill_(is_far, torch.inf)


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


def calibrate_distance(features: Tensor, images: Sequence[np.ndarray], extractor: Extractor) -> float:
    """Calibrate the distance of semantic near-duplicates by altered copies of images of the data set itself.

    It finds CALIBRATION_RECALL of the copies, but is at most a third of the median distance to the twenty nearest of
    the first REFERENCE images, within which an unlike image is no chance (see ``evaluation.metrics.copies``).

    Args:
        features: Features of all images, (N, D).
        images: Images to copy, each (H, W, 3) uint8: those of the first rows of ``features``.
        extractor: The network of the features.
    """
    copies = (np.stack(_altered_copies(image)).transpose(0, 3, 1, 2) for image in images)
    copy_features = (extractor(torch.from_numpy(np.ascontiguousarray(batch))) for batch in copies)
    distances = torch.cat([(batch - row).norm(dim=1) for batch, row in zip(copy_features, features, strict=False)])
    reference = features[:REFERENCE]
    neighbour_distance = find_nearest(reference, [reference], themselves=True).distances.mean(1).median().item()
    return min(float(distances.quantile(CALIBRATION_RECALL)), NEAR_DUPLICATE * neighbour_distance)


def _altered_copies(image: np.ndarray) -> list[np.ndarray]:
    """Make copies of ``image`` (H, W, 3): compressed, reduced, cropped to 90 % of each side, mirrored, brighter."""
    original = Image.fromarray(image)
    width, height = original.size
    data = io.BytesIO()
    original.save(data, "JPEG", quality=60)
    crop_box = (width * 0.05, height * 0.05, width * 0.95, height * 0.95)
    half = original.resize((max(1, width // 2), max(1, height // 2)), Image.Resampling.BICUBIC)
    variants = [
        Image.open(data),
        half.resize(original.size, Image.Resampling.BICUBIC),
        original.resize(original.size, Image.Resampling.BICUBIC, box=crop_box),
        original.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        original.point(lambda value: min(255, round(1.15 * value))),
    ]
    return [np.asarray(variant.convert("RGB")) for variant in variants]
