"""Features of a classifier trained on a data set's own labels, for images that ImageNet features do not suit."""

import math
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from diffusion.common.errors import UserError
from diffusion.common.files import digest_of, sha256_bytes
from diffusion.common.fingerprint import fingerprint
from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.random import permutation
from diffusion.common.shapes import Images, height_and_width, map_by_shape
from diffusion.common.threads import worker_threads
from diffusion.data.dataset import Dataset
from diffusion.evaluation.cache import Key, Tensors, load_or_compute
from diffusion.evaluation.features.feature_extractor import Extractor, resize

SIZE = 32
"""Default height and width of the input, in pixels; smaller images keep their size."""
WIDTHS = (24, 48, 96)
"""Channels of the three stages; the last are the features."""
BATCH = 128
"""Images per step, and per pass."""
STEPS = 300
"""Training steps: half a minute on one core at 32 pixels."""
PEAK, DECAY = 2e-3, 0.05
"""Learning rate after a warm-up of a tenth of the steps, falling by a cosine; and AdamW's weight decay."""
SMOOTHING = 0.1
"""Label smoothing: without it features of easy data sets collapse into a point per class."""
SEED = 0
"""Seed of the initial weights and of the order of the images."""


class ClassifierNetwork(nn.Module):
    """Three stages of two 3×3 convolutions, each at half the previous size; then the mean over all positions.

    Features are these means scaled, after training, to length √96: unscaled, they rank much noise above little.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for number, (previous_width, width) in enumerate(zip((channels, *WIDTHS[:-1]), WIDTHS, strict=True)):
            for input_width, stride in ((previous_width, 1 if number == 0 else 2), (width, 1)):
                blocks += [nn.Conv2d(input_width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.SiLU()]
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(WIDTHS[-1], classes)

    def features(self, x: Tensor) -> Tensor:
        """Return features, (N, 96), of images (N, C, S, S) in [−1, 1]."""
        return normalize(self._pool(x)) * math.sqrt(WIDTHS[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (N, classes), of images (N, C, S, S) in [−1, 1]."""
        return self.head(self._pool(x))  # type: ignore[no-any-return]

    def _pool(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))  # type: ignore[no-any-return]


class LabelClassifier(Extractor):
    """A trained classifier of K classes as a feature network, of images with ``channels`` at ``size`` pixels.

    ``accuracy`` is the share of the ``held_out`` labelled images classified correctly, ``chance`` that of always
    predicting their most common label.
    """

    name = "labels"
    batch = BATCH

    def __init__(
        self, network: ClassifierNetwork, channels: int, size: int, accuracy: float, chance: float, held_out: int
    ) -> None:
        self.network, self.size = network, size
        self.accuracy, self.chance, self.held_out = accuracy, chance, held_out
        weights = network.state_dict()
        self.digest = digest_of({name: sha256_bytes(value.numpy().tobytes()) for name, value in weights.items()})
        self.preprocessing = f"{channels} channels, {size} px, antialiased bilinear, [-1, 1]; length sqrt({WIDTHS[-1]})"
        self.about = (
            f"a classifier of the data set's own labels at {size} pixels, right on {accuracy:.1%} of "
            f"{held_out:,} held-out images (the most common label: {chance:.1%})"
        )

    @torch.inference_mode()
    def _features(self, network: ClassifierNetwork, images: Tensor) -> Tensor:
        return network.features(_scale(images, self.size))


def load_label_classifier(
    dataset: Dataset, size: int | None, cache: Path, progress: Progress = ignore_progress
) -> LabelClassifier:
    """Train a classifier of the labels of ``dataset`` on its training images at ``size``, or load it from ``cache``.

    Raises UserError unless they have two labels or more, and some held-out images have labels.
    """
    side = min(SIZE, dataset.manifest.size) if size is None else size
    rows, labels = _select_labelled(dataset, "train")
    classes = sorted(set(labels))
    held_out, truth = _select_labelled(dataset, "held_out")
    if len(classes) < 2 or not truth:
        raise UserError(
            f"evaluation.extractor = labels learns to tell labels apart, and data set {dataset.manifest.name} has "
            f"{len(classes)} among its training images and {len(truth)} labelled held-out images: use efflite0, or "
            "ingest images with labels"
        )
    key: Key = {"kind": "labels", "format_version": 1, "content_digest": dataset.manifest.content_digest}
    key |= {"size": side, "fingerprint": fingerprint(BATCH, "fp32", "cpu")}

    def work() -> Tensors:
        targets = dataset.classes(rows, classes)
        with worker_threads(1):
            network = train_classifier(dataset, rows, targets, len(classes), side, progress)
            pieces = [held_out[start : start + BATCH] for start in range(0, len(held_out), BATCH)]
            with torch.inference_mode():
                predictions = torch.cat(
                    [network(_scale(dataset.images_in_order(piece), side)).argmax(1) for piece in pieces]
                )
        return network.state_dict() | {"accuracy": (predictions == dataset.classes(held_out, classes)).double().mean()}

    tensors = load_or_compute(cache, key, work)
    accuracy = tensors.pop("accuracy").item()
    with torch.device("meta"):  # avoids use of the global random state
        network = ClassifierNetwork(dataset.shape[0], len(classes))
    network.load_state_dict(tensors, assign=True)
    chance = max(Counter(truth).values()) / len(truth)
    return LabelClassifier(network.eval().requires_grad_(False), dataset.shape[0], side, accuracy, chance, len(truth))


def train_classifier(
    dataset: Dataset, rows: np.ndarray, targets: Tensor, classes: int, size: int, progress: Progress
) -> ClassifierNetwork:
    """Train a classifier on images in ``rows`` with class numbers ``targets``, (len(rows),)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = ClassifierNetwork(dataset.shape[0], classes)
    optimizer = torch.optim.AdamW(network.parameters(), PEAK, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, STEPS, pct_start=0.1)
    batch = min(BATCH, len(rows))
    per_epoch = len(rows) // batch
    for step in range(STEPS):
        epoch, place = divmod(step, per_epoch)
        indices = permutation(SEED, "evaluation/labels", epoch, len(rows))[place * batch : (place + 1) * batch]
        logits = network(_scale(dataset.images_in_order(rows[indices]), size))
        loss = cross_entropy(logits, targets[torch.from_numpy(indices)], label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress("steps of learning the labels", step + 1, STEPS)
    return network.eval().requires_grad_(False)


def _select_labelled(dataset: Dataset, split: Literal["train", "held_out"]) -> tuple[np.ndarray, list[str]]:
    """Return the labelled rows of a split and their labels."""
    rows = dataset.rows(split)
    labels = dataset.labels(rows)
    return rows[[label is not None for label in labels]], [label for label in labels if label is not None]


def _scale(images: Images, size: int) -> Tensor:
    """Convert images, each (C, H, W) uint8, to the network's input: (N, C, size, size) in [−1, 1]."""
    x = map_by_shape(
        images, lambda batch: batch.float() if height_and_width(batch) == (size, size) else resize(batch.float(), size)
    )
    return x / 127.5 - 1
