"""The features that "FID" without more means: Inception-v3 as Heusel et al. used it (arXiv 1706.08500)."""

import io
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from diffusion.errors import UserError
from diffusion.files import sha256_file
from diffusion.lanes import lanes

DIGEST = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 of the weights that the literature's figures rest on, as torch-fidelity and others converted them."""
LAYER = "2048"
"""The last pooling layer."""
BATCH = 32
"""Pictures per pass: at 299 pixels larger ones leave the cores' caches."""


class InceptionV3:
    """torch-fidelity's Inception-v3, so that its figures are those of the literature, to all their digits.

    Features are the 2048 channels of its last pooling layer. Grey pictures are repeated to RGB; the network itself
    resizes to 299 pixels as TensorFlow 1 did and maps to [−1, 1). The weights load at the first call. The name
    ``inception`` is theirs alone: other ``weights`` are known by their digest, ``inception_1a2b3c4d``.
    """

    preprocessing = "RGB, 299 px by TensorFlow 1's bilinear interpolation, (x - 128) / 128"

    def __init__(self, weights: Path) -> None:
        self.weights = weights
        self.digest = sha256_file(weights)
        self.name = "inception" if self.digest == DIGEST else f"inception_{self.digest[:8]}"

    @property
    def about(self) -> str:
        """What it is."""
        trained = "trained on ImageNet" if self.digest == DIGEST else f"with the weights in {self.weights.name}"
        return f"Inception-v3 {trained}, pictures at 299 pixels"

    @cached_property
    def network(self) -> FeatureExtractorInceptionV3:
        """The network with its weights; raises UserError if they are not Inception's."""
        try:
            weights = torch.load(self.weights, map_location="cpu", weights_only=True)
            # torch-fidelity unpickles whatever it is given: so it is given what was read as data, written again.
            copied = io.BytesIO()
            torch.save(weights, copied)
            copied.seek(0)
            with torch.random.fork_rng(devices=[]):  # it begins with random weights
                return FeatureExtractorInceptionV3(self.name, [LAYER], feature_extractor_weights_path=copied)
        except Exception as error:  # bytes that are no weights fail in every way there is
            raise UserError(
                f"{self.weights} holds no weights of torch-fidelity's Inception-v3 ({_first_line(error)}): "
                f"get them from {URL_INCEPTION_V3}"
            ) from error

    def __call__(self, pictures: Tensor) -> Tensor:
        """Features, (N, 2048) float32, of ``pictures``, (N, C, H, W) uint8 with C 1 or 3."""
        self.network  # noqa: B018 (loaded here, once, before the lanes want it)
        with lanes() as pool:
            return torch.cat(list(pool.map(self._batch, torch.split(pictures, BATCH))))

    @torch.inference_mode()
    def _batch(self, pictures: Tensor) -> Tensor:
        (features,) = self.network(pictures.expand(-1, 3, -1, -1))
        return features  # type: ignore[no-any-return]


def open_inception(weights: Path | None) -> InceptionV3:
    """Inception-v3 with ``weights``, or with the literature's, where torch-fidelity keeps them or from the network.

    Raises UserError if they are in neither place, or not the ones expected.
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
            # Written under a name of its own and renamed once the digest is right.
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(kept), hash_prefix=DIGEST, progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"Inception's weights are not at {kept} and cannot be fetched from {URL_INCEPTION_V3} "
                f"({_first_line(error)}): fetch them elsewhere and set evaluation.extractor_weights to the file, or "
                "use another evaluation.extractor"
            ) from error
    if sha256_file(kept) != DIGEST:
        raise UserError(f"{kept} are not the weights that the literature's FID rests on: delete it and try again")
    return kept


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
