"""FLUX.2, klein and dev."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from diffusion.families.pretrained.components import QWEN_TOKENIZERS
from diffusion.families.pretrained.flow_transformer import (
    JOINT_ATTENTION,
    LATENT_SIDE,
    PATCH,
    FlowTransformer,
    pack,
    unpack,
)

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion.families.pretrained.network import PipelineNetwork
    from diffusion.families.text_encoder import Encoding

SYSTEM_MESSAGE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)
"""What Mistral reads before a prompt of dev."""


class Flux2KleinPipeline(FlowTransformer):
    """FLUX.2 klein (https://bfl.ai): a transformer that is shown states of Qwen3, over normalised patches of latents.

    The distilled model of four steps is not guided, the base is.
    """

    kinds: ClassVar = {
        "transformer": ("Flux2Transformer2DModel",),
        "vae": ("AutoencoderKLFlux2",),
        "text_encoder": ("Qwen3ForCausalLM",),
        "tokenizer": QWEN_TOKENIZERS,
    }
    widths = ("joint_attention_dim",)
    default_settings: ClassVar = {"is_distilled": False}
    # Blocks of both streams, then those of one, whose layers are fused.
    adapter_targets = (*JOINT_ATTENTION, "to_qkv_mlp_proj", "attn.to_out")
    architecture = "flux-2-klein"
    text_layers: ClassVar[tuple[int, ...]] = (9, 18, 27)
    """Layers of the text encoder whose states the transformer is shown, side by side."""
    kohya_version = "flux2"

    @property
    def guidance(self) -> float | None:
        """Scale of guidance of diffusers' pipeline; the distilled model has none."""
        return None if self.setting("is_distilled") else 4.0

    def check_channels(self) -> None:
        """Raise ValueError unless denoiser, autoencoder and text encoder fit."""
        super().check_channels()
        self.check_text_width(joint_attention_dim=len(self.text_layers) * self.text_width())
        if self.text_width(field_name="num_hidden_layers") < (last := self.text_layers[-1]):
            raise ValueError(f"its text encoder has fewer than {last} layers")

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the noise of square images, whose positions are patches."""
        return int(self.denoiser.config["in_channels"]), LATENT_SIDE // PATCH, LATENT_SIDE // PATCH

    @property
    def factor(self) -> int:
        """Pixels per patch along each side."""
        return super().factor * PATCH

    @property
    def fold(self) -> int:
        """Pixels of which height and width of images are multiples."""
        return self.factor

    def prompt_text(self, prompt: str) -> str:
        """Write ``prompt`` as a message to Qwen3, which is to answer without thinking."""
        return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

    def encode_prompt(self, network: PipelineNetwork, prompt: str | None) -> Encoding:
        """Encode ``prompt`` as ``states`` of several layers, those of padding included: (512, 3 D)."""
        import torch

        ids, mask = network.tokens("tokenizer", prompt or "")
        output = network.component("text_encoder").model(
            ids, attention_mask=mask, output_hidden_states=True, use_cache=False
        )
        return {"states": torch.cat([output.hidden_states[layer][0] for layer in self.text_layers], dim=-1).float()}

    def encoding_shapes(self, network: PipelineNetwork) -> dict[str, tuple[int, ...]]:
        """Return the shape of all states."""
        return {"states": (self.text_length, int(self.denoiser.config["joint_attention_dim"]))}

    def count_tokens(self, shape: tuple[int, int, int]) -> int:
        """Count the tokens of the transformer for noise of ``shape``, (C, H, W): its positions."""
        _, height, width = shape
        return height * width

    def time_shift(self, steps: int, shape: tuple[int, int, int]) -> float:
        """Compute μ from the numbers of tokens and of steps, as its authors fitted it (``compute_empirical_mu``)."""
        tokens = self.count_tokens(shape)
        at_200_steps = 0.00016927 * tokens + 0.45666666
        if tokens > 4300:
            return at_200_steps
        at_10_steps = 8.73809524e-05 * tokens + 1.89833333
        return at_200_steps + (at_200_steps - at_10_steps) / 190 * (steps - 200)

    def encode(self, network: PipelineNetwork, images: Tensor) -> Tensor:
        """Encode images (N, C, H, W) in [−1, 1] as normalised patches of latents, (N, *noise_shape)."""
        z = network.component("vae").encode(images).latent_dist.mode()
        n, _, height, width = z.shape
        patches = pack(z).transpose(1, 2).reshape(n, -1, height // PATCH, width // PATCH)
        mean, deviation = self._moments(network)
        normalised: Tensor = (patches - mean) / deviation
        return normalised

    def decode(self, network: PipelineNetwork, z: Tensor) -> Tensor:
        """Decode normalised patches (N, *noise_shape) to images (N, C, H, W), nominally in [−1, 1]."""
        mean, deviation = self._moments(network)
        patches = (z * deviation + mean).flatten(2).transpose(1, 2)
        images: Tensor = network.component("vae").decode(unpack(patches, z.shape[2] * PATCH, z.shape[3] * PATCH)).sample
        return images.float()

    def _moments(self, network: PipelineNetwork) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each channel of patches, (1, 4 C, 1, 1) each."""
        norm = network.component("vae").bn
        mean, variance = (moment.view(1, -1, 1, 1) for moment in (norm.running_mean, norm.running_var))
        return mean, (variance + norm.eps).sqrt()

    def predict(
        self, network: PipelineNetwork, x: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """Predict the velocity of normalised patches ``x``, (N, C, h, w), at ``timestep``, (N,), of 1,000."""
        import torch

        states = conditioning["states"]
        zero, rows, columns, words = (torch.arange(n, device=x.device) for n in (1, *x.shape[2:], states.shape[1]))
        tokens: Tensor = network.component("transformer")(
            hidden_states=x.flatten(2).transpose(1, 2),
            timestep=timestep / 1000,
            guidance=self.shown_guidance(x, conditioning),
            encoder_hidden_states=states,
            txt_ids=torch.cartesian_prod(zero, zero, zero, words).expand(len(x), -1, -1),
            img_ids=torch.cartesian_prod(zero, rows, columns, zero).expand(len(x), -1, -1),
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).view_as(x)


class Flux2Pipeline(Flux2KleinPipeline):
    """FLUX.2 dev (https://bfl.ai): klein's larger relative, shown states of Mistral and the scale of guidance."""

    kinds: ClassVar = {
        "transformer": ("Flux2Transformer2DModel",),
        "vae": ("AutoencoderKLFlux2",),
        "text_encoder": ("Mistral3ForConditionalGeneration",),
        "tokenizer": ("PixtralProcessor",),
    }
    default_settings: ClassVar = {}
    guidance = 4.0
    architecture = "flux-2-dev"
    text_layers = (10, 20, 30)
    adds_special_tokens = False

    @property
    def embeds_guidance(self) -> bool:
        """Whether the denoiser is shown the scale of guidance."""
        return bool(self.denoiser.config.get("guidance_embeds", True))

    def check_channels(self) -> None:
        """Raise ValueError unless denoiser, autoencoder and text encoder fit, and guidance is shown."""
        super().check_channels()
        if not self.embeds_guidance:
            raise ValueError("guidance_embeds of its network is false, and dev is shown the scale of guidance")

    def prompt_text(self, prompt: str) -> str:
        """Write ``prompt`` as a message to Mistral, as the template of its files does, which is not run."""
        text = prompt.replace("[IMG]", "")
        return f"<s>[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT][INST]{text}[/INST]"
