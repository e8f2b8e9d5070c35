"""Sana."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from diffusion.families.pretrained.components import GEMMA_TOKENIZERS
from diffusion.families.pretrained.pipeline import Pipeline

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion.families.pretrained.network import PipelineNetwork
    from diffusion.families.text_encoder import Encoding

TEXT_LENGTH = 300
"""Tokens that a prompt is padded to."""
INSTRUCTION = "\n".join(
    (
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable "
        "for image generation. Evaluate the level of detail in the user prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
        "relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly without "
        "overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, "
        "sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing "
        "street lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by "
        "towering glass skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including any additional "
        "commentary or evaluations:",
        "User Prompt: ",
    )
)
"""What comes before a prompt, for which Gemma reads it (section 3.1 of the paper), and not before a negative one."""


class SanaPipeline(Pipeline):
    """Sana (arXiv 2410.10629): a linear DiT that is shown states of Gemma, over latents of 32×32 pixels each."""

    kinds: ClassVar = {
        "transformer": ("SanaTransformer2DModel",),
        "vae": ("AutoencoderDC",),
        "text_encoder": ("Gemma2Model",),
        "tokenizer": GEMMA_TOKENIZERS,
    }
    widths = ("caption_channels",)
    denoiser_name = "transformer"
    # Of students that are shown the scale of guidance.
    unsupported = (*Pipeline.unsupported, "guidance_embeds")
    guidance = 4.5
    loads_adapters = True
    architecture = "sana"
    padding_side = "right"

    @property
    def network_classes(self) -> int | None:
        """None, as it is conditioned on captions alone."""
        return None

    @property
    def factor(self) -> int:
        """Pixels per position of latents along each side."""
        assert self.autoencoder is not None
        return int(2 ** (len(self.autoencoder.config["encoder_block_out_channels"]) - 1))

    def check_channels(self) -> None:
        """Raise ValueError unless denoiser, autoencoder, text encoder and scheduler fit."""
        super().check_channels()
        self.check_text_width(caption_channels=self.text_width())
        assert self.autoencoder is not None
        if not isinstance(self.autoencoder.config.get("encoder_block_out_channels"), list | tuple):
            raise ValueError("encoder_block_out_channels of its autoencoder are not a list")
        if self.prediction != "flow_prediction":
            raise ValueError(f"its {self.scheduler.kind} is not one of flow matching (prediction_type)")

    def _allows_outputs(self) -> bool:
        config = self.denoiser.config
        return bool(config["out_channels"] == 2 * config["in_channels"])

    def tokenizer_length(self, network: PipelineNetwork, name: str) -> int:
        """Count the tokens of a padded prompt, with those of the instruction; the ends are counted twice."""
        return len(network.tokenizer(name).encode(INSTRUCTION)) + TEXT_LENGTH - 2

    def prompt_text(self, prompt: str) -> str:
        """Write ``prompt`` in lower case, after the instruction."""
        return INSTRUCTION + prompt.lower().strip()

    def encode_prompt(self, network: PipelineNetwork, prompt: str | None) -> Encoding:
        """Encode ``prompt`` as Gemma's ``states``, (300, D), and the ``mask`` of tokens, (300,).

        They are those of the first token and of the last ones, which are of the prompt and of padding. None is an empty
        negative prompt.
        """
        if prompt is None:
            return self.encode_negative(network, None)
        return self._encode_tokens(network, *network.tokens("tokenizer", prompt))

    def encode_negative(self, network: PipelineNetwork, prompt: str | None) -> Encoding:
        """Encode ``prompt`` as ``encode_prompt`` does, without the instruction."""
        text = (prompt or "").lower().strip()
        return self._encode_tokens(network, *network.tokens("tokenizer", text, TEXT_LENGTH))

    def _encode_tokens(self, network: PipelineNetwork, ids: Tensor, mask: Tensor) -> Encoding:
        """Encode tokens and their mask, (1, L) each, as ``states`` and ``mask`` of 300 of them."""
        states = network.component("text_encoder")(ids, attention_mask=mask)[0][0].float()
        kept = [0, *range(1 - TEXT_LENGTH, 0)]
        return {"states": states[kept], "mask": mask[0, kept]}

    def encoding_shapes(self, network: PipelineNetwork) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all states and of their mask."""
        return {"states": (TEXT_LENGTH, int(self.denoiser.config["caption_channels"])), "mask": (TEXT_LENGTH,)}

    def inputs(self, network: PipelineNetwork, x: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Any]:
        """Make the states that the transformer attends to."""
        return {"encoder_hidden_states": conditioning["states"], "encoder_attention_mask": conditioning.get("mask")}

    def predict(
        self, network: PipelineNetwork, x: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """Predict the velocity of latents ``x``, (N, C, h, w), at ``timestep``, (N,), of 1,000."""
        scale = self.denoiser.config.get("timestep_scale", 1.0)
        return super().predict(network, x, timestep * scale, conditioning)

    def encode(self, network: PipelineNetwork, images: Tensor) -> Tensor:
        """Encode images (N, C, H, W) in [−1, 1] as scaled latents, (N, *noise_shape)."""
        scale, _ = self._latent_scale(network)
        z: Tensor = network.component("vae").encode(images).latent
        return z * scale
