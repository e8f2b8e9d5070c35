"""Calibration of near-duplicates: the threshold of ``ingest.near_duplicates: auto``, and what others would find.

The sample depends on the number of images alone, so that a killed ingest, given again, chooses the same threshold.
"""

import io
import logging
import random
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
from PIL import Image

from diffusion.common.config import Config
from diffusion.common.escaping import pluralize
from diffusion.common.progress import Progress, ignore_progress
from diffusion.data.ingest.chunks import ENTRY, HASH_BITS, perceptual_hash, reduce_to_grey
from diffusion.data.ingest.config import MAX_BITS, UNCALIBRATED_BITS, IngestConfig
from diffusion.data.ingest.decode import UnusableEntryError, prepare
from diffusion.data.manifest import STORED, Manifest, read_records
from diffusion.data.shards import ShardStore, shard_file
from diffusion.data.sources.base import Entry, Source
from diffusion.data.versions.versions import count_stored

logger = logging.getLogger(__name__)

SAMPLED, MIN_IMAGES = 1000, 50
"""Images that are sampled, and distinct ones without which nothing is calibrated.

Of 5,000 digits, whose limit is 32 bits, samples of 1000 images estimate 20 to 32 bits, and of 500 images 11 to 32.
"""
FOUND, MISTAKEN = 0.99, 0.01
"""Share of copies to find, and largest share of distinct images that may be as near to another one."""
EXTRAPOLATED = 10
"""Number of images, as a multiple of the sample's, for which shares are estimated at most: beyond, the sample tells
little about the nearest of them."""
BITS = (8, 16, 24, 32, 40, 48)
"""Thresholds of which a data set's report tells what they find."""
SAME = 2.0
"""Largest difference of two images that count as copies of one another, as a multiple of how made copies differ:
copies in the data set, of which there may be many, must not count as distinct images."""


class Calibration(Config):
    """A threshold of near-duplicates, chosen by a sample of a data set's images."""

    bits: int
    """Largest number of bits, of 256, in which the hashes of near-duplicates differ."""
    images: int
    """Distinct images in the sample."""
    copies: float | None = None
    """Share of the copies made of them that are found, in [0, 1]; None: too few images."""
    others: float | None = None
    """Estimated share of all distinct images that have another one as near, in [0, 1]; None: too few images."""

    @property
    def recorded(self) -> int | None:
        """Return the threshold that becomes part of the data set; None: too few images."""
        return None if self.copies is None else self.bits

    @property
    def line(self) -> str:
        """Describe the threshold and what it finds."""
        summary = f"near-duplicates: up to {self.bits} of {HASH_BITS} bits"
        if self.copies is None or self.others is None:
            images = pluralize(self.images, "distinct image")
            return (
                f"{summary}, as {images} are too few to calibrate ingest.near_duplicates=auto, which takes {MIN_IMAGES}"
            )
        return (
            f"{summary}, chosen by {self.images:,} images, group {self.copies:.1%} of copies made of them and about "
            f"{self.others:.1%} of distinct images"
        )

    @property
    def warning(self) -> str | None:
        """Describe how many copies the threshold misses; None: it finds 99 % of them."""
        if self.copies is None or self.copies >= FOUND:
            return None
        reason = f"more bits take over {MISTAKEN:.0%} of distinct images for near-duplicates"
        if self.bits == MAX_BITS:
            reason = f"ingest.near_duplicates is {MAX_BITS} bits at most"
        return (
            f"ingest.near_duplicates=auto chose {pluralize(self.bits, 'bit')}, and so misses about "
            f"{1 - self.copies:.0%} of copies (JPEG, other sizes): {reason}"
        )


def calibrate_ingest(
    folder: Path,
    manifest: Manifest | None,
    plan: Path,
    planned_count: int,
    source: Source,
    config: IngestConfig,
    progress: Progress = ignore_progress,
    store: ShardStore | None = None,
) -> Calibration:
    """Calibrate the threshold by a sample of the images of a data set and of those that an ingest adds to it.

    Args:
        folder: Folder of the data set.
        manifest: Its current version; None: it begins with this ingest.
        plan: Plan of the ingest, with ``planned_count`` entries of ``source``.
        planned_count: Number of these entries.
        source: Source of the new images.
        config: Configuration by which they are stored.
        progress: Called with the number of sampled images.
        store: Store of the shards that are not in the folder.
    """
    stored_count = 0 if manifest is None else sum(map(count_stored, manifest.parts))
    total = stored_count + planned_count
    numbers = np.array(sorted(random.Random(0).sample(range(total), min(SAMPLED, total))), np.int64)
    stored_numbers, new_numbers = numbers[numbers < stored_count], numbers[numbers >= stored_count] - stored_count

    def images() -> Iterator[Image.Image]:
        keys = set()
        samples = chain(
            _read_stored(folder, manifest, stored_numbers, store) if manifest else (),
            _read_new(plan, new_numbers, source, config),
        )
        for number, (key, image) in enumerate(samples):
            progress("images sampled", number, len(numbers))
            if key not in keys:
                keys.add(key)
                yield image

    calibration = calibrate(images(), total / max(len(numbers), 1))
    if (warning := calibration.warning) is not None:
        logger.warning("%s", warning)
    return calibration


