"""The section ``model`` of the family diffusers, and the table of its pipelines; loads without torch."""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from diffusion.common.config import classes_in
from diffusion.families.base import Ability, BaseFamilyConfig, Likelihood

# isort: off
from diffusion.families.pretrained.components import MAX_INTEGER, Component
from diffusion.families.pretrained.pipeline import Pipeline
from diffusion.families.pretrained.ddpm import DDPMPipeline as DDPMPipeline
from diffusion.families.pretrained.ddpm import DDIMPipeline as DDIMPipeline
from diffusion.families.pretrained.ldm import LDMPipeline as LDMPipeline
from diffusion.families.pretrained.dit import DiTPipeline as DiTPipeline
from diffusion.families.pretrained.stable_diffusion import StableDiffusionPipeline as StableDiffusionPipeline
from diffusion.families.pretrained.stable_diffusion_xl import StableDiffusionXLPipeline as StableDiffusionXLPipeline
from diffusion.families.pretrained.stable_diffusion_3 import StableDiffusion3Pipeline as StableDiffusion3Pipeline
from diffusion.families.pretrained.pixart import PixArtSigmaPipeline as PixArtSigmaPipeline
from diffusion.families.pretrained.flux import FluxPipeline as FluxPipeline
from diffusion.families.pretrained.flux_2 import Flux2KleinPipeline as Flux2KleinPipeline
from diffusion.families.pretrained.flux_2 import Flux2Pipeline as Flux2Pipeline
from diffusion.families.pretrained.z_image import ZImagePipeline as ZImagePipeline
from diffusion.families.pretrained.qwen_image import QwenImagePipeline as QwenImagePipeline
from diffusion.families.pretrained.sana import SanaPipeline as SanaPipeline
# isort: on

PIPELINES = {kind.__name__: kind for kind in classes_in(globals(), Pipeline)}
"""The pipelines of diffusers that can be imported, by their names."""


class DiffusersConfig(BaseFamilyConfig):
    """The family diffusers: an imported pipeline of diffusers, and what is trained from one (training.init_from)."""

    abilities: ClassVar[frozenset[Ability]] = frozenset(
        {
            "noise_levels",
            "gradient_checkpointing",
            "adapters",
            "text_encoder_adapters",
            "quantized_bases",
            "comparable_losses",
            "initial_weights",
            "dropped_conditions",
            "scheduler",
        }
    )
    likelihood: ClassVar[Likelihood | None] = "bound"
    needs_initial_model: ClassVar[bool] = True
    low_resolution: ClassVar[None] = None
    autoencoder: ClassVar[None] = None

    family: Literal["diffusers"] = "diffusers"
    """The family of models."""
    pipeline: str | None = None
    """Class of the pipeline. Null: that of training.init_from."""
    components: dict[str, Component] = Field(default_factory=dict)
    """Its components by name. Empty: those of training.init_from."""
    class_ids: tuple[int, ...] = Field((), max_length=MAX_INTEGER)
    """The network's number of each class, in the sorted order of the classes' names. Empty: no classes."""
    settings: dict[str, bool] = Field(default_factory=dict)
    """What the pipeline's model_index.json says besides components, where it differs from diffusers' defaults."""

    @model_validator(mode="after")
    def _is_on_the_allow_list(self) -> "DiffusersConfig":
        if self.pipeline is None:
            if self.components or self.class_ids or self.settings:
                raise ValueError("components belong to a pipeline, which model.pipeline names: leave all of it out")
            return self
        if self.pipeline not in PIPELINES:
            raise ValueError(f"a {self.pipeline} is not supported: one of {', '.join(PIPELINES)} is")
        self.imported.check_components()
        if (count := self.imported.network_classes) is not None and not all(0 <= n < count for n in self.class_ids):
            raise ValueError(f"its network has {count} classes, and a number beyond them is named")
        return self

    @property
    def imported(self) -> Pipeline:
        """The pipeline; only if it is named."""
        assert self.pipeline is not None, "it is that of training.init_from"
        return PIPELINES[self.pipeline](self.components, self.settings)

    @property
    def one_shape(self) -> str | None:
        """Why its network takes images of one square shape alone; None: it takes any height and width."""
        return None if self.pipeline is None else self.imported.one_shape

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of square images, which its files say."""
        pipeline = self.imported
        channels, size, _ = pipeline.noise_shape
        if pipeline.autoencoder is not None:
            channels = pipeline.autoencoder.config.get("out_channels", 3)
        return channels, size * pipeline.factor, size * pipeline.factor

    @property
    def has_null_class(self) -> bool:
        """Whether the network was trained without a class, too, as guidance needs."""
        return self.text or not self.conditional or self.imported.has_null_class

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network is shown the scale of guidance, instead of being evaluated twice."""
        return self.pipeline is not None and self.imported.embeds_guidance

    @property
    def needs_own_scheduler(self) -> bool:
        """Whether only the pipeline's own scheduler knows what the network predicts."""
        return self.pipeline is not None and self.imported.prediction is None

    @property
    def conditional(self) -> bool:
        """Whether the network is conditioned on classes."""
        return len(self.class_ids) > 1

    @property
    def text(self) -> bool:
        """Whether the network is conditioned on captions."""
        return "text_encoder" in self.components

    def identity(self) -> dict[str, Any]:
        """List nothing: a pipeline is what the digest of training.init_from stands for."""
        return DiffusersConfig().model_dump(mode="json", exclude={"settings"})
