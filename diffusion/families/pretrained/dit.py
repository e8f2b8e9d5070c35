"""Diffusion transformers of classes."""

from typing import ClassVar

from diffusion.families.pretrained.pipeline import Pipeline


class DiTPipeline(Pipeline):
    """DiT (arXiv 2212.09748), whose learned variance pipelines make no use of."""

    kinds: ClassVar = {"transformer": ("DiTTransformer2DModel",), "vae": ("AutoencoderKL",)}
    renamed: ClassVar = {"Transformer2DModel": "DiTTransformer2DModel"}
    denoiser_name = "transformer"
    classes_field = "num_embeds_ada_norm"
    has_null_class = True
    one_shape = "a DiT arranges its patches in a square"
    guidance = 4.0

    def _allows_outputs(self) -> bool:
        config = self.denoiser.config
        return bool(config["out_channels"] == 2 * config["in_channels"])
