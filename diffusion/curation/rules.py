"""Rules on single images: what each measures, and the thresholds beyond which it drops an image.

Other packages add theirs under ``darkroom.curation_rules``.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np

from diffusion.common.config import Config
from diffusion.common.extensions import with_extensions

GROUP = "darkroom.curation_rules"
"""Entry points: the name of a rule, and a subclass of ``Rule``."""
Bound = Literal["min", "max"]
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in the luma, as in JPEG."""
LEVELS, UNIFORM = 12, 0.98
"""A row or column belongs to the border while this share of its pixels is within so many levels of one colour."""
STROKE = 40
"""Difference in luma between neighbours, in levels, from which there is an edge of a stroke."""
MIN_STROKES, MAX_MIDTONES = 0.22, 0.4
"""Smallest share of such edges in a window of text, and largest share of pixels between its two tones."""


class Rule(Config):
    """A rule on single images with its settings. One of another package may have settings of its own."""

    title: ClassVar[str]
    meaning: ClassVar[str]
    """Title and explanation on the page on which thresholds are chosen."""
    bound: ClassVar[Bound] = "min"
    """The threshold that is chosen there."""
    source: ClassVar[Literal["pixels", "record", "features", "classifier"]] = "pixels"
    """What it measures: stored pixels, or what ``curation.measures`` makes of the record or by a network."""

    min: float | None = None
    """Smallest value of an image that is kept."""
    max: float | None = None
    """Largest value of an image that is kept."""

    def measure(self, images: np.ndarray, luma: np.ndarray) -> np.ndarray:
        """Compute the value of each of ``images``, (N, H, W, 3) uint8, with their luma, (N, H, W) in levels: (N,)."""
        raise NotImplementedError(f"{type(self).__name__} does not measure pixels")


class Side(Rule):
    """The shorter side of the image as it came, in pixels."""

    title = "Original size"
    meaning = "shorter side of the image as it came, in pixels"
    source = "record"


class Aspect(Rule):
    """The ratio of the longer to the shorter side of the image as it came."""

    title = "Aspect ratio"
    meaning = "longer over shorter side of the image as it came"
    bound = "max"
    source = "record"


class Sharpness(Rule):
    """The variance of the 3×3 Laplacian of the luma, in squared levels."""

    title = "Sharpness"
    meaning = "variance of the Laplacian: blurred images have little"

    def measure(self, images: np.ndarray, luma: np.ndarray) -> np.ndarray:
        """Filter the luma by [0 1 0; 1 −4 1; 0 1 0]."""
        inner = luma[:, 1:-1, 1:-1]
        laplacian = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:] - 4 * inner
        variance: np.ndarray = laplacian.var((1, 2))
        return variance


class Entropy(Rule):
    """The entropy of the histogram of the luma, in bits."""

    title = "Entropy"
    meaning = "bits per pixel of the grey levels: flat images have little"

    def measure(self, images: np.ndarray, luma: np.ndarray) -> np.ndarray:
        """Count rounded levels."""
        histograms = np.stack([np.bincount(np.rint(plane).astype(np.uint8).ravel(), minlength=256) for plane in luma])
        shares = histograms / histograms[0].sum()
        entropy: np.ndarray = -(shares * np.log2(np.maximum(shares, 1e-12))).sum(1)
        return entropy


class Border(Rule):
    """The share of the area in rows and columns of one colour along the edges."""

    title = "Border"
    meaning = "share of the area in rows and columns of one colour along the edges"
    bound = "max"

    def measure(self, images: np.ndarray, luma: np.ndarray) -> np.ndarray:
        """Count rows from above and below, then columns of what is between them."""
        return np.array([self._share(image) for image in images])

    def _share(self, image: np.ndarray) -> float:
        height, width = image.shape[:2]
        top, bottom = (self._uniform_rows(rows) for rows in (image, image[::-1]))
        if top + bottom >= height:
            return 1.0
        inside = image[top : height - bottom].transpose(1, 0, 2)
        left, right = (self._uniform_rows(rows) for rows in (inside, inside[::-1]))
        inner = (height - top - bottom) * (width - left - right)
        return float(1 - inner / (height * width))

    @staticmethod
    def _uniform_rows(rows: np.ndarray) -> int:
        """Count the first of ``rows`` (R, P, 3) that have the colour of the first one."""
        colour = np.median(rows[0], axis=0)
        is_uniform = (np.abs(rows - colour) <= LEVELS).all(2).mean(1) >= UNIFORM
        return int(is_uniform.argmin()) if not is_uniform.all() else len(rows)


