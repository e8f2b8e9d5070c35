"""LoKr, adaptation by Kronecker products."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from diffusion.common.config import is_unset
from diffusion.families.adapters.base import AdapterFormat, RankedAdapterConfig

if TYPE_CHECKING:
    from torch import Tensor

FIRST, SECOND, SECOND_A, SECOND_B = "lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"
"""Names of W₁, W₂, and the factors of a W₂ of low rank."""


class LoKrConfig(RankedAdapterConfig):
    """Kronecker adaptation (LyCORIS, arXiv 2309.14859): W + α/r · W₁ ⊗ W₂, of W₁, (l, m), and W₂, (out/l, in/m).

    W₂, at first 0, is a product of rank r where that has fewer numbers, r below half its longer side.
    """

    parts: ClassVar[tuple[frozenset[str], ...]] = (frozenset({FIRST, SECOND}), frozenset({FIRST, SECOND_A, SECOND_B}))
    formats: ClassVar[tuple[AdapterFormat, ...]] = ("kohya", "diffusers", "peft")
    kind: Literal["lokr"] = "lokr"
    factor: int | None = Field(None, ge=2, le=1024, exclude_if=is_unset)
    """l and m, the sides of W₁, where they divide the layer's, else the largest divisors below: the larger, the fewer
    numbers are trained, up to null: the divisors nearest to the square root of each side."""

    def peft_config(self, layers: Collection[str]) -> Any:
        """Configure peft's LoKr, which begins as LyCORIS does."""
        import peft

        return peft.LoKrConfig(
            r=self.rank,
            alpha=self.rank if self.alpha is None else self.alpha,  # type: ignore[arg-type]  # only divided by r
            target_modules=sorted(layers),
            decompose_factor=self.factor or -1,
            init_weights="lycoris",
            **self.peft_ranks(layers),
        )

    def merge(self, name: str, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Add the product of W₁ and W₂, of which a convolution's are (out/l, in/m, k, k) or (r, in/m · k²)."""
        first, second = parts[FIRST], parts.get(SECOND)
        if second is None:
            a, b = parts[SECOND_A], parts[SECOND_B]
            if a.ndim != 2 or b.ndim != 2 or not a.shape[1] == len(b) == self.rank_of(name):
                raise ValueError(f"shape of {name}")
            second = a @ b
        rows, flat = weight.flatten(1), second.flatten(1)
        if first.ndim != 2 or [n * m for n, m in zip(first.shape, flat.shape, strict=True)] != [*rows.shape]:
            raise ValueError(f"shape of {name}")
        return weight + self.scale_of(name) * first.contiguous().kron(flat).view(weight.shape)

    def without_scale(self, name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scale W₁."""
        return parts | {FIRST: parts[FIRST] * self.scale_of(name)}

    def kohya_parts(self, name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add α: readers know the rank by the factors of W₂, and scale by 1 if it is whole, so that W₁ is scaled."""
        if SECOND in parts:
            return self.without_scale(name, parts) | {"alpha": parts[FIRST].new_tensor(float(self.rank_of(name)))}
        return parts | {"alpha": parts[FIRST].new_tensor(self.alpha_of(name))}

    @property
    def kohya_metadata(self) -> dict[str, str]:
        """Rank, α, and the settings of LyCORIS."""
        settings = json.dumps({"algo": self.kind, "factor": str(self.factor or -1)})
        return {**super().kohya_metadata, "ss_network_module": "lycoris.kohya", "ss_network_args": settings}
