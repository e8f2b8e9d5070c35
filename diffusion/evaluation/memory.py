"""Judgements that are made once and remembered in files that are either right or not used."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from diffusion.config import Config, unset
from diffusion.evaluation.enlargement import Likeness
from diffusion.evaluation.metrics import Scores
from diffusion.evaluation.results import Reconstruction
from diffusion.files import sha256_file, write_bytes
from diffusion.fingerprint import Fingerprint
from diffusion.model import read_header, save_tensors

Kept = dict[str, Tensor]
"""``shown`` and of an autoencoder ``reconstructed``: pictures, (N, C, H, W) uint8. Of a model that was judged in full
also ``features`` of all that it drew, (samples, D) float32."""


class Record(Config):
    """What is remembered of a set of pictures once judged; pictures to be shown and features lie beside it."""

    key: str
    images: int
    scores: Scores
    reconstruction: Reconstruction | None = Field(None, exclude_if=unset)
    family: str = Field("ddpm", exclude_if=lambda family: family == "ddpm")
    fingerprint: Fingerprint
    likeness: Likeness | None = Field(None, exclude_if=unset)


@dataclass(frozen=True)
class Memory:
    """Finished judgements in a folder, each under a digest of everything that went into it.

    A judgement is ``<key>.safetensors`` and, written last, its digest: what is cut short or damaged is
    judged again.
    """

    folder: Path

    def recall(self, key: str, work: Callable[[], tuple[Record, Kept]]) -> tuple[Record, Kept]:
        """The judgement remembered under ``key``, or else the one that ``work`` makes."""
        path = self.folder / f"{key}.safetensors"
        seal = path.with_suffix(".sha256")
        if not (path.is_file() and seal.is_file() and sha256_file(path) == seal.read_text().strip()):
            record, kept = work()
            digest = save_tensors(path, kept, record.model_dump(mode="json"))
            write_bytes(seal, f"{digest}\n".encode())
        return Record.model_validate(read_header(path)), load_file(path)
