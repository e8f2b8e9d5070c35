"""LoRA, low-rank adaptation, and DoRA, which adapts magnitudes apart from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from diffusion.common.config import is_unset
from diffusion.families.adapters.base import AdapterFormat, RankedAdapterConfig

if TYPE_CHECKING:
    from torch import Tensor

DOWN, UP, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight"
"""Names of A, B and m of a layer."""


class LoRAConfig(RankedAdapterConfig):
    """Low-rank adaptation (arXiv 2106.09685): W + α/r · B A, with A, (r, in), and B, (out, r) and at first 0."""

    parts: ClassVar[tuple[frozenset[str], ...]] = (frozenset({DOWN, UP}),)
    formats: ClassVar[tuple[AdapterFormat, ...]] = ("diffusers", "kohya", "peft")
    kind: Literal["lora"] = "lora"
    dropout: float | None = Field(None, gt=0, lt=1, exclude_if=is_unset)
    """Share of the inputs of A that are set to 0 at each step, in each image its own. Null: none."""

    def peft_config(self, layers: Collection[str]) -> Any:
        """Configure peft's LoRA."""
        import peft

        return peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,  # type: ignore[arg-type]  # only divided by r
            target_modules=sorted(layers),
            use_dora=MAGNITUDE in self.parts[0],
            **self.peft_ranks(layers),
        )

    def merge(self, name: str, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Add the product, of A (r, in) and B (out, r), or (r, in, k, k) and (out, r, 1, 1) of a convolution."""
        rank, kernel, a, b = self.rank_of(name), (1,) * (weight.ndim - 2), parts[DOWN], parts[UP]
        if a.shape != (rank, *weight.shape[1:]) or b.shape != (len(weight), rank, *kernel):
            raise ValueError(f"shape of {name}")
        product = b.flatten(1) @ a.flatten(1)
        return weight + self.scale_of(name) * product.view(weight.shape)

    def without_scale(self, name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scale B."""
        return parts | {UP: parts[UP] * self.scale_of(name)}

    def kohya_parts(self, name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return A as lora_down and B as lora_up."""
        alpha = parts[UP].new_tensor(self.alpha_of(name))
        return {"lora_down.weight": parts[DOWN], "lora_up.weight": parts[UP], "alpha": alpha}


class DoRAConfig(LoRAConfig):
    """Weight-decomposed adaptation (arXiv 2402.09353): m V / ‖V‖ with V = W + α/r · B A and, at first, m = ‖W‖.

    Norms are of the rows of V, of one output each; gradients do not pass through ‖V‖ (section 4.3).
    """

    parts: ClassVar[tuple[frozenset[str], ...]] = (frozenset({DOWN, UP, MAGNITUDE}),)
    # ComfyUI divides by norms of W (dora_scale), LyCORIS by those of V: kohya's names stand for both.
    formats: ClassVar[tuple[AdapterFormat, ...]] = ("diffusers", "peft")
    kind: Literal["dora"] = "dora"  # type: ignore[assignment]

    def merge(self, name: str, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Scale the rows of what LoRA merges to m, (out,), or (1, out, 1, 1) of a convolution."""
        magnitude, kernel = parts[MAGNITUDE], (1,) * (weight.ndim - 2)
        if magnitude.shape != ((1, len(weight), *kernel) if kernel else (len(weight),)):
            raise ValueError(f"shape of {name}")
        rows = super().merge(name, weight, parts).flatten(1)
        scaled: Tensor = magnitude.view(-1, 1) * rows / rows.square().sum(1, keepdim=True).sqrt()
        return scaled.view(weight.shape)