def _read_stored(
    folder: Path, manifest: Manifest, numbers: np.ndarray, store: ShardStore | None
) -> Iterator[tuple[str, Image.Image]]:
    """Yield key and pixels of the images at ``numbers``, ascending, of all that lie in the shards of ``manifest``."""
    first = 0
    for part in manifest.parts:
        last = first + count_stored(part)
        positions = numbers[(numbers >= first) & (numbers < last)] - first
        first = last
        if not len(positions) or part.shard is None:
            continue
        table = read_records(folder, part, ("outcome", "key", "offset", "size"))
        with shard_file(folder, part.shard, store) as path, path.open("rb") as shard:
            for row in table.filter(pc.field("outcome").isin(STORED)).take(positions).to_pylist():
                shard.seek(row["offset"])
                yield row["key"], Image.open(io.BytesIO(shard.read(row["size"])), formats=("PNG",))


def _read_new(
    plan: Path, numbers: np.ndarray, source: Source, config: IngestConfig
) -> Iterator[tuple[str, Image.Image]]:
    """Yield key and pixels of the usable ones among the entries at ``numbers``, ascending, of a plan."""
    with closing(sqlite3.connect(plan)) as database:
        query = f"SELECT {ENTRY} FROM plan WHERE number = ?"  # from 1 on
        entries = [Entry(*database.execute(query, (number + 1,)).fetchone()) for number in numbers.tolist()]
    for payload in source.read([entry for entry in entries if entry.problem is None]):
        with suppress(UnusableEntryError):
            if not isinstance(payload, UnusableEntryError):
                image = prepare(payload, config)
                yield image.key, Image.fromarray(image.pixels)


def calibrate(images: Iterable[Image.Image], scale: float) -> Calibration:
    """Choose the threshold by a sample of distinct ``images`` as they are stored, of ``scale`` times as many in all.

    It is the least that finds 99 % of copies made of them, but at most the largest at which no more than 1 % of the
    images have another, distinct one as near.
    """
    hashes, greys, errors, to_copies = list[np.ndarray](), list[np.ndarray](), list[float](), list[int]()
    for image in images:
        image_hash, grey, copies = hash_words(image), reduce_to_grey(image).ravel(), make_copies(image)
        to_copies += [int(np.bitwise_count(image_hash ^ hash_words(copy)).sum()) for copy in copies]
        errors.append(max(float(_difference(grey, reduce_to_grey(copy).ravel())) for copy in copies))
        hashes.append(image_hash)
        greys.append(grey.astype(np.float32))
    if len(hashes) < MIN_IMAGES:
        return Calibration(bits=UNCALIBRATED_BITS, images=len(hashes))
    min_bits = int(np.quantile(to_copies, FOUND, method="inverted_cdf"))
    # If no threshold finds the copies, they differ as much as other images do, and nothing tells the two apart.
    radius = min_bits if min_bits <= MAX_BITS else -1
    shares = estimate_shares(_nearest_distances(np.array(hashes), np.array(greys), np.array(errors), radius), scale)
    allowed_bits = np.flatnonzero(shares <= MISTAKEN)
    bits = min(min_bits, int(allowed_bits[-1]) if len(allowed_bits) else 0)
    return Calibration(
        bits=bits,
        images=len(hashes),
        copies=float((np.array(to_copies) <= bits).mean()),
        others=float(shares[bits]),
    )


class HashThreshold(NamedTuple):
    """What a value of ``ingest.near_duplicates`` finds in this data set."""

    bits: int
    copies: float
    """Share of copies of its images (JPEG of quality 80, twice and three quarters of the size, resized back as an
    ingest stores them) within so many bits."""
    others: float
    """Share of its images with another one within so many bits."""


