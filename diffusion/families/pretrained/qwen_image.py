"""Qwen-Image."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from typing import TYPE_CHECKING, ClassVar

from diffusion.families.pretrained.components import QWEN_TOKENIZERS
from diffusion.families.pretrained.flow_transformer import JOINT_ATTENTION, FlowTransformer, pack, tokens_first, unpack

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion.families.pretrained.network import PipelineNetwork
    from diffusion.families.text_encoder import Encoding

_AUTOENCODING = Lock()
"""Held while an autoencoder works, as it keeps frames in the module, which other threads use as well."""
DEFAULT_LAYERS = 60
"""Blocks of a transformer whose configuration does not say how many."""
TASK = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
TASK_TOKENS = 34
"""Tokens before those of the prompt, whose states the transformer is not shown."""


class QwenImagePipeline(FlowTransformer):
    """Qwen-Image (arXiv 2508.02324): a transformer that is shown states of Qwen2.5-VL, over a video's latents."""

    kinds: ClassVar = {
        "transformer": ("QwenImageTransformer2DModel",),
        "vae": ("AutoencoderKLQwenImage",),
        "text_encoder": ("Qwen2_5_VLForConditionalGeneration",),
        "tokenizer": QWEN_TOKENIZERS,
    }
    widths = ("joint_attention_dim",)
    # Those of Qwen-Image-Edit and -Layered, which are shown other images.
    unsupported = (*FlowTransformer.unsupported, "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
    latents_field = "z_dim"
    guidance = 4.0
    adapter_targets = JOINT_ATTENTION
    architecture = "qwen-image"
    kohya_version = "qwen_image"

    def check_channels(self) -> None:
        """Raise ValueError unless denoiser and autoencoder fit, and each channel of latents has its moments."""
        super().check_channels()
        self.check_text_width(joint_attention_dim=self.text_width())
        assert self.autoencoder is not None
        config = self.autoencoder.config
        for name in ("temperal_downsample", "latents_mean", "latents_std"):
            if not isinstance(value := config.get(name), list | tuple):
                raise ValueError(f"{name} of its autoencoder is not a list")
            if name != "temperal_downsample" and len(value) != config["z_dim"]:
                raise ValueError(f"{name} of its autoencoder has {len(value)} numbers for {config['z_dim']} channels")

    @property
    def idle_layers(self) -> tuple[str, ...]:
        """Layers behind the last attention's keys and values of words, whose states end there."""
        last = f"transformer.transformer_blocks.{self.denoiser.config.get('num_layers', DEFAULT_LAYERS) - 1}"
        attention = ("add_q_proj", "norm_added_q", "to_add_out")
        return (*(f"{last}.attn.{name}" for name in attention), f"{last}.txt_mlp")

    @property
    def factor(self) -> int:
        """Pixels per position of latents along each side."""
        assert self.autoencoder is not None
        return int(2 ** len(self.autoencoder.config["temperal_downsample"]))

    def prompt_text(self, prompt: str) -> str:
        """Write ``prompt`` as a message to Qwen2.5-VL, which has the task to describe an image."""
        return f"<|im_start|>system\n{TASK}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"

    def tokenizer_length(self, network: PipelineNetwork, name: str) -> int:
        """Count the tokens of a padded prompt, with those of the task."""
        return self.text_length + TASK_TOKENS

    def encode_prompt(self, network: PipelineNetwork, prompt: str | None) -> Encoding:
        """Encode ``prompt`` as the last ``states``, zeros for padding, (512, D), and the ``mask`` of tokens, (512,)."""
        ids, mask = network.tokens("tokenizer", prompt or "")
        output = network.component("text_encoder").model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
        )
        # As many tokens of the task come first, wherever padding is.
        is_task = mask[0].cumsum(0) <= TASK_TOKENS
        return tokens_first(output.hidden_states[-1][0], mask[0].masked_fill(is_task, 0), self.text_length)

    def encoding_shapes(self, network: PipelineNetwork) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all states and of their mask."""
        width = int(self.denoiser.config["joint_attention_dim"])
        return {"states": (self.text_length, width), "mask": (self.text_length,)}

    def predict(
        self, network: PipelineNetwork, x: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """Predict the velocity of latents ``x``, (N, C, h, w), at ``timestep``, (N,), of 1,000."""
        height, width = x.shape[2:]
        tokens = network.component("transformer")(
            hidden_states=pack(x),
            timestep=timestep / 1000,
            guidance=self.shown_guidance(x, conditioning),
            encoder_hidden_states=conditioning["states"],
            encoder_hidden_states_mask=conditioning.get("mask"),
            img_shapes=[[(1, height // 2, width // 2)]] * len(x),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Guide, and give each token of the result the length of the conditional one."""
        guided = pack(super().guide(conditional, unconditional, scale))
        lengths = pack(conditional).norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        return unpack(guided * lengths, *conditional.shape[2:])

    def encode(self, network: PipelineNetwork, images: Tensor) -> Tensor:
        """Encode images (N, C, H, W) in [−1, 1] as means of normalised latents, (N, *noise_shape)."""
        with _AUTOENCODING:
            z: Tensor = network.component("vae").encode(images.unsqueeze(2)).latent_dist.mode().squeeze(2)
        mean, deviation = self._moments(z)
        return (z - mean) / deviation

    def decode(self, network: PipelineNetwork, z: Tensor) -> Tensor:
        """Decode normalised latents (N, *noise_shape) to images (N, C, H, W), nominally in [−1, 1]."""
        mean, deviation = self._moments(z)
        with _AUTOENCODING:
            images: Tensor = network.component("vae").decode((z * deviation + mean).unsqueeze(2)).sample
        return images.squeeze(2).float()

    def _moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each channel of latents, (C, 1, 1) each."""
        assert self.autoencoder is not None
        mean, deviation = (z.new_tensor(self.autoencoder.config[name]) for name in ("latents_mean", "latents_std"))
        return mean[:, None, None], deviation[:, None, None]
