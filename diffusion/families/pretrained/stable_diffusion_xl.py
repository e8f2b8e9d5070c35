"""Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from diffusion.families.pretrained.components import CLIP_ATTENTION, CLIP_TOKENIZERS
from diffusion.families.pretrained.pipeline import Pipeline

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion.families.pretrained.network import PipelineNetwork
    from diffusion.families.text_encoder import Encoding

TIME_IDS = 6
"""Numbers that say how an image was made: its height and width, the corner of its crop, and the requested size."""


class StableDiffusionXLPipeline(Pipeline):
    """Stable Diffusion XL (arXiv 2307.01952): a U-Net that is shown two CLIPs, and the size of its images.

    These numbers say that images are as large as they are, and not cropped.
    """

    kinds: ClassVar = {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": CLIP_TOKENIZERS,
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer_2": CLIP_TOKENIZERS,
    }
    widths = (
        "cross_attention_dim",
        "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
    )
    default_settings: ClassVar = {"force_zeros_for_empty_prompt": True}
    unsupported = tuple(name for name in Pipeline.unsupported if name != "addition_embed_type")
    guidance = 5.0
    text_adapter_targets = CLIP_ATTENTION
    loads_adapters = True
    architecture = "stable-diffusion-xl-v1-base"
    kohya_version = "sdxl_base_v1-0"

    @property
    def idle_layers(self) -> tuple[str, ...]:
        """The last layer of the first CLIP, whose states are those before it."""
        return (
            f"text_encoder.encoder.layers.{self.components['text_encoder'].config.get('num_hidden_layers', 12) - 1}",
        )

    def check_channels(self) -> None:
        """Raise ValueError unless the U-Net is shown pooled states and sizes."""
        super().check_channels()
        if self.denoiser.config.get("addition_embed_type") != "text_time":
            raise ValueError("addition_embed_type of its network is not text_time, which that of SDXL is")
        self.check_text_width(
            cross_attention_dim=self.text_width() + self.text_width("text_encoder_2"),
            projection_class_embeddings_input_dim=self.text_width("text_encoder_2", "projection_dim")
            + TIME_IDS * int(self.denoiser.config["addition_time_embed_dim"]),
        )

    def _latent_scale(self, network: PipelineNetwork) -> tuple[float | Tensor, float | Tensor]:
        """Return scale and shift of latents, of each channel where the autoencoder has its moments."""
        scale, shift = super()._latent_scale(network)
        autoencoder = network.component(self.autoencoder_name)
        mean, deviation = autoencoder.config.get("latents_mean"), autoencoder.config.get("latents_std")
        if mean is None or deviation is None:
            return scale, shift
        like = next(autoencoder.parameters())
        return scale / like.new_tensor(deviation)[:, None, None], like.new_tensor(mean)[:, None, None]

    def encode_prompt(self, network: PipelineNetwork, prompt: str | None) -> Encoding:
        """Encode ``prompt`` as the ``states`` of both CLIPs, (L, D), and the ``pooled`` one of the second, (P,).

        None is zeros, as the model was trained, unless the pipeline says that it is an empty prompt.
        """
        import torch

        if prompt is None and self.setting("force_zeros_for_empty_prompt"):
            return {name: torch.zeros(shape) for name, shape in self.encoding_shapes(network).items()}
        tokens = {name: ids[None] for name, ids in super().tokenize(network, prompt).items()}
        return {name: value[0].float() for name, value in self._encode_tokens(network, tokens).items()}

    def tokenize(self, network: PipelineNetwork, prompt: str | None) -> Encoding:
        """Tokenize ``prompt`` for both CLIPs; None is −1 in each place, if it is to become zeros."""
        tokens = super().tokenize(network, prompt)
        if prompt is None and self.setting("force_zeros_for_empty_prompt"):
            tokens = {name: -ids.new_ones(ids.shape) for name, ids in tokens.items()}
        return tokens

    def _encode_tokens(self, network: PipelineNetwork, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode ``tokens`` and ``tokens_2``, (N, L) each, as ``states``, (N, L, D), and ``pooled``, (N, P)."""
        import torch

        first, second = (
            network.component(f"text_encoder{number}")(
                tokens[f"tokens{number}"].clamp(min=0), output_hidden_states=True
            )
            for number in ("", "_2")
        )
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        has_prompt = tokens["tokens"][:, :1] >= 0
        return {"states": states * has_prompt[..., None], "pooled": second[0] * has_prompt}

    def encoding_shapes(self, network: PipelineNetwork) -> dict[str, tuple[int, ...]]:
        """Return the shapes of both CLIPs' states, and of the pooled one."""
        length, config = self.tokenizer_length(network, "tokenizer"), self.denoiser.config
        pooled = config["projection_class_embeddings_input_dim"] - TIME_IDS * config["addition_time_embed_dim"]
        return {"states": (length, int(config["cross_attention_dim"])), "pooled": (int(pooled),)}

    def inputs(self, network: PipelineNetwork, x: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Any]:
        """Make the states that the U-Net attends to, the pooled one, and the sizes of the images.

        They are of ``tokens`` and ``tokens_2``, (N, L) int64, where the text encoders are trained.
        """
        if "tokens" in conditioning:
            conditioning = self._encode_tokens(network, conditioning)
        height, width = (side * self.factor for side in x.shape[2:])
        sizes = x.new_tensor([height, width, 0, 0, height, width]).expand(len(x), TIME_IDS)
        return {
            "encoder_hidden_states": conditioning["states"],
            "added_cond_kwargs": {"text_embeds": conditioning["pooled"], "time_ids": sizes},
        }
