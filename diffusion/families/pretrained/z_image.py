"""Z-Image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from diffusion.common.config import MAX_SIDE
from diffusion.families.pretrained.components import QWEN_TOKENIZERS
from diffusion.families.pretrained.flow_transformer import FlowTransformer, tokens_first

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion.families.pretrained.network import PipelineNetwork
    from diffusion.families.text_encoder import Encoding


MAX_POSITIONS = 2**14
"""Most positions along an axis, of each of which a table has an entry."""


class ZImagePipeline(FlowTransformer):
    """Z-Image (arXiv 2511.22699): one stream of tokens, of an image and of the states of its prompt by Qwen3.

    diffusers adds its ``guidance_scale`` times the difference to the guided prediction; as everywhere in Darkroom the
    scale is one more, and 1 does not guide.
    """

    kinds: ClassVar = {
        "transformer": ("ZImageTransformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
        "tokenizer": QWEN_TOKENIZERS,
    }
    widths = ("cap_feat_dim",)
    packs = False
    guidance = 6.0
    architecture = "z-image"
    kohya_version = "zimage"

    def head_size(self) -> tuple[Any, Any]:
        """Return the numbers of an attention head, and their axes of rotary embedding, as configured."""
        dim, heads = (self.denoiser.config.get(name) for name in ("dim", "n_heads"))
        head = dim // heads if isinstance(dim, int) and isinstance(heads, int) and heads > 0 else None
        return head, self.denoiser.config.get("axes_dims")

    def check_channels(self) -> None:
        """Raise ValueError unless denoiser, autoencoder and text encoder fit, and prompts have positions."""
        super().check_channels()
        self.check_text_width(cap_feat_dim=self.text_width())
        lengths = self.denoiser.config.get("axes_lens")
        if not isinstance(lengths, list | tuple) or not all(isinstance(n, int) and n <= MAX_POSITIONS for n in lengths):
            raise ValueError(f"axes_lens of its network are not three numbers up to {MAX_POSITIONS}")
        if len(lengths) != 3 or lengths[0] < 2 * self.text_length or min(lengths) < 1:
            raise ValueError(f"axes_lens of its network, {lengths}, are too few for a prompt of {self.text_length}")

    @property
    def max_side(self) -> int:
        """Pixels that images have at most along each side, as far as the denoiser has positions."""
        positions: int = min(self.denoiser.config["axes_lens"][1:])
        return min(MAX_SIDE, positions * self.fold)

    def prompt_text(self, prompt: str) -> str:
        """Write ``prompt`` as a message to Qwen3."""
        return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"

    def encode_prompt(self, network: PipelineNetwork, prompt: str | None) -> Encoding:
        """Encode ``prompt`` as ``states`` of the last layer but one, (512, D), and the ``mask`` of tokens, (512,)."""
        ids, mask = network.tokens("tokenizer", prompt or "")
        encoder = network.component("text_encoder")
        output = getattr(encoder, "model", encoder)(
            ids, attention_mask=mask.bool(), output_hidden_states=True, use_cache=False
        )
        return tokens_first(output.hidden_states[-2][0], mask[0], self.text_length)

    def encoding_shapes(self, network: PipelineNetwork) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all states and of their mask."""
        return {"states": (self.text_length, int(self.denoiser.config["cap_feat_dim"])), "mask": (self.text_length,)}

    def predict(
        self, network: PipelineNetwork, x: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """Predict the velocity of latents ``x``, (N, C, h, w), at ``timestep``, (N,), of 1,000.

        The transformer's time goes from noise to images, and with it its velocity.
        """
        import torch

        states = list(conditioning["states"].unbind())
        if (mask := conditioning.get("mask")) is not None:
            # Their list has no padding, so that how many there are is waited for.
            states = [each[:length] for each, length in zip(states, mask.sum(1).tolist(), strict=True)]
        images = list(x.unsqueeze(2).unbind())
        velocities = network.component("transformer")(images, (1000 - timestep) / 1000, states, return_dict=False)[0]
        return -torch.stack(velocities).squeeze(2)
