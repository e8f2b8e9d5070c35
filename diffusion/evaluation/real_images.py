"""Real images of a data set as a reference for evaluation: features, statistics and neighbours, cached.

A cache with wrong statistics would silently falsify every score. So a cache key contains everything that the value
depends on, down to the machine's arithmetic, and a cached value is bit-identical to a computed one.
"""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.files import digest_of, sha256_bytes
from diffusion.common.fingerprint import Fingerprint, fingerprint
from diffusion.common.progress import Progress, silent
from diffusion.common.random import permutation
from diffusion.data.dataset import Dataset, Rows
from diffusion.evaluation.bootstrap.halves import FEWEST
from diffusion.evaluation.cache import cached, cached_result
from diffusion.evaluation.features.feature_extractor import BATCH, Extractor, extract_features
from diffusion.evaluation.metrics.copies import PIXELS, make_thumbnails, shifted_thumbnails
from diffusion.evaluation.metrics.distances import Moments, Reference, Scores, compute_scores
from diffusion.evaluation.metrics.neighbours import NearestNeighbours, find_nearest
from diffusion.evaluation.metrics.per_class import Labelled, LinearDiscriminant, fit_discriminant
from diffusion.evaluation.metrics.pixel_metrics import measure_appearance
from diffusion.generation.super_resolution import FromNoise, GenerationTask


class FeaturesKey(Config):
    """Cache key of features of some images of a data set."""

    kind: Literal["features"] = "features"
    format_version: Literal[1] = 1
    """Incremented when features of the same name and preprocessing change."""
    content_digest: str
    """Content digest of the data set."""
    rows: str
    """SHA-256 over the numbers of the rows, in order, as int64."""
    count: int
    """Number of rows."""
    extractor: str
    """Name of the features."""
    extractor_digest: str
    """Digest of the network's weights."""
    preprocessing: str
    """Preprocessing of images for it, their size included."""
    fingerprint: Fingerprint
    """Fingerprint of the machine, whose arithmetic decides the last bits."""


class StatisticsKey(Config):
    """Cache key of moments, neighbours and kernel sums of features."""

    kind: Literal["statistics"] = "statistics"
    format_version: Literal[2] = 2
    """Incremented when one of them changes."""
    features: FeaturesKey


def features_key(dataset: Dataset, rows: Rows, extractor: Extractor) -> FeaturesKey:
    """Return the cache key of the features that ``extractor`` computes of these ``rows``."""
    return FeaturesKey(
        content_digest=dataset.manifest.content_digest,
        rows=sha256_bytes(np.asarray(rows, np.dtype("<i8")).tobytes()),
        count=len(rows),
        extractor=extractor.name,
        extractor_digest=extractor.digest,
        preprocessing=extractor.preprocessing,
        fingerprint=fingerprint(BATCH, "fp32", "cpu"),
    )


def cached_features(
    folder: Path, dataset: Dataset, rows: Rows, extractor: Extractor, progress: Progress = silent
) -> Tensor:
    """Return features as ``extract_features`` does, (len(rows), D) float32, cached in ``folder``."""
    key = features_key(dataset, rows, extractor)
    kept = cached(folder, key, lambda: {"features": extract_features(dataset, rows, extractor, progress)})
    return kept["features"]


def cached_reference(
    folder: Path, dataset: Dataset, rows: Rows, extractor: Extractor, progress: Progress = silent
) -> Reference:
    """Return these ``rows`` as a reference for scores, cached in ``folder``; at least 6 rows."""
    features = cached_features(folder, dataset, rows, extractor, progress)

    def work() -> dict[str, Tensor]:
        found = Reference.of(features, progress)
        return {
            "mean": found.moments.mean,
            "root": found.moments.root,
            "nearest": found.nearest,
            "kernel_sums": found.kernel_sums,
        }

    kept = cached(folder, StatisticsKey(features=features_key(dataset, rows, extractor)), work)
    return Reference(features, Moments(len(rows), kept["mean"], kept["root"]), kept["nearest"], kept["kernel_sums"])


PIECE = 10_000
"""Training images per cached piece of features: 50 MB, the most that is lost to a kill."""
CHUNK = 1000
"""Images in memory at a time."""
SHOWN = 64
"""Images of each set kept for display."""
Views = dict[str, Tensor]
"""Representations of N images in V views by name of the space: (V, N, D) float32."""


