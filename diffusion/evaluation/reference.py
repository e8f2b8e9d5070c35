"""What pictures are compared with: features of real ones, and what can be said of them once for all comparisons.

A cache that gives the wrong statistics makes every score wrong and looks like nothing. So what is kept is known by all
that it depends on, down to the machine's arithmetic, and is what would be computed again, bit for bit.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from diffusion.config import Config
from diffusion.data.dataset import Dataset, Rows
from diffusion.evaluation.features import BATCH, Extractor, features_of
from diffusion.evaluation.kid import kernel_sums
from diffusion.evaluation.moments import Moments, moments
from diffusion.evaluation.neighbours import nearest
from diffusion.evaluation.sealed import recall
from diffusion.files import sha256_bytes
from diffusion.fingerprint import Fingerprint, fingerprint
from diffusion.progress import Progress, silent


@dataclass(frozen=True)
class Reference:
    """Real pictures as scores see them."""

    features: Tensor
    """(M, D) float32."""
    moments: Moments
    """Of the features."""
    nearest: Tensor
    """(M, 5) float32: squared distances of each to its nearest others, ascending."""
    kernel_sums: Tensor
    """(M,) float64: sums of KID's kernel of each with all others."""

    @classmethod
    def of(cls, features: Tensor, progress: Progress = silent) -> "Reference":
        """What there is to know of features (M, D), M at least 6."""
        return cls(features, moments(features), nearest(features, progress=progress), kernel_sums(features, progress))


class FeaturesKey(Config):
    """All that features of some pictures of a data set depend on."""

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
    """How pictures are shown to it, their size included."""
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
    """As ``features_of``, (len(rows), D) float32, kept in ``folder``."""
    key = features_key(dataset, rows, extractor)
    kept = recall(folder, key, lambda: {"features": features_of(dataset, rows, extractor, progress)})
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

    kept = recall(folder, StatisticsKey(features=features_key(dataset, rows, extractor)), work)
    return Reference(features, Moments(len(rows), kept["mean"], kept["root"]), kept["nearest"], kept["kernel_sums"])
