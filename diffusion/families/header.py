"""What a model's file says of it besides its weights."""

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, field_validator
from torch import Tensor

from diffusion.common.config import MAX_SIZE, Config, PlainName, is_unset
from diffusion.common.errors import UserError
from diffusion.common.shapes import Size
from diffusion.families.adapters import AdapterConfig
from diffusion.families.config import DiffusersConfig, FamilyConfig
from diffusion.families.text_encoder import CaptionMoments, TextEncoder
from diffusion.families.vae.config import LatentSpace
from diffusion.process.samplers import COMPUTING, ConsistencySampling, SamplingConfig, with_sampler

GUIDANCE_OPTIONS = {"guidance", "guidance_interval", "autoguidance"}
"""Sampling options that evaluation chooses for a model, and that its header keeps."""


class Base(Config):
    """Model whose frozen weights a fine-tuned model needs besides its own file."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """SHA-256 of its file, which lies beside the fine-tuned model's, or one folder above, as SHA256.safetensors."""
    version: str | None = Field(None, exclude_if=is_unset)
    """Registered version, models:/NAME/NUMBER; None: it was a file."""


def _path_inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is not a path of a file inside a folder")
    return name


class Origin(Config):
    """Where an imported pipeline comes from."""

    source: str
    """hf://OWNER/NAME, or the name of a folder."""
    revision: str | None = None
    """The commit of the source; null: it has none."""
    licence: str | None = None
    """Identifier of its licence, such as openrail."""
    files: dict[Annotated[str, AfterValidator(_path_inside)], str] = Field(default_factory=dict)
    """SHA-256 of each of its files by path."""
    libraries: dict[str, str] = Field(default_factory=dict)
    """Versions of the libraries that it was imported with."""


class ModelHeader(Config):
    """Metadata stored with the weights."""

    format_version: Literal[5] = 5
    model: FamilyConfig
    """Configuration of the network, with the digest of the autoencoder's weights in place of its path."""
    channels: Literal[1, 3]
    size: int = Field(ge=1, le=MAX_SIZE)
    """Height and width of the images, in pixels; of images of several shapes, of the square of equal area."""
    shapes: dict[Size, int] | None = Field(None, min_length=1, max_length=256, exclude_if=is_unset)
    """Shapes of the images, each with its number of training images; None: all are square."""
    dataset: PlainName
    """Name of the data set."""
    content_digest: str
    """Digest of the data set."""
    sigma_data: float = Field(1.0, gt=0, le=1e6)
    """Standard deviation of the network's data: images in [−1, 1], residuals of super-resolution, or latents."""
    data_mean: tuple[float, ...] | None = Field(None, exclude_if=is_unset)
    """Mean of each channel of the images, in [−1, 1], around which the reverse process starts, and prediction = edm
    works; None: 0."""
    class_histogram: dict[str, int]
    """Number of images of each class of the data set, sorted by class."""
    encoder: TextEncoder | None = None
    """Text encoder of the captions; None: the network has no captions."""
    caption_moments: CaptionMoments | None = Field(None, exclude_if=is_unset)
    """Moments of the training captions, by which the network's are standardised; None: they are left as they are."""
    latents: LatentSpace | None = Field(None, exclude_if=is_unset)
    """Latent space of the network; None: it works on pixels."""
    base: Base | None = Field(None, exclude_if=is_unset)
    """The fine-tuned model, whose weights this file lacks; None: it has all weights."""
    adapter: AdapterConfig | None = Field(None, exclude_if=is_unset)
    """Adapter of ``base``; None: none."""
    images: int = Field(ge=0, lt=2**63)
    """Images seen in training."""
    training: dict[str, Any]
    """The resolved training configuration."""
    guidance: float | None = Field(None, ge=0, le=1000, exclude_if=is_unset)
    """Scale of guidance that evaluation chose, for sampling.guidance = null. None: none."""
    guidance_interval: tuple[float, float] | None = Field(None, exclude_if=is_unset)
    """Noise levels σ at which it guides. None: all."""
    autoguidance: float | None = Field(None, ge=0, le=1000, exclude_if=is_unset)
    """Scale of autoguidance that evaluation chose, for sampling.autoguidance = null. None: none."""
    guide_images: int | None = Field(None, ge=0, lt=2**63, exclude_if=is_unset)
    """Images that the weights of the guide have seen, away from which autoguidance leads. None: there is no guide."""
    origin: Origin | None = Field(None, exclude_if=is_unset)
    """Origin of an imported pipeline; None: the model was trained here."""

    @field_validator("model", mode="before")
    @classmethod
    def _name_the_form_of_captions(cls, model: Any) -> Any:
        # Files from before the choice have sentence vectors alone.
        has_text = isinstance(model, dict) and model.get("family", "ddpm") == "ddpm" and model.get("text")
        return {"text_tokens": 0} | model if has_text else model

    def takes_other_sizes(self, shape: tuple[int, int, int]) -> bool:
        """Whether it is a pipeline, or was trained from one, that can generate images of ``shape``, (C, H, W)."""
        is_pipeline = isinstance(self.model, DiffusersConfig)
        return is_pipeline and self.model.one_shape is None and self.channels == shape[0]

    @property
    def square(self) -> tuple[int, int, int]:
        """(C, H, W) of the images, or of the square of equal area."""
        return self.channels, self.size, self.size

    @property
    def pixels(self) -> str:
        """Width × height of the training images for display, the most frequent first."""
        return " or ".join(f"{width}×{height}" for height, width in self.trained_shapes)

    @property
    def trained_shapes(self) -> dict[tuple[int, int], int]:
        """Shapes (H, W) of the training images with their numbers, the most frequent first; of squares 1."""
        shapes = self.shapes or {(self.size, self.size): 1}
        return dict(sorted(shapes.items(), key=lambda item: (-item[1], item[0])))

    @property
    def mean(self) -> Tensor | None:
        """``data_mean`` as (1, C, 1, 1)."""
        return None if self.data_mean is None else torch.tensor(self.data_mean).view(1, -1, 1, 1)

    @property
    def student_steps(self) -> int | None:
        """Network evaluations for which a student was distilled; None for other models."""
        return (self.training.get("student") or {}).get("steps")

    def sampling(self, config: SamplingConfig, conditional: bool = True) -> SamplingConfig:
        """Complete ``config`` with the guidance chosen for this model; a student has its own sampler and steps.

        Images that are not ``conditional`` on a class or prompt are not guided towards one. An imported pipeline whose
        prediction is unknown has its own scheduler.

        Raises UserError if the sampler is one for students, and this is none.
        """
        if student := self.training.get("student"):
            if not isinstance(config, ConsistencySampling):
                options = config.model_dump(include={"sigma_max", "low_resolution_noise", *COMPUTING})
                config = ConsistencySampling().with_changes({**options, "steps": student["steps"]})
            lands = student.get("landing") is not None
            return config.with_changes({"eta": 0}) if lands and config.eta is None else config
        if isinstance(config, ConsistencySampling):
            raise UserError("sampling.sampler = consistency is for students (darkroom distill): use another one")
        if self.model.needs_own_scheduler:
            config = with_sampler(config, "scheduler")
        is_set = config.guidance is not None or config.autoguidance is not None
        if is_set or not (conditional or self.autoguidance is not None):
            return config
        return config.with_changes({name: getattr(self, name) for name in GUIDANCE_OPTIONS})