class HeldOutNeighboursKey(Config):
    """Cache key of the training images nearest to held-out ones."""

    kind: Literal["neighbours of held-out images"] = "neighbours of held-out images"
    format_version: Literal[1] = 1
    """Incremented when thumbnails or distances change."""
    held_out: FeaturesKey
    training: FeaturesKey
    mirrored: bool


class DiscriminantKey(Config):
    """Cache key of the classifier on features."""

    kind: Literal["reader"] = "reader"
    format_version: Literal[1] = 1
    """Incremented when its fit changes."""
    training: FeaturesKey
    classes: tuple[str, ...]


class ScoresKey(Config):
    """Cache key of scores."""

    kind: Literal["scores"] = "scores"
    format_version: Literal[2] = 2
    """Incremented when a formula changes."""
    features: str
    """Digest of the cache key of the evaluated features."""
    compared: FeaturesKey


class RealImages:
    """Real images of one data set as seen by one feature network.

    ``count``: held-out images used at most, the first by key. Generated images are compared with these. For
    super-resolution, ``samples`` of them are the inputs and the others the reference: compared with their own inputs,
    upscaled images would be nearer than real images are.

    Results are cached in ``folder``. Features of training images are large, so those of other data set versions are
    removed.
    """

    def __init__(
        self,
        dataset: Dataset,
        extractor: Extractor,
        count: int,
        samples: int,
        folder: Path,
        task: GenerationTask = FromNoise(),  # noqa: B008 (frozen)
        progress: Progress = silent,
    ) -> None:
        self.dataset = dataset
        self.extractor = extractor
        self.samples = samples
        self.folder = folder
        self.task = task
        self.progress = progress
        self.train = dataset.rows("train")
        self.held_out = dataset.rows("held_out")[:count]
        self.shown, self.compared = self.held_out[:0], self.held_out
        if task.low_resolution is not None:
            self.shown, self.compared = self._parts(self.held_out, samples)

    def _parts(self, held_out: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray]:
        shown = min(samples, len(held_out) // 2)
        if shown < FEWEST:
            raise UserError(
                f"a model that enlarges is shown one half of the held-out images and compared with the other, and "
                f"{self.dataset.folder} has {len(held_out)} of {2 * FEWEST}: hold more out with ingest.held_out"
            )
        return held_out[:shown], held_out[shown:]

    @cached_property
    def reference(self) -> Reference:
        """Return the reference that generated images are compared with."""
        return cached_reference(self.folder, self.dataset, self.compared, self.extractor, self.progress)

    def scores(self, key: Config, features: Tensor) -> Scores:
        """Return the cached scores of ``features`` (N, D), whose cache key is ``key``, against the reference."""
        named = ScoresKey(features=digest_of(key.model_dump(mode="json")), compared=self.compared_key)
        return cached_result(self.folder, named, Scores, lambda: (self.score(features), {}))[0]

    def score(self, features: Tensor) -> Scores:
        """Compute the scores of ``features`` (N, D) against the reference."""
        return compute_scores(features, self.reference, self.extractor.name)

    def real_baseline(self, seed: int) -> tuple[FeaturesKey, Tensor]:
        """Return features of as many training images as are generated, or of all, and their key: (N, D)."""
        order = permutation(seed, "evaluation/floor", 0, len(self.train))
        rows = self.train[order[: len(self.shown) or self.samples]]
        features = cached_features(self.folder, self.dataset, rows, self.extractor, self.progress)
        return features_key(self.dataset, rows, self.extractor), features

    @cached_property
    def small(self) -> Tensor | None:
        """Return the inputs of super-resolution, (N, C, h, w) uint8; None if the task starts from noise."""
        pieces = [self.task.inputs(images) for images in self.images(self.shown)]
        inputs = [piece for piece in pieces if piece is not None]
        return torch.cat(inputs) if inputs else None

    @cached_property
    def appearance(self) -> dict[str, Tensor]:
        """Return colours and brightness of the reference images."""
        pieces = [measure_appearance(images) for images in self.images(self.compared)]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}

    @cached_property
    def thumbnails(self) -> Tensor:
        """Return thumbnails of the reference images, unshifted and shifted, (9, N, D)."""
        return thumbnails_of_pieces(self.images(self.compared))

    @property
    def shown_images(self) -> Tensor:
        """Return held-out images for display, (N, C, H, W) uint8; the inputs of super-resolution, if any."""
        rows = self.shown if len(self.shown) else self.held_out
        return self.dataset.images(rows[:SHOWN])

    @property
    def training_key(self) -> FeaturesKey:
        """Return the cache key of the features of all training images."""
        return features_key(self.dataset, self.train, self.extractor)

    @property
    def compared_key(self) -> FeaturesKey:
        """Return the cache key of the features of the reference images."""
        return features_key(self.dataset, self.compared, self.extractor)

    def labelled(self, classes: Sequence[str]) -> Labelled:
        """Return the reference images that have one of ``classes``."""
        return Labelled(self.reference.features, self.dataset.classes(self.compared, classes))

    def images(self, rows: Rows) -> Iterator[Tensor]:
        """Yield the images in ``rows``, (n, C, H, W) uint8, in chunks."""
        for start in range(0, len(rows), CHUNK):
            yield self.dataset.images(rows[start : start + CHUNK])

    def views(self, pieces: Iterable[Tensor], features: Tensor, mirrored: bool) -> Views:
        """Return the views, in both spaces, of images (N, C, H, W) uint8 in ``pieces`` with ``features`` (N, D)."""
        small, flipped = [], []
        for piece in pieces:
            small.append(shifted_thumbnails(piece, mirrored))
            if mirrored:
                flipped.append(self.extractor(piece.flip(3)))
        sides = [features, torch.cat(flipped)] if mirrored else [features]
        return {PIXELS: torch.cat(small, 1), self.extractor.name: torch.stack(sides)}

    def neighbours(self, views: Views) -> dict[str, NearestNeighbours]:
        """Find the training images nearest to each of ``views``, by space; rows count from the first by key."""
        small = (make_thumbnails(images) for images in self.images(self.train))
        pieces = {PIXELS: small, self.extractor.name: self._training()}
        return {space: find_nearest(points, pieces[space], progress=self.progress) for space, points in views.items()}

    def held_out_neighbours(self, mirrored: bool) -> dict[str, NearestNeighbours]:
        """Return the training images nearest to the held-out images."""

        def work() -> dict[str, Tensor]:
            features = cached_features(self.folder, self.dataset, self.held_out, self.extractor, self.progress)
            views = self.views(self.images(self.held_out), features, mirrored)
            return unpacked(self.neighbours(views))

        held_out = features_key(self.dataset, self.held_out, self.extractor)
        key = HeldOutNeighboursKey(held_out=held_out, training=self.training_key, mirrored=mirrored)
        return packed(cached(self.folder, key, work))

    def reader(self, classes: Sequence[str]) -> LinearDiscriminant:
        """Return a classifier of these ``classes``, fitted to the training images."""

        def work() -> dict[str, Tensor]:
            labels = (self.dataset.classes(rows, classes) for rows in self._pieces())
            found = fit_discriminant(zip(self._training(), labels, strict=True), len(classes))
            return {"weights": found.weights, "offsets": found.offsets}

        kept = cached(self.folder, DiscriminantKey(training=self.training_key, classes=tuple(classes)), work)
        return LinearDiscriminant(kept["weights"], kept["offsets"])

    def _training(self) -> Iterator[Tensor]:
        """Yield features of all training images, piece by piece."""
        for rows in self._pieces():
            yield cached_features(self._training_folder, self.dataset, rows, self.extractor, self.progress)

    def _pieces(self) -> Iterator[Rows]:
        for start in range(0, len(self.train), PIECE):
            yield self.train[start : start + PIECE]

    @cached_property
    def _training_folder(self) -> Path:
        folder = self.folder / "training" / self.dataset.manifest.content_digest[:16]
        folder.mkdir(parents=True, exist_ok=True)
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other)
        return folder


def thumbnails_of_pieces(pieces: Iterable[Tensor]) -> Tensor:
    """Compute thumbnails of images that come in ``pieces``, unshifted and shifted: (9, N, D)."""
    return torch.cat([shifted_thumbnails(piece) for piece in pieces], 1)


def unpacked(neighbours: dict[str, NearestNeighbours]) -> dict[str, Tensor]:
    """Convert neighbours by space to the tensors of a file."""
    return {f"{space}/distances": each.distances for space, each in neighbours.items()} | {
        f"{space}/rows": each.rows for space, each in neighbours.items()
    }


def packed(tensors: dict[str, Tensor]) -> dict[str, NearestNeighbours]:
    """Convert the tensors of a file to neighbours by space."""
    spaces = sorted(
        {name.removesuffix("/rows") for name in tensors if name.endswith("/rows")}, key=lambda s: s != PIXELS
    )
    return {space: NearestNeighbours(tensors[f"{space}/distances"], tensors[f"{space}/rows"]) for space in spaces}
