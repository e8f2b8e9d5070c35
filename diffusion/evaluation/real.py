"""What a data set's own pictures are to every model that is judged by them: each thing found out once, and kept."""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffusion.config import Config
from diffusion.data.dataset import Dataset, Rows
from diffusion.errors import UserError
from diffusion.evaluation.bootstrap.neighbourhoods import FEWEST
from diffusion.evaluation.closest import Closest, closest
from diffusion.evaluation.drift import appearance
from diffusion.evaluation.features import Extractor
from diffusion.evaluation.metrics import Scores, judge
from diffusion.evaluation.per_class import Labelled
from diffusion.evaluation.reader import Reader, fit
from diffusion.evaluation.reference import (
    FeaturesKey,
    Reference,
    cached_features,
    cached_reference,
    features_key,
)
from diffusion.evaluation.sealed import recall, recall_found
from diffusion.evaluation.thumbnails import NAME, moved, thumbnails
from diffusion.files import digest_of
from diffusion.progress import Progress, silent
from diffusion.random import permutation
from diffusion.upscaling import FromNoise, GenerationTask

PIECE = 10_000
"""Training pictures whose features are made and kept together: 50 MB of them, lost at most if it is stopped."""
CHUNK = 1000
"""Pictures in memory at a time."""
SHOWN = 64
"""Images of each set that are kept to be looked at."""
Views = dict[str, Tensor]
"""Of N pictures, by the name of a space, what they look like there from V sides: (V, N, D) float32."""


class HeldOutKey(Config):
    """All that the training pictures nearest to held-out ones depend on."""

    kind: Literal["neighbours of held-out pictures"] = "neighbours of held-out pictures"
    format_version: Literal[1] = 1
    """Grows when thumbnails or distances come out another way."""
    held_out: FeaturesKey
    training: FeaturesKey
    mirrored: bool


class ReaderKey(Config):
    """All that the classifier on features depends on."""

    kind: Literal["reader"] = "reader"
    format_version: Literal[1] = 1
    """Grows when it is fitted another way."""
    training: FeaturesKey
    classes: tuple[str, ...]


class ScoresKey(Config):
    """All that scores depend on."""

    kind: Literal["scores"] = "scores"
    format_version: Literal[1] = 1
    """Grows when a formula changes."""
    judged: str
    """Digest of the key of the features that are judged."""
    compared: FeaturesKey


