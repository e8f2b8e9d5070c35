"""What adapters share: which layers they adapt, and their ranks."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from diffusion.common.config import Config, is_unset
from diffusion.common.errors import UserError
from diffusion.common.rules import needs

if TYPE_CHECKING:
    from torch import Tensor

AdapterFormat: TypeAlias = Literal["diffusers", "kohya", "peft"]
"""Whose names and settings the files of an exported adapter have."""
BaseWeights: TypeAlias = Literal["int8", "nf4"]
"""How the frozen weights below an adapter are rounded."""


class BaseAdapterConfig(Config):
    """Options of all adapters of the frozen weights W of training.init_from, trained by training.optimizer."""

    parts: ClassVar[tuple[frozenset[str], ...]]
    """Names of the tensors of an adapted layer, as in peft's files: one of these sets."""
    adapts_kernels: ClassVar[bool] = True
    """Whether convolutions of more than one pixel are adapted, too."""
    formats: ClassVar[tuple[AdapterFormat, ...]] = ("peft",)
    """Formats that it is exported in, the default first."""

    kind: str
    """Kind of the adapter, which determines the other options."""
    target_modules: tuple[str, ...] | None = Field(None, min_length=1, max_length=256)
    """Names of the adapted linear and convolutional layers, or ends of their names behind a dot, such as qkv. Null: all
    hidden layers of a network of the family ddpm, and the attention of a pipeline."""
    text_encoder: Annotated[bool, needs("text_encoder_adapters")] = False
    """Whether the text encoder of Stable Diffusion, or both of SDXL, are adapted as well."""
    base_weights: Annotated[BaseWeights | None, needs("quantized_bases")] = Field(None, exclude_if=is_unset)
    """Bits of the frozen weights of a pretrained pipeline's linear layers, which take less memory in training: int8,
    with a scale for each output, or nf4 of QLoRA (arXiv 2305.14314), 4 bits with a scale for each 64 weights. The
    adapter is trained on them, and the model generates with them. Null: all bits."""

    @abstractmethod
    def peft_config(self, layers: Collection[str]) -> Any:
        """Make the configuration by which peft adds this adapter to ``layers``, by name.

        Raises UserError if an option fits none of them.
        """

    @abstractmethod
    def merge(self, name: str, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Compute the adapted weight of the layer ``name``.

        Args:
            name: Its name in the network.
            weight: W, (out, in) of a linear layer or (out, in, k, k) of a convolution, float64.
            parts: Its tensors, float64, by the names of one of ``parts``.

        Raises ValueError for tensors that do not fit.
        """

    def without_scale(self, name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the layer ``name`` for readers that know no α, for the format diffusers."""
        return parts

    def kohya_parts(self, name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the layer ``name`` by the names of the format kohya, with α if there is one."""
        return parts

    @property
    def kohya_metadata(self) -> dict[str, str]:
        """Metadata of a file by the keys of sd-scripts."""
        return {}


class RankedAdapterConfig(BaseAdapterConfig):
    """Options of adapters with a rank."""

    rank: int = Field(8, ge=1, le=1024)
    """r, the rank of the trained product."""
    alpha: float | None = Field(None, gt=0, le=65536)
    """α, which scales the product by α/r; null: the rank, a scale of 1."""
    ranks: dict[str, Annotated[int, Field(ge=1, le=1024)]] | None = Field(
        None, min_length=1, max_length=256, exclude_if=is_unset
    )
    """Other ranks of layers, by patterns of their names, or of ends of these behind a dot: {"attn2.*": 16}. The first
    that fits counts. Null: all have ``rank``."""

    def rank_of(self, layer: str) -> int:
        """Return the rank r of the ``layer`` with this name."""
        for pattern, rank in (self.ranks or {}).items():
            if fnmatchcase(f".{layer}", f"*.{pattern}"):
                return rank
        return self.rank

    def scale_of(self, layer: str) -> float:
        """Return α/r of the ``layer`` with this name."""
        return 1.0 if self.alpha is None else self.alpha / self.rank_of(layer)

    def alpha_of(self, layer: str) -> float:
        """Return α of the ``layer`` with this name."""
        return float(self.rank_of(layer)) if self.alpha is None else self.alpha

    @property
    def kohya_metadata(self) -> dict[str, str]:
        """Rank and α."""
        alpha = float(self.rank) if self.alpha is None else self.alpha
        return {"ss_network_module": "networks.lora", "ss_network_dim": str(self.rank), "ss_network_alpha": str(alpha)}

    def peft_ranks(self, layers: Collection[str]) -> dict[str, Any]:
        """Return rank_pattern and alpha_pattern of peft's configuration; raises UserError for a pattern of no layer."""
        ranks = {layer: self.rank_of(layer) for layer in layers} if self.ranks is not None else {}
        for pattern in self.ranks or {}:
            if not any(fnmatchcase(f".{layer}", f"*.{pattern}") for layer in layers):
                raise UserError(
                    f"training.adapter.ranks has the pattern {pattern}, which fits no adapted layer: adapted are "
                    f"{', '.join(sorted(layers)[:3])} …"
                )
        # peft matches expressions at the ends of names, too.
        patterns = {layer: f"^{re.escape(layer)}" for layer in layers}
        return {
            "rank_pattern": {patterns[layer]: rank for layer, rank in ranks.items()},
            "alpha_pattern": {patterns[layer]: self.alpha_of(layer) for layer in ranks},
        }
