"""FLUX.1, dev and schnell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from diffusion.families.pretrained.components import CLIP_TOKENIZERS, T5_TOKENIZERS, text_config
from diffusion.families.pretrained.flow_transformer import JOINT_ATTENTION, FlowTransformer, pack, unpack

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion.families.pretrained.network import PipelineNetwork
    from diffusion.families.text_encoder import Encoding


class FluxPipeline(FlowTransformer):
    """FLUX.1 (github.com/black-forest-labs/flux): a transformer that is shown T5's states and the pooled one of CLIP.

    Dev is shown the scale of guidance as well; schnell is a student of few steps, which is not guided.
    """

    kinds: ClassVar = {
        "transformer": ("FluxTransformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": CLIP_TOKENIZERS,
        "text_encoder_2": ("T5EncoderModel",),
        "tokenizer_2": T5_TOKENIZERS,
    }
    widths = ("joint_attention_dim", "pooled_projection_dim")
    adapter_targets = JOINT_ATTENTION
    kohya_version = "flux1"

    @property
    def architecture(self) -> str:
        """Dev or schnell."""
        return "flux-1-dev" if self.embeds_guidance else "flux-1-schnell"

    @property
    def guidance(self) -> float | None:
        """Scale of guidance of diffusers' pipeline; schnell has none."""
        return 3.5 if self.embeds_guidance else None

    def check_channels(self) -> None:
        """Raise ValueError unless denoiser, autoencoder and text encoders fit."""
        super().check_channels()
        states, pooled = self.text_width("text_encoder_2", "d_model"), self.text_width()
        self.check_text_width(joint_attention_dim=states, pooled_projection_dim=pooled)

    def tokenizer_length(self, network: PipelineNetwork, name: str) -> int:
        """Count the tokens of a padded prompt for the tokenizer ``name``: all that CLIP reads, or those of T5."""
        if name == "tokenizer":
            return int(text_config(self.components["text_encoder"]).max_position_embeddings)
        return self.text_length

    @property
    def limiting_tokenizer(self) -> str:
        """T5's, which reads most of a prompt."""
        return "tokenizer_2"

    def encode_prompt(self, network: PipelineNetwork, prompt: str | None) -> Encoding:
        """Encode ``prompt`` as T5's ``states``, (512, D), and the ``pooled`` one of CLIP, (P,)."""
        pooled = network.component("text_encoder")(network.tokens("tokenizer", prompt or "")[0]).pooler_output
        states = network.component("text_encoder_2")(network.tokens("tokenizer_2", prompt or "")[0])[0]
        return {"states": states[0].float(), "pooled": pooled[0].float()}

    def encoding_shapes(self, network: PipelineNetwork) -> dict[str, tuple[int, ...]]:
        """Return the shapes of T5's states, and of the pooled one."""
        config = self.denoiser.config
        return {
            "states": (self.text_length, int(config["joint_attention_dim"])),
            "pooled": (int(config["pooled_projection_dim"]),),
        }

    def predict(
        self, network: PipelineNetwork, x: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """Predict the velocity of latents ``x``, (N, C, h, w), at ``timestep``, (N,), of 1,000."""
        import torch

        height, width = x.shape[2:]
        rows, columns = (torch.arange(side // 2, device=x.device, dtype=x.dtype) for side in (height, width))
        states = conditioning["states"]
        tokens = network.component("transformer")(
            hidden_states=pack(x),
            timestep=timestep / 1000,
            guidance=self.shown_guidance(x, conditioning),
            pooled_projections=conditioning["pooled"],
            encoder_hidden_states=states,
            txt_ids=x.new_zeros(states.shape[1], 3),
            img_ids=torch.cartesian_prod(x.new_zeros(1), rows, columns),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)
