"""OFT, adaptation by rotations."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from diffusion.families.adapters.base import BaseAdapterConfig

if TYPE_CHECKING:
    from torch import Tensor

ROTATIONS = "oft_R.weight"
"""Name of the tensor of a layer."""


class OFTConfig(BaseAdapterConfig):
    """Orthogonal fine-tuning (arXiv 2306.07280, 2506.19847): W Rᵀ, with rotations R of blocks of the layer's inputs.

    R = (I + Q)(I − Q)⁻¹ of a skew-symmetric Q, at first 0, by the first five terms of its series in Q, as peft has it.
    Layers are linear, or convolutions of one pixel: peft's others compute something else than merged weights do.
    """

    parts: ClassVar[tuple[frozenset[str], ...]] = (frozenset({ROTATIONS}),)
    adapts_kernels: ClassVar[bool] = False
    kind: Literal["oft"] = "oft"
    block_size: int = Field(32, ge=2, le=1024)
    """b, the number of inputs that are rotated together, or the divisor of a layer's inputs that is nearest to it."""

    def peft_config(self, layers: Collection[str]) -> Any:
        """Configure peft's OFT."""
        import peft

        return peft.OFTConfig(r=0, oft_block_size=self.block_size, target_modules=sorted(layers))

    def merge(self, name: str, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Rotate the columns by the upper triangles of Q, (in/b, b (b − 1) / 2)."""
        triangles = parts[ROTATIONS]
        inputs, blocks = weight.shape[1], len(triangles) if triangles.ndim == 2 else 0
        size = inputs // blocks if blocks and inputs % blocks == 0 else 0
        if not size or triangles.shape[1] != size * (size - 1) // 2:
            raise ValueError(f"shape of {name}")
        q = triangles.new_zeros(blocks, size, size)
        q[:, q.new_ones(size, size).triu(1).bool()] = triangles
        q = q - q.mT
        square = q @ q
        r = q.new_ones(size).diag() + 2 * q + 2 * square + 2 * square @ q + square @ square
        columns = weight.reshape(len(weight), blocks, size).transpose(0, 1)
        return (columns @ r.mT).transpose(0, 1).reshape(weight.shape)
