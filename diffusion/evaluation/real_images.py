"""Real images of a data set as models are evaluated by them: features, statistics and neighbours, cached.

A cache that gives wrong statistics makes every score wrong and looks like nothing. So a cached value is known by all
that it depends on, down to the machine's arithmetic, and is what would be computed again, bit for bit.
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
    """All that features of some images of a data set depend on."""

    kind: Literal["features"] = "features"
    format_version: Literal[1] = 1
    """Grows when features of the same name and preprocessing come out another way."""
    content_digest: str
    """Of the data set."""
    rows: str
    """SHA-256 over the numbers of the rows, in order, as int64."""
    count: int
    """How many they are."""
    extractor: str
    """Name of the features."""
    extractor_digest: str
    """Of the network's weights."""
    preprocessing: str
    """How images are shown to it, their size included."""
    fingerprint: Fingerprint
    """Of the machine: its arithmetic decides the last bits."""


class StatisticsKey(Config):
    """All that moments, neighbours and kernels of features depend on."""

    kind: Literal["statistics"] = "statistics"
    format_version: Literal[2] = 2
    """Grows when one of them comes out another way."""
    features: FeaturesKey


def features_key(dataset: Dataset, rows: Rows, extractor: Extractor) -> FeaturesKey:
    """The key of the features that ``extractor`` makes of these ``rows``."""
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
    """As ``extract_features``, (len(rows), D) float32, kept in ``folder``."""
    key = features_key(dataset, rows, extractor)
    kept = cached(folder, key, lambda: {"features": extract_features(dataset, rows, extractor, progress)})
    return kept["features"]


def cached_reference(
    folder: Path, dataset: Dataset, rows: Rows, extractor: Extractor, progress: Progress = silent
) -> Reference:
    """These ``rows`` as a reference for scores, features and statistics kept in ``folder``; at least 6 rows."""
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
"""Training images whose features are made and kept together: 50 MB of them, lost at most if it is stopped."""
CHUNK = 1000
"""Images in memory at a time."""
SHOWN = 64
"""Images of each set that are kept to be looked at."""
Views = dict[str, Tensor]
"""Of N images, by the name of a space, what they look like there from V sides: (V, N, D) float32."""


class HeldOutKey(Config):
    """All that the training images nearest to held-out ones depend on."""

    kind: Literal["neighbours of held-out images"] = "neighbours of held-out images"
    format_version: Literal[1] = 1
    """Grows when thumbnails or distances come out another way."""
    held_out: FeaturesKey
    training: FeaturesKey
    mirrored: bool


class DiscriminantKey(Config):
    """All that the classifier on features depends on."""

    kind: Literal["reader"] = "reader"
    format_version: Literal[1] = 1
    """Grows when it is fitted another way."""
    training: FeaturesKey
    classes: tuple[str, ...]


class ScoresKey(Config):
    """All that scores depend on."""

    kind: Literal["scores"] = "scores"
    format_version: Literal[2] = 2
    """Grows when a formula changes."""
    features: str
    """Digest of the key of the features that are evaluated."""
    compared: FeaturesKey


