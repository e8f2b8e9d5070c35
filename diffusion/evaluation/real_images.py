"""Real images of a data set as a reference for evaluation: features, statistics and neighbours, cached.

A cache with wrong statistics would silently falsify every score. So a cache key contains everything that the value
depends on, down to the machine's arithmetic, and a cached value is bit-identical to a computed one.
"""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion.common.errors import UserError
from diffusion.common.files import sha256_bytes
from diffusion.common.fingerprint import fingerprint
from diffusion.common.progress import Progress
from diffusion.common.random import permutation
from diffusion.common.shapes import Images, Shape, height_and_width, mirror
from diffusion.data.dataset import Dataset, Rows
from diffusion.evaluation.cache import Key, Tensors, load_or_compute, load_or_compute_result
from diffusion.evaluation.features.feature_extractor import BATCH, Extractor
from diffusion.evaluation.metrics import load_metrics, metric_versions
from diffusion.evaluation.metrics.copies import PIXELS, shifted_thumbnails
from diffusion.evaluation.metrics.metric import ImageSet
from diffusion.evaluation.metrics.neighbours import NearestNeighbours, find_nearest
from diffusion.evaluation.metrics.per_group import LabelledFeatures, LinearDiscriminant, fit_discriminant
from diffusion.evaluation.metrics.pixel_metrics import measure_appearance
from diffusion.evaluation.metrics.registration import describe_images, find_registered
from diffusion.evaluation.metrics.scores import (
    MIN_FOR_ERRORS,
    PreparedReference,
    Scores,
    compute_scores,
    prepare_reference,
)
from diffusion.generation.super_resolution import GenerationTask

PIECE = 10_000
"""Training images per cached piece of features: 50 MB, the most that is lost to a kill."""
CHUNK = 1000
"""Images in memory at a time."""
SHOWN = 64
"""Images of each set kept for display."""


