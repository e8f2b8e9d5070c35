"""Stable Diffusion 1 and 2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from diffusion.families.pretrained.components import CLIP_ATTENTION, CLIP_TOKENIZERS
from diffusion.families.pretrained.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from diffusion.families.pretrained.network import PipelineNetwork
    from diffusion.families.text_encoder import Encoding

V2_WIDTH = 1024
"""Numbers per token that the text encoder of version 2 has; that of version 1 has 768."""


class StableDiffusionPipeline(Pipeline):
    """Stable Diffusion (arXiv 2112.10752): a U-Net with cross-attention to the states of CLIP's text encoder."""

    kinds: ClassVar = {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": CLIP_TOKENIZERS,
    }
    widths = ("cross_attention_dim",)
    guidance = 7.5
    scheduler_settings: ClassVar = {"steps_offset": 1, "clip_sample": False}
    text_adapter_targets = CLIP_ATTENTION
    loads_adapters = True

    @property
    def architecture(self) -> str:
        """Version 1 or 2, which differ in the width of the text encoder, and of the latter which one."""
        if self.denoiser.config["cross_attention_dim"] != V2_WIDTH:
            return "stable-diffusion-v1"
        return "stable-diffusion-v2-768-v" if self.prediction == "v_prediction" else "stable-diffusion-v2-512"

    @property
    def kohya_version(self) -> str:
        """Version 1 or 2."""
        return "sd_v1" if self.architecture.endswith("v1") else "sd_v2"

    def encode_prompt(self, network: PipelineNetwork, prompt: str | None) -> Encoding:
        """Encode ``prompt`` as the last hidden ``states``, (L, D)."""
        ids, mask = network.tokens("tokenizer", prompt or "")
        encoder = network.component("text_encoder")
        uses_mask = getattr(encoder.config, "use_attention_mask", False)
        return {"states": encoder(ids, attention_mask=mask if uses_mask else None)[0][0].float()}

    def encoding_shapes(self, network: PipelineNetwork) -> dict[str, tuple[int, ...]]:
        """Return the shape of all hidden states."""
        length = self.tokenizer_length(network, "tokenizer")
        return {"states": (length, int(self.denoiser.config["cross_attention_dim"]))}

    def inputs(self, network: PipelineNetwork, x: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Any]:
        """Make the states that the U-Net attends to; of ``tokens``, (N, L) int64, where the text encoder is trained."""
        if "tokens" in conditioning:
            return {"encoder_hidden_states": network.component("text_encoder")(conditioning["tokens"])[0]}
        return {"encoder_hidden_states": conditioning["states"]}