def calibrate_thresholds(
    images: Iterable[Image.Image], hashes: Sequence[str], recorded: int | None = None
) -> tuple[list[HashThreshold], int | None]:
    """Calibrate several thresholds by copies of ``images``, and ``hashes`` of all images, theirs too.

    Among the thresholds is the one that the data set has ``recorded``, if any.
    Also returns the least number of bits that finds 99 % of the copies; None if it is above MAX_BITS.
    """
    all_hashes = np.array([np.frombuffer(bytes.fromhex(digits), np.uint8) for digits in hashes]).view(np.uint64)
    to_copies, to_others = list[int](), list[int]()
    for image in images:
        image_hash, *copy_hashes = map(hash_words, (image, *make_copies(image)))
        to_copies += [int(np.bitwise_count(image_hash ^ copy_hash).sum()) for copy_hash in copy_hashes]
        distances = np.sort(np.bitwise_count(all_hashes ^ image_hash).sum(1))
        # The hash of the image itself may not be among them.
        to_others += distances[int(distances[0] == 0) :][:1].tolist()
    copy_bits, other_bits = np.array(to_copies), np.array(to_others)
    min_bits = int(np.quantile(copy_bits, FOUND, method="inverted_cdf"))
    limit = min_bits if min_bits <= MAX_BITS else None
    bits = sorted({*BITS, min(min_bits, MAX_BITS), *([] if recorded is None else [recorded])})
    return [HashThreshold(x, float((copy_bits <= x).mean()), float((other_bits <= x).mean())) for x in bits], limit


def make_copies(image: Image.Image) -> list[Image.Image]:
    """Make copies by JPEG of quality 80 and of twice and three quarters of the size, resized back as if ingested."""
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    resized_images = (image.resize([max(1, round(side * factor)) for side in image.size]) for factor in (2, 0.75))
    return [copy.resize(image.size, Image.Resampling.BICUBIC) for copy in (Image.open(data), *resized_images)]


def hash_words(image: Image.Image) -> np.ndarray:
    """Compute the perceptual hash of an image as (4,) uint64."""
    return np.frombuffer(bytes.fromhex(perceptual_hash(image)), np.uint64)


def _difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Compute the root mean square difference over the last axis."""
    difference: np.ndarray = np.sqrt(np.square(one - other).mean(-1))
    return difference


def _nearest_distances(hashes: np.ndarray, greys: np.ndarray, errors: np.ndarray, radius: int) -> np.ndarray:
    """Compute the distance in bits from each image to the nearest distinct one, (N,) int64; HASH_BITS if there is none.

    Args:
        hashes: Hashes, (N, 4) uint64.
        greys: Reduced images, (N, 1024).
        errors: Largest difference of the copies made of each image from it, (N,).
        radius: Largest distance of copies: images within it are distinct if their pixels differ by more than copies do.
    """
    nearest = []
    for row, (image_hash, grey, error) in enumerate(zip(hashes, greys, errors, strict=True)):
        distances = np.bitwise_count(hashes ^ image_hash).sum(1).astype(np.int64)
        neighbours = np.flatnonzero(distances <= radius)
        copies = _difference(greys[neighbours], grey) <= SAME * np.maximum(errors[neighbours], error)
        distances[neighbours[copies]] = HASH_BITS
        distances[row] = HASH_BITS
        nearest.append(distances.min())
    return np.array(nearest)


def estimate_shares(nearest: np.ndarray, scale: float) -> np.ndarray:
    """Estimate the share of images with another one within 0 … MAX_BITS bits, (MAX_BITS + 1,), in [0, 1].

    ``nearest`` are the distances to the nearest image in a sample, (N,). Of ``scale`` times as many images that share
    has another one as near, up to EXTRAPOLATED times. Below the distance of the nearest hundredth, of which a sample
    has few images, shares decrease tenfold over the difference between the nearest tenth and hundredth.
    """
    bits, scale = np.arange(MAX_BITS + 1), min(scale, EXTRAPOLATED)
    shares = (nearest[:, None] <= bits).mean(0)
    if scale > 1:
        hundredth, tenth = (int(np.quantile(nearest, share, method="inverted_cdf")) for share in (0.01, 0.1))
        tail = 0.01 * 10.0 ** ((bits - hundredth) / max(tenth - hundredth, 1))
        shares = np.where(bits < hundredth, tail, shares)
    estimates: np.ndarray = np.minimum(scale * shares, 1)
    return estimates
