"""PixArt-Σ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from diffusion.families.pretrained.components import T5_TOKENIZERS
from diffusion.families.pretrained.pipeline import Pipeline

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion.families.pretrained.network import PipelineNetwork
    from diffusion.families.text_encoder import Encoding

TEXT_LENGTH = 300
"""Tokens that a prompt is padded to."""


class PixArtSigmaPipeline(Pipeline):
    """PixArt-Σ (arXiv 2403.04692): a DiT that is shown T5's states, and whose learned variance pipelines do not use."""

    kinds: ClassVar = {
        "transformer": ("PixArtTransformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("T5EncoderModel",),
        "tokenizer": T5_TOKENIZERS,
    }
    widths = ("caption_channels",)
    renamed: ClassVar = {"Transformer2DModel": "PixArtTransformer2DModel"}
    denoiser_name = "transformer"
    # Of PixArt-α of 1,024 pixels, which is shown the size of its images.
    unsupported = (*Pipeline.unsupported, "use_additional_conditions")
    guidance = 4.5

    @property
    def network_classes(self) -> int | None:
        """None, as it is conditioned on captions alone."""
        return None

    def check_channels(self) -> None:
        """Raise ValueError unless denoiser, autoencoder and text encoder fit."""
        super().check_channels()
        self.check_text_width(caption_channels=self.text_width(field_name="d_model"))

    def _allows_outputs(self) -> bool:
        config = self.denoiser.config
        return bool(config["out_channels"] == 2 * config["in_channels"])

    def tokenizer_length(self, network: PipelineNetwork, name: str) -> int:
        """Count the tokens of a padded prompt."""
        return TEXT_LENGTH

    def prompt_text(self, prompt: str) -> str:
        """Write ``prompt`` in lower case, as the captions of its training were."""
        return prompt.lower().strip()

    def encode_prompt(self, network: PipelineNetwork, prompt: str | None) -> Encoding:
        """Encode ``prompt`` as T5's ``states``, (300, D), and the ``mask`` of tokens, (300,)."""
        ids, mask = network.tokens("tokenizer", prompt or "")
        return {"states": network.component("text_encoder")(ids, attention_mask=mask)[0][0].float(), "mask": mask[0]}

    def encoding_shapes(self, network: PipelineNetwork) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all states and of their mask."""
        return {"states": (TEXT_LENGTH, int(self.denoiser.config["caption_channels"])), "mask": (TEXT_LENGTH,)}

    def inputs(self, network: PipelineNetwork, x: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Any]:
        """Make the states that the transformer attends to."""
        return {
            "encoder_hidden_states": conditioning["states"],
            "encoder_attention_mask": conditioning.get("mask"),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