class RealImages:
    """Real images of one data set as seen by one feature network.

    ``count``: held-out images used at most, the first by key. Generated images are compared with these. For
    super-resolution, ``samples`` of them are the inputs and the others the reference: compared with their own inputs,
    upscaled images would be nearer than real images are. Results are cached in ``folder``; large ones, the features of
    training images, only for the current version of the data set.
    """

    def __init__(
        self,
        dataset: Dataset,
        extractor: Extractor,
        count: int,
        samples: int,
        folder: Path,
        task: GenerationTask,
        progress: Progress,
    ) -> None:
        self.dataset, self.extractor, self.folder, self.task = dataset, extractor, folder, task
        self.progress = progress
        self.train = dataset.rows("train")
        self.held_out = dataset.rows("held_out")[:count]
        self.samples = samples if task.low_resolution is None else min(samples, len(self.held_out) // 2)
        inputs = 0 if task.low_resolution is None else self.samples
        self.shown, self.compared = self.held_out[:inputs], self.held_out[inputs:]
        if task.low_resolution is not None and inputs < MIN_FOR_ERRORS:
            raise UserError(
                "a model that enlarges is shown one half of the held-out images and compared with the other, and "
                f"{dataset.folder} has {len(self.held_out)} of {2 * MIN_FOR_ERRORS}: hold more out with "
                "ingest.held_out"
            )

    @cached_property
    def reference(self) -> PreparedReference:
        """Return the reference that generated images are compared with; at least 6 images."""
        real = ImageSet(self.features(self.compared), lambda: self.images(self.compared))

        def work() -> Tensors:
            reference = prepare_reference(real, self.progress)
            return {
                f"{metric}/{name}": tensor
                for metric, tensors in reference.statistics.items()
                for name, tensor in tensors.items()
            }

        key: Key = {"kind": "statistics", "format_version": 3, "features": self.key(self.compared)} | metrics_key()
        statistics: dict[str, Tensors] = {metric: {} for metric in load_metrics()}
        for place, tensor in load_or_compute(self.folder, key, work).items():
            metric, _, name = place.partition("/")
            statistics[metric][name] = tensor
        return PreparedReference(features=real.features, images=real.images, statistics=statistics)

    def scores(self, key: Key, images: ImageSet) -> Scores:
        """Return the cached scores of ``images`` against the reference; ``key`` is the cache key of their features."""
        key = {"kind": "scores", "format_version": 3, "features": key, "compared": self.key(self.compared)}
        return load_or_compute_result(self.folder, key | metrics_key(), Scores, lambda: (self.score(images), {}))[0]

    def score(self, images: ImageSet) -> Scores:
        """Compute the scores of ``images`` against the reference."""
        return compute_scores(images, self.reference, self.extractor.name)

    def training_rows(self, seed: int, count: int) -> Rows:
        """Choose ``count`` training images, or all if there are fewer."""
        rows: Rows = self.train[permutation(seed, "evaluation/floor", 0, len(self.train))[:count]]
        return rows

    def real_baseline(self, seed: int, count: int) -> tuple[Key, ImageSet]:
        """Return the images of ``training_rows``, and the key of their features."""
        rows = self.training_rows(seed, count)
        return self.key(rows), ImageSet(self.features(rows), lambda: self.images(rows))

    @cached_property
    def small(self) -> dict[Shape, Tensor] | None:
        """Return the inputs of super-resolution, (N, C, h, w) uint8 of each large shape; None for other models."""
        inputs: dict[Shape, list[Tensor]] = {}
        for images in self.read_by_bucket(self.shown):
            if (piece := self.task.inputs(images)) is not None:
                inputs.setdefault(height_and_width(images), []).append(piece)
        return {shape: torch.cat(pieces) for shape, pieces in inputs.items()} or None

    @cached_property
    def appearance(self) -> dict[str, Tensor]:
        """Return colours and brightness of the reference images."""
        return appearance_of_pieces(self.images(self.compared))

    @cached_property
    def thumbnails(self) -> Tensor:
        """Return thumbnails of the reference images, unshifted and shifted, (9, N, D)."""
        return thumbnails_of_pieces(self.images(self.compared))

    @property
    def shown_images(self) -> Images:
        """Return held-out images for display, uint8; the inputs of super-resolution, if any."""
        return self.dataset.images_in_order((self.shown if len(self.shown) else self.held_out)[:SHOWN])

    def key(self, rows: Rows, extractor: Extractor | None = None) -> Key:
        """Return the cache key of the features of the images in ``rows``, in order, by the usual extractor if None."""
        numbers = sha256_bytes(np.asarray(rows, np.dtype("<i8")).tobytes())
        key: Key = {"kind": "features", "format_version": 1, "rows": numbers, "count": len(rows)}
        return (
            key | {"content_digest": self.dataset.manifest.content_digest} | extractor_key(extractor or self.extractor)
        )

    def features(self, rows: Rows, folder: Path | None = None, extractor: Extractor | None = None) -> Tensor:
        """Return the features of the images in ``rows``, (len(rows), D) float32, cached.

        ``folder`` and ``extractor``: None are the usual ones.
        """

        def work() -> Tensors:
            pieces = list[Tensor]()
            for images in self.images(rows):
                pieces.append((extractor or self.extractor)(images))
                self.progress("features of real images", sum(map(len, pieces)), len(rows))
            return {"features": torch.cat(pieces)}

        return load_or_compute(folder or self.folder, self.key(rows, extractor), work)["features"]

    def select_labelled_features(self, classes: Sequence[str]) -> LabelledFeatures:
        """Return the reference images that have one of ``classes``."""
        return LabelledFeatures(self.reference.features, self.dataset.classes(self.compared, classes))

    def images(self, rows: Rows) -> Iterator[Images]:
        """Yield the images in ``rows``, each (C, H, W) uint8, in chunks."""
        for start in range(0, len(rows), CHUNK):
            yield self.dataset.images_in_order(rows[start : start + CHUNK])

    def read_by_bucket(self, rows: Rows) -> Iterator[Tensor]:
        """Yield the images in ``rows`` one shape after the other, (n, C, H, W) uint8, in chunks."""
        yield from map(self.dataset.images, self.split_rows(rows))

    def split_rows(self, rows: Rows) -> Iterator[Rows]:
        """Split ``rows`` into chunks of images of one shape."""
        for bucket_rows in self.dataset.split_by_bucket(rows):
            yield from np.array_split(bucket_rows, range(CHUNK, len(bucket_rows), CHUNK))

    def shapes(self, rows: Rows) -> list[Shape]:
        """Return the shape (H, W) of each image in ``rows``."""
        return [self.dataset.shapes[bucket] for bucket in self.dataset.buckets(rows)]

    def neighbours(
        self, key: Key, pieces: Iterable[Images], features: Tensor, mirrored: bool
    ) -> dict[str, NearestNeighbours]:
        """Return the training images nearest to some others by space; rows count from the first by key. Cached.

        The others come in ``pieces`` of uint8 and as ``features`` (N, D), whose cache key is ``key``;
        ``mirrored``: in features, their mirrored versions count as well.
        """
        spaces = PIXELS, self.extractor.name

        def work() -> Tensors:
            images, views = [*pieces], [features]
            if mirrored:
                views.append(torch.cat([self.extractor(mirror(piece)) for piece in images]))
            nearest = (
                find_registered(
                    images,
                    self._descriptions(),
                    lambda rows: self.dataset.images_in_order(self.train[rows]),
                    self.progress,
                ),
                find_nearest(torch.stack(views), self._training(), progress=self.progress),
            )
            tensors: Tensors = {}
            for space, neighbours in zip(spaces, nearest, strict=True):
                tensors |= {f"{space}/distances": neighbours.distances, f"{space}/rows": neighbours.rows}
            return tensors

        key = {"kind": "neighbours", "format_version": 4, "of": key, "mirrored": mirrored}
        tensors = load_or_compute(self.folder, key | {"training": self.key(self.train)}, work)
        return {space: NearestNeighbours(tensors[f"{space}/distances"], tensors[f"{space}/rows"]) for space in spaces}

    def reader(self, classes: Sequence[str]) -> LinearDiscriminant:
        """Return a classifier of these ``classes``, fitted to the training images."""

        def work() -> Tensors:
            labels = (self.dataset.classes(rows, classes) for rows in self._pieces())
            discriminant = fit_discriminant(zip(self._training(), labels, strict=True), len(classes))
            return {"weights": discriminant.weights, "offsets": discriminant.offsets}

        key = {"kind": "reader", "format_version": 1, "training": self.key(self.train), "classes": list(classes)}
        return LinearDiscriminant(**load_or_compute(self.folder, key, work))

    def _training(self) -> Iterator[Tensor]:
        """Yield features of all training images, piece by piece."""
        folder = self._training_folder
        for rows in self._pieces():
            yield self.features(rows, folder)

    def _descriptions(self) -> Iterator[Tensor]:
        """Yield thumbnails of all training images, a chunk at a time, to be registered."""
        for rows in self._pieces():
            key: Key = {"kind": "thumbnails to register", "format_version": 1, "of": self.key(rows)}
            tensors = load_or_compute(self._training_folder, key, partial(self._describe, rows))
            yield from torch.split(tensors["thumbnails"], CHUNK)

    def _describe(self, rows: Rows) -> Tensors:
        return {"thumbnails": torch.cat([*map(describe_images, self.images(rows))])}

    @property
    def _training_folder(self) -> Path:
        """Folder of what is cached of training images; that of other versions of the data set is deleted."""
        folder = self.folder / "training" / self.dataset.manifest.content_digest[:16]
        folder.mkdir(parents=True, exist_ok=True)
        for other_folder in folder.parent.iterdir():
            if other_folder != folder:
                shutil.rmtree(other_folder)
        return folder

    def _pieces(self) -> Iterator[Rows]:
        for start in range(0, len(self.train), PIECE):
            yield self.train[start : start + PIECE]


def metrics_key() -> Key:
    """Return what scores depend on beside images and features: all metrics, and the packages that add some."""
    return {"metrics": list(load_metrics()), "extensions": metric_versions()}


def extractor_key(extractor: Extractor) -> Key:
    """Return all that features depend on beside the images, the machine's arithmetic included."""
    return {
        "extractor": extractor.name,
        "extractor_digest": extractor.digest,
        "preprocessing": extractor.preprocessing,
        "fingerprint": fingerprint(BATCH, "fp32", "cpu"),
    }


def appearance_of_pieces(pieces: Iterable[Images]) -> dict[str, Tensor]:
    """Measure colours and brightness of images that come in ``pieces``: see ``measure_appearance``."""
    measurements = [measure_appearance(piece) for piece in pieces]
    return {name: torch.cat([measurement[name] for measurement in measurements]) for name in measurements[0]}


def thumbnails_of_pieces(pieces: Iterable[Images]) -> Tensor:
    """Compute thumbnails of images that come in ``pieces``, unshifted and shifted: (9, N, D)."""
    return torch.cat([shifted_thumbnails(piece) for piece in pieces], 1)
