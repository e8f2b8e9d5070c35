"""Pseudo-classes for images without a label (arXiv 2403.00570): clusters of k-means, which a model is conditioned on.

A cluster is recorded as its exemplar, the image nearest to its centre, and an image without a label gets that of the
nearest exemplar. So clusters stay what they are when images come, and a takedown of an exemplar leaves none of it.
Images are compared by their small copies: by no network, so that nothing is shared with what judges a model.
"""

import warnings
from collections.abc import Sequence

import numpy as np

from diffusion.common.errors import UserError, install_hint
from diffusion.curation.lists import Label, ListChange, ListOutcome, decide_by_lists, put_list
from diffusion.curation.measures import Measurements
from diffusion.data.versions.image_lists import ListedImages
from diffusion.evaluation.metrics.registration import SIDE

CLUSTERED, ROUNDS = 10_000, 40
"""Images that k-means sees, and its rounds."""
MIN_IMAGES = 10
"""Fewest images per cluster, on average."""
CHUNK = 4096
"""Images compared with all exemplars at a time."""


def add_clusters(measurements: Measurements, lists: list[ListedImages], change: ListChange) -> ListOutcome:
    """Cluster the images that ``lists`` and their source leave without a label, and put the exemplars into ``lists``.

    Raises UserError if there are too few images, or SciPy is not installed.
    """
    assert change.clusters is not None
    _, labels = decide_by_lists(measurements.records, lists)
    rows = np.flatnonzero([label.label is None for label in labels])
    if len(rows) < MIN_IMAGES * change.clusters:
        raise UserError(
            f"{change.clusters:,} clusters need {MIN_IMAGES * change.clusters:,} images without a label, and there are "
            f"{len(rows):,}: give fewer clusters"
        )
    # Keys are digests, so the first ones are a random sample.
    exemplars = _choose_exemplars(measurements, rows[:CLUSTERED], change.clusters)
    files = measurements.records.select(["key", "source_sha256"]).take(exemplars).to_pylist()
    digits = len(str(len(files) - 1))
    images = {file["key"]: (file["source_sha256"], f"cluster-{place:0{digits}}") for place, file in enumerate(files)}
    return ListOutcome(name=change.name, recorded=put_list(lists, change, images))


def _points(measurements: Measurements, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """Shrink the small copies of the images in ``rows`` once more: (N, 3·SIDE²/4) whole numbers, as float64."""
    small = measurements.matrices["small"][rows].view(-1, 3, SIDE // 2, 2, SIDE // 2, 2)
    return small.sum((3, 5)).flatten(1).double().numpy()


def _choose_exemplars(measurements: Measurements, rows: np.ndarray, count: int) -> list[int]:
    """Cluster the images in ``rows``, and return those nearest to the centres, without empty clusters."""
    try:
        from scipy.cluster.vq import kmeans2, vq
    except ImportError as error:
        raise UserError(f"clusters need SciPy: {install_hint('evaluation')}") from error
    points = _points(measurements, rows)
    with warnings.catch_warnings(category=UserWarning, action="ignore"):  # of clusters that become empty
        centres, _ = kmeans2(points, count, ROUNDS, minit="++", seed=0)
    clusters, distances = vq(points, centres)
    members = [places for number in range(count) if len(places := np.flatnonzero(clusters == number))]
    return [int(rows[places[distances[places].argmin()]]) for places in members]


def label_by_clusters(
    measurements: Measurements, labels: Sequence[Label], lists: Sequence[ListedImages]
) -> list[Label]:
    """Return ``labels`` with that of the nearest exemplar in ``lists`` for images without one.

    Whole numbers make the distances exact, so that all machines choose the same.
    """
    for each in lists:
        if each.about.kind == "clusters":
            labels = _label_by_exemplars(measurements, labels, each)
    return list(labels)


def _label_by_exemplars(measurements: Measurements, labels: Sequence[Label], listed: ListedImages) -> list[Label]:
    from scipy.cluster.vq import vq

    texts, result = listed.texts(), list(labels)
    files = measurements.records.select(["key", "source_sha256"]).to_pylist()
    found = [texts.get(file["key"], texts.get(file["source_sha256"])) for file in files]
    exemplars = [row for row, text in enumerate(found) if text is not None]
    rows = [row for row, label in enumerate(labels) if label.label is None] if exemplars else []
    exemplar_points = _points(measurements, exemplars)
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        nearest, _ = vq(_points(measurements, chunk), exemplar_points)
        for row, place in zip(chunk, nearest.tolist(), strict=True):
            result[row] = Label(found[exemplars[place]], listed.about.name, None)
    return result
