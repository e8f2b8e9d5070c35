"""Stable Diffusion 3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from diffusion.families.pretrained.components import CLIP_TOKENIZERS, T5_TOKENIZERS
from diffusion.families.pretrained.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from diffusion.families.pretrained.network import PipelineNetwork
    from diffusion.families.text_encoder import Encoding

T5_LENGTH = 256
"""Tokens of a prompt that the third text encoder is shown."""


class StableDiffusion3Pipeline(Pipeline):
    """Stable Diffusion 3 (arXiv 2403.03206): flow matching by a transformer that is shown two CLIPs, and T5 if any."""

    kinds: ClassVar = {
        "transformer": ("SD3Transformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModelWithProjection",),
        "tokenizer": CLIP_TOKENIZERS,
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer_2": CLIP_TOKENIZERS,
        "text_encoder_3": ("T5EncoderModel",),
        "tokenizer_3": T5_TOKENIZERS,
    }
    widths = ("joint_attention_dim", "pooled_projection_dim")
    optional = ("text_encoder_3", "tokenizer_3")
    denoiser_name = "transformer"
    guidance = 7.0
    loads_adapters = True
    architecture = "stable-diffusion-3"
    kohya_version = "sd3"

    def tokenizer_length(self, network: PipelineNetwork, name: str) -> int:
        """Count the tokens of a padded prompt for the tokenizer ``name``."""
        return T5_LENGTH if name == "tokenizer_3" else super().tokenizer_length(network, name)

    @property
    def limiting_tokenizer(self) -> str:
        """Tokenizer that reads most of a prompt."""
        return "tokenizer_3" if "tokenizer_3" in self.components else "tokenizer"

    def encode_prompt(self, network: PipelineNetwork, prompt: str | None) -> Encoding:
        """Encode ``prompt`` as the ``states`` of all text encoders, (L, D), and the ``pooled`` ones of CLIP, (P,)."""
        import torch
        from torch.nn.functional import pad

        clip_states, pooled = [], []
        for number in ("", "_2"):
            ids, _ = network.tokens(f"tokenizer{number}", prompt or "")
            output = network.component(f"text_encoder{number}")(ids, output_hidden_states=True)
            clip_states.append(output.hidden_states[-2])
            pooled.append(output[0])
        joint = torch.cat(clip_states, dim=-1)
        width = self.denoiser.config["joint_attention_dim"]
        if "text_encoder_3" in self.components:
            ids, _ = network.tokens("tokenizer_3", prompt or "")
            t5_states = network.component("text_encoder_3")(ids)[0]
        else:
            t5_states = joint.new_zeros(1, T5_LENGTH, width)
        states = torch.cat([pad(joint, (0, width - joint.shape[-1])), t5_states], dim=1)
        return {"states": states[0].float(), "pooled": torch.cat(pooled, dim=1)[0].float()}

    def encoding_shapes(self, network: PipelineNetwork) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all states, and of the pooled ones."""
        config, length = self.denoiser.config, self.tokenizer_length(network, "tokenizer") + T5_LENGTH
        return {
            "states": (length, int(config["joint_attention_dim"])),
            "pooled": (int(config["pooled_projection_dim"]),),
        }

    def inputs(self, network: PipelineNetwork, x: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Any]:
        """Make the states that the transformer attends to, and the pooled ones that modulate it."""
        return {"encoder_hidden_states": conditioning["states"], "pooled_projections": conditioning["pooled"]}