class RealImages:
    """The images of one data set in the eyes of one feature network.

    ``count``: held-out images used at most, the first by key. Generated images are compared with these; models that
    enlarge, ``samples`` of them, get one part shown and are compared with the others: shown
    what they are compared with, they would be nearer to it than real images are.

    Kept in ``folder``. Features of training images are many, so those of other versions of the data set go.
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
        """What generated images are compared with."""
        return cached_reference(self.folder, self.dataset, self.compared, self.extractor, self.progress)

    def scores(self, key: Config, features: Tensor) -> Scores:
        """How far ``features`` (N, D), which ``key`` names, lie from the images compared with."""
        named = ScoresKey(features=digest_of(key.model_dump(mode="json")), compared=self.compared_key)
        return cached_result(self.folder, named, Scores, lambda: (self.score(features), {}))[0]

    def score(self, features: Tensor) -> Scores:
        """How far ``features`` (N, D) lie from the images compared with."""
        return compute_scores(features, self.reference, self.extractor.name)

    def real_baseline(self, seed: int) -> tuple[FeaturesKey, Tensor]:
        """Features of as many training images as are generated, or of all, and their key: (N, D)."""
        order = permutation(seed, "evaluation/floor", 0, len(self.train))
        rows = self.train[order[: len(self.shown) or self.samples]]
        features = cached_features(self.folder, self.dataset, rows, self.extractor, self.progress)
        return features_key(self.dataset, rows, self.extractor), features

    @cached_property
    def small(self) -> Tensor | None:
        """What models of super-resolution start from, (N, C, h, w) uint8; None: the task starts from noise."""
        pieces = [self.task.inputs(images) for images in self.images(self.shown)]
        inputs = [piece for piece in pieces if piece is not None]
        return torch.cat(inputs) if inputs else None

    @cached_property
    def appearance(self) -> dict[str, Tensor]:
        """What the images compared with look like as a whole."""
        pieces = [measure_appearance(images) for images in self.images(self.compared)]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}

    @cached_property
    def thumbnails(self) -> Tensor:
        """Of the images compared with, as they are and moved, (9, N, D)."""
        return thumbnails_of_pieces(self.images(self.compared))

    @property
    def shown_images(self) -> Tensor:
        """Some held-out images to look at, (N, C, H, W) uint8; those that models enlarge, if they do."""
        rows = self.shown if len(self.shown) else self.held_out
        return self.dataset.images(rows[:SHOWN])

    @property
    def training_key(self) -> FeaturesKey:
        """That of the features of all training images."""
        return features_key(self.dataset, self.train, self.extractor)

    @property
    def compared_key(self) -> FeaturesKey:
        """That of the features of what generated images are compared with."""
        return features_key(self.dataset, self.compared, self.extractor)

    def labelled(self, classes: Sequence[str]) -> Labelled:
        """The images compared with, as far as they are of ``classes``."""
        return Labelled(self.reference.features, self.dataset.classes(self.compared, classes))

    def images(self, rows: Rows) -> Iterator[Tensor]:
        """Those in ``rows``, (n, C, H, W) uint8, piece by piece."""
        for start in range(0, len(rows), CHUNK):
            yield self.dataset.images(rows[start : start + CHUNK])

    def views(self, pieces: Iterable[Tensor], features: Tensor, mirrored: bool) -> Views:
        """Of images (N, C, H, W) uint8 that come in ``pieces``, with ``features`` (N, D), in both spaces."""
        small, flipped = [], []
        for piece in pieces:
            small.append(shifted_thumbnails(piece, mirrored))
            if mirrored:
                flipped.append(self.extractor(piece.flip(3)))
        sides = [features, torch.cat(flipped)] if mirrored else [features]
        return {PIXELS: torch.cat(small, 1), self.extractor.name: torch.stack(sides)}

    def neighbours(self, views: Views) -> dict[str, NearestNeighbours]:
        """The training images nearest to each of others, by space; rows count from the first by key."""
        small = (make_thumbnails(images) for images in self.images(self.train))
        pieces = {PIXELS: small, self.extractor.name: self._training()}
        return {space: find_nearest(points, pieces[space], progress=self.progress) for space, points in views.items()}

    def held_out_neighbours(self, mirrored: bool) -> dict[str, NearestNeighbours]:
        """Those of the held-out images."""

        def work() -> dict[str, Tensor]:
            features = cached_features(self.folder, self.dataset, self.held_out, self.extractor, self.progress)
            views = self.views(self.images(self.held_out), features, mirrored)
            return unpacked(self.neighbours(views))

        held_out = features_key(self.dataset, self.held_out, self.extractor)
        key = HeldOutKey(held_out=held_out, training=self.training_key, mirrored=mirrored)
        return packed(cached(self.folder, key, work))

    def reader(self, classes: Sequence[str]) -> LinearDiscriminant:
        """What tells these ``classes`` apart, fitted to the training images."""

        def work() -> dict[str, Tensor]:
            labels = (self.dataset.classes(rows, classes) for rows in self._pieces())
            found = fit_discriminant(zip(self._training(), labels, strict=True), len(classes))
            return {"weights": found.weights, "offsets": found.offsets}

        kept = cached(self.folder, DiscriminantKey(training=self.training_key, classes=tuple(classes)), work)
        return LinearDiscriminant(kept["weights"], kept["offsets"])

    def _training(self) -> Iterator[Tensor]:
        """Features of all training images, piece by piece."""
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
    """Thumbnails of images that come in ``pieces``, as they are and moved: (9, N, D)."""
    return torch.cat([shifted_thumbnails(piece) for piece in pieces], 1)


def unpacked(neighbours: dict[str, NearestNeighbours]) -> dict[str, Tensor]:
    """Neighbours by space as tensors of a file."""
    return {f"{space}/distances": each.distances for space, each in neighbours.items()} | {
        f"{space}/rows": each.rows for space, each in neighbours.items()
    }


def packed(tensors: dict[str, Tensor]) -> dict[str, NearestNeighbours]:
    """The way back."""
    spaces = sorted(
        {name.removesuffix("/rows") for name in tensors if name.endswith("/rows")}, key=lambda s: s != PIXELS
    )
    return {space: NearestNeighbours(tensors[f"{space}/distances"], tensors[f"{space}/rows"]) for space in spaces}