class Text(Rule):
    """The share of the area in windows that look like lines of text: two-toned, with many upright strokes."""

    title = "Text"
    meaning = "share of the area that looks like lines of text; fences and line art do, too"
    bound = "max"

    def measure(self, images: np.ndarray, luma: np.ndarray) -> np.ndarray:
        """Look at overlapping windows of a sixteenth of the height and a quarter of the width."""
        return np.array([self._share(plane) for plane in luma])

    @staticmethod
    def _share(luma: np.ndarray) -> float:
        height, width = luma.shape
        window_height, window_width = min(height, max(4, height // 16)), min(width, max(12, width // 4))
        down, across = max(1, window_height // 2), max(1, window_width // 4)

        def windows(values: np.ndarray) -> np.ndarray:
            return np.lib.stride_tricks.sliding_window_view(values, (window_height, window_width))[::down, ::across]

        tones = windows(luma)
        low, top = tones.min((2, 3), keepdims=True), tones.max((2, 3), keepdims=True)
        midtones = (np.abs(tones - (low + top) / 2) < (top - low) / 6).mean((2, 3))
        strokes = windows(np.abs(np.diff(luma, axis=1, append=luma[:, -1:])) >= STROKE).mean((2, 3))
        text_mask = np.zeros(luma.shape, bool)
        for row, column in np.argwhere((strokes >= MIN_STROKES) & (midtones <= MAX_MIDTONES)):
            text_mask[down * row : down * row + window_height, across * column : across * column + window_width] = True
        return float(text_mask.mean())


class Brightness(Rule):
    """The mean luma."""

    title = "Brightness"
    meaning = "mean grey level, 0 to 255"

    def measure(self, images: np.ndarray, luma: np.ndarray) -> np.ndarray:
        """Compute it in levels."""
        mean: np.ndarray = luma.mean((1, 2))
        return mean


class Contrast(Rule):
    """The standard deviation of the luma."""

    title = "Contrast"
    meaning = "standard deviation of the grey levels, 0 to 128"

    def measure(self, images: np.ndarray, luma: np.ndarray) -> np.ndarray:
        """Compute it in levels."""
        deviation: np.ndarray = luma.std((1, 2))
        return deviation


class Outlier(Rule):
    """Per cent of the images whose fifth neighbour, in the features of evaluation.extractor, is nearer."""

    title = "Outlier"
    meaning = "per cent of the images that are more usual"
    bound = "max"
    source = "features"


class Nsfw(Rule):
    """The score of the classifier ``curation.nsfw``."""

    title = "NSFW"
    meaning = "score of the classifier"
    bound = "max"
    source = "classifier"


RULES: Mapping[str, type[Rule]] = {
    "sharpness": Sharpness,
    "entropy": Entropy,
    "contrast": Contrast,
    "brightness": Brightness,
    "border": Border,
    "text": Text,
    "side": Side,
    "aspect": Aspect,
    "outlier": Outlier,
    "nsfw": Nsfw,
}
"""Rules by the name of what they measure, in the order of the page. Those without a field ``min_NAME`` or ``max_NAME``
of the section ``curation`` are set under ``curation.rules``, as the rules of other packages are."""


def all_rules() -> dict[str, type[Rule]]:
    """Return the rules of Darkroom and of other packages by name; raises UserError if a package cannot be imported."""
    return with_extensions(GROUP, RULES)
