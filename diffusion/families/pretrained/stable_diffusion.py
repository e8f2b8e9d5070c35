"""Stable Diffusion 1 and 2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from diffusion.families.pretrained.pipeline import CLIP_TOKENIZERS, Pipeline

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion.families.pretrained.network import PipelineNetwork

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
    guidance = 7.5
    scheduler_settings: ClassVar = {"steps_offset": 1, "clip_sample": False}
    text_adapter_targets = ("q_proj", "k_proj", "v_proj", "out_proj")
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

    def encode_prompt(self, network: PipelineNetwork, prompt: str) -> Tensor:
        """Encode ``prompt`` as the last hidden states, (E,)."""
        ids, mask = network.tokens("tokenizer", prompt)
        encoder = network.component("text_encoder")
        uses_mask = getattr(encoder.config, "use_attention_mask", False)
        hidden: Tensor = encoder(ids, attention_mask=mask if uses_mask else None)[0]
        return hidden.flatten().float()

    def embedding_size(self, network: PipelineNetwork) -> int:
        """Count the numbers of all hidden states."""
        return self.tokenizer_length(network, "tokenizer") * int(self.denoiser.config["cross_attention_dim"])

    def inputs(self, network: PipelineNetwork, label: Tensor | None, text: Tensor | None) -> dict[str, Any]:
        """Make the states that the U-Net attends to; of tokens, (N, L) int64, where the text encoder is trained."""
        assert text is not None
        if not text.is_floating_point():
            text = network.component("text_encoder")(text)[0].flatten(1)
        assert text is not None
        return {"encoder_hidden_states": text.unflatten(1, (-1, self.denoiser.config["cross_attention_dim"]))}