class Real:
    """The pictures of one data set in the eyes of one feature network.

    ``count``: held-out pictures used at most, the first by key. What models draw is compared with these; models that
    enlarge, ``samples`` of them, get one part shown and are compared with the others: shown
    what they are compared with, they would be nearer to it than real pictures are.

    Kept in ``folder``. Features of training pictures are many, so those of other versions of the data set go.
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
                f"a model that enlarges is shown one half of the held-out pictures and compared with the other, and "
                f"{self.dataset.folder} has {len(held_out)} of {2 * FEWEST}: hold more out with ingest.held_out"
            )
        return held_out[:shown], held_out[shown:]

    @cached_property
    def reference(self) -> Reference:
        """What drawn pictures are compared with."""
        return cached_reference(self.folder, self.dataset, self.compared, self.extractor, self.progress)

    def scores(self, key: Config, features: Tensor) -> Scores:
        """How far ``features`` (N, D), which ``key`` names, lie from the pictures compared with."""
        named = ScoresKey(judged=digest_of(key.model_dump(mode="json")), compared=self.compared_key)
        return recall_found(self.folder, named, Scores, lambda: (self.score(features), {}))[0]

    def score(self, features: Tensor) -> Scores:
        """How far ``features`` (N, D) lie from the images compared with."""
        return judge(features, self.reference, self.extractor.name)

    def floor(self, seed: int) -> tuple[FeaturesKey, Tensor]:
        """Features of training pictures that stand for drawn ones, (N, D): as many as are drawn, or all there are."""
        order = permutation(seed, "evaluation/floor", 0, len(self.train))
        rows = self.train[order[: len(self.shown) or self.samples]]
        features = cached_features(self.folder, self.dataset, rows, self.extractor, self.progress)
        return features_key(self.dataset, rows, self.extractor), features

    @cached_property
    def small(self) -> Tensor | None:
        """What models of super-resolution start from, (N, C, h, w) uint8; None: the task starts from noise."""
        pieces = [self.task.inputs(images) for images in self.pictures(self.shown)]
        inputs = [piece for piece in pieces if piece is not None]
        return torch.cat(inputs) if inputs else None

    @cached_property
    def appearance(self) -> dict[str, Tensor]:
        """What the pictures compared with look like as a whole."""
        pieces = [appearance(pictures) for pictures in self.pictures(self.compared)]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}

    @cached_property
    def thumbnails(self) -> Tensor:
        """Of the pictures compared with, as they are and moved, (9, N, D)."""
        return moved_in_pieces(self.pictures(self.compared))

    @property
    def shown_images(self) -> Tensor:
        """Some held-out images to look at, (N, C, H, W) uint8; those that models enlarge, if they do."""
        rows = self.shown if len(self.shown) else self.held_out
        return self.dataset.pictures(rows[:SHOWN])

    @property
    def training_key(self) -> FeaturesKey:
        """That of the features of all training pictures."""
        return features_key(self.dataset, self.train, self.extractor)

    @property
    def compared_key(self) -> FeaturesKey:
        """That of the features of what drawn pictures are compared with."""
        return features_key(self.dataset, self.compared, self.extractor)

    def labelled(self, classes: Sequence[str]) -> Labelled:
        """The pictures compared with, as far as they are of ``classes``."""
        return Labelled(self.reference.features, self.dataset.classes(self.compared, classes))

    def pictures(self, rows: Rows) -> Iterator[Tensor]:
        """Those in ``rows``, (n, C, H, W) uint8, piece by piece."""
        for start in range(0, len(rows), CHUNK):
            yield self.dataset.pictures(rows[start : start + CHUNK])

    def views(self, pieces: Iterable[Tensor], features: Tensor, mirrored: bool) -> Views:
        """Of pictures (N, C, H, W) uint8 that come in ``pieces``, with ``features`` (N, D), in both spaces."""
        small, flipped = [], []
        for piece in pieces:
            small.append(moved(piece, mirrored))
            if mirrored:
                flipped.append(self.extractor(piece.flip(3)))
        sides = [features, torch.cat(flipped)] if mirrored else [features]
        return {NAME: torch.cat(small, 1), self.extractor.name: torch.stack(sides)}

    def neighbours(self, views: Views) -> dict[str, Closest]:
        """The training pictures nearest to each of others, by space; rows count from the first by key."""
        small = (thumbnails(pictures) for pictures in self.pictures(self.train))
        pieces = {NAME: small, self.extractor.name: self._training()}
        return {space: closest(points, pieces[space], progress=self.progress) for space, points in views.items()}

    def held_out_neighbours(self, mirrored: bool) -> dict[str, Closest]:
        """Those of the held-out pictures."""

        def work() -> dict[str, Tensor]:
            features = cached_features(self.folder, self.dataset, self.held_out, self.extractor, self.progress)
            views = self.views(self.pictures(self.held_out), features, mirrored)
            return unpacked(self.neighbours(views))

        held_out = features_key(self.dataset, self.held_out, self.extractor)
        key = HeldOutKey(held_out=held_out, training=self.training_key, mirrored=mirrored)
        return packed(recall(self.folder, key, work))

    def reader(self, classes: Sequence[str]) -> Reader:
        """What tells these ``classes`` apart, fitted to the training pictures."""

        def work() -> dict[str, Tensor]:
            labels = (self.dataset.classes(rows, classes) for rows in self._pieces())
            found = fit(zip(self._training(), labels, strict=True), len(classes))
            return {"weights": found.weights, "offsets": found.offsets}

        kept = recall(self.folder, ReaderKey(training=self.training_key, classes=tuple(classes)), work)
        return Reader(kept["weights"], kept["offsets"])

    def _training(self) -> Iterator[Tensor]:
        """Features of all training pictures, piece by piece."""
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


def moved_in_pieces(pieces: Iterable[Tensor]) -> Tensor:
    """Thumbnails of pictures that come in ``pieces``, as they are and moved: (9, N, D)."""
    return torch.cat([moved(piece) for piece in pieces], 1)


def unpacked(neighbours: dict[str, Closest]) -> dict[str, Tensor]:
    """Neighbours by space as tensors of a file."""
    return {f"{space}/distances": each.distances for space, each in neighbours.items()} | {
        f"{space}/rows": each.rows for space, each in neighbours.items()
    }


def packed(tensors: dict[str, Tensor]) -> dict[str, Closest]:
    """The way back."""
    spaces = sorted({name.removesuffix("/rows") for name in tensors if name.endswith("/rows")}, key=lambda s: s != NAME)
    return {space: Closest(tensors[f"{space}/distances"], tensors[f"{space}/rows"]) for space in spaces}
