"""Configuration of the evaluation of checkpoints."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from diffusion.common.config import MAX_EMA_STD, Config, is_unset
from diffusion.common.errors import UserError
from diffusion.common.escaping import pluralize

if TYPE_CHECKING:
    from diffusion.data.manifest import Manifest

MIN_PER_SPLIT = 10
"""Smallest number of images of either split for which metrics are meaningful."""
SMALL_SET = (
    "ingest more, or all of them as another --dataset with a larger ingest.held_out; a model of so few can be trained "
    "or fine-tuned by `darkroom train`, and registered without a verdict by `darkroom model import`"
)
"""What to do with a data set that is too small for an evaluation."""


def choose_held_out(images: int) -> float | None:
    """Choose ``ingest.held_out`` so that of so many images enough for an evaluation are held out, surely to 99 %.

    None if too few would be left to train on.
    """
    for percent in (10, 15, 20, 25, 30, 35):
        mean = images * percent / 100
        # The lower 1 % of a binomial distribution, by its normal approximation.
        if mean - 2.33 * math.sqrt(mean * (1 - percent / 100)) >= MIN_PER_SPLIT:
            return percent / 100
    return None


def require_enough(manifest: "Manifest") -> None:
    """Raise UserError if a split of a version of a data set is too small for an evaluation."""
    if (words := shortage(manifest)) is not None:
        raise UserError(f"{words}: {SMALL_SET}")


def shortage(manifest: "Manifest") -> str | None:
    """Describe which split of a version of a data set is too small for an evaluation; None if neither is."""
    for split, count in manifest.counts.items():
        if count < MIN_PER_SPLIT:
            images = pluralize(count, f"{split.replace('_', '-').replace('train', 'training')} image")
            return f"data set {manifest.name} has {images}, and evaluation needs {MIN_PER_SPLIT}"
    return None


class EvaluationConfig(Config):
    """Number of images, reference, feature network and seed of an evaluation."""

    samples: int = Field(500, ge=10)
    """Images generated from each checkpoint that is evaluated in full, and real training images in the real
    baseline."""
    finalists: int = Field(1, ge=1)
    """Number of checkpoints evaluated in full. If there are more, they are selected on about half of the images."""
    first_samples: int | None = Field(None, ge=10, exclude_if=is_unset)
    """Images generated from each of many checkpoints (training.keep, ema_stds) in the first round. The better quarter,
    and one more than finalists at least, advances with four times as many, up to half of samples, by KID, or PSNR for
    autoencoders, which are unbiased for any number of images. Null: a quarter of samples, in whole compute batches."""
    ema_stds: tuple[Annotated[float, Field(gt=0, lt=MAX_EMA_STD)], ...] = ()
    """Post-hoc EMA: relative standard deviations of further averages of the weights to evaluate; see
    training.ema_stds."""
    guidance: tuple[Annotated[float, Field(gt=1, le=1000)], ...] | None = (1.5, 2, 3)
    """Scales of guidance that are tried with the best checkpoint where sampling.guidance and sampling.autoguidance are
    null. With classes or captions: each at the noise levels σ from 0.2 to 5, or higher ones for images of more than
    3×32×32 values, and the middle one at all levels. Of models with a guide (training.guide): each as autoguidance. The
    registered model samples with none unless one of them significantly lowers KID, with gate.confidence and within
    gate.recall_loss. [] or null: none is tried."""
    reference: int = Field(10_000, ge=10)
    """Held-out images used as the reference: at most this many, the first by key."""
    extractor: Literal["efflite0", "inception", "labels", "file"] = "efflite0"
    """Feature network: EfficientNet-Lite0 trained on ImageNet; Inception-v3, the network of "FID" in the literature; a
    small classifier trained on the data set's own labels; or the network in the ONNX file at extractor_weights."""
    extractor_size: int | None = Field(None, ge=8, le=1024, exclude_if=is_unset)
    """Height and width, in pixels, to which images are resized for it; a multiple of 32 for efflite0. Scores at two
    sizes are not comparable. Null: 64 for efflite0, the images' own size up to 32 for labels, the network's own for
    file."""
    extractor_weights: Path | None = Field(None, exclude_if=is_unset)
    """Path of the network for file, or of the weights for inception; null: the weights where torch-fidelity keeps them,
    or else downloaded from its release."""
    text_image_encoder: Path | None = Field(None, exclude_if=is_unset)
    """Folder with an encoder of images and texts, such as CLIP, by which the agreement of images with their prompts is
    measured for models of captions: model.safetensors, config.json, tokenizer.json and processor_config.json, as
    transformers' CLIPModel and CLIPProcessor save them, or vision_model.onnx and text_model.onnx with the last two.
    Null: not measured."""
    seed: int = Field(0, ge=0)
    """Seed of the generated images and of the choice of training images."""

    @model_validator(mode="after")
    def _means_something(self) -> "EvaluationConfig":
        if self.first_samples is not None and self.first_samples >= self.samples // 2:
            raise ValueError(
                f"first_samples = {self.first_samples} is not less than half of samples = {self.samples}, on which the "
                "last round compares: make it less, or leave it out"
            )
        if self.extractor == "inception" and self.extractor_size is not None:
            raise ValueError("extractor = inception sees every image at 299 pixels: leave extractor_size out")
        if self.extractor == "efflite0" and self.extractor_size is not None and self.extractor_size % 32:
            raise ValueError(
                f"extractor = efflite0 halves images five times, and extractor_size = {self.extractor_size} is "
                "not a multiple of 32: use 32, 64, 96, …"
            )
        if self.extractor == "file" and self.extractor_weights is None:
            raise ValueError("extractor = file needs a network: set extractor_weights to the path of an .onnx file")
        if self.extractor in ("efflite0", "labels") and self.extractor_weights is not None:
            raise ValueError(
                f"extractor = {self.extractor} has weights of its own and would pass extractor_weights over: leave "
                "that out, or use inception or file"
            )
        return self
