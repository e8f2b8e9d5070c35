"""Results of evaluations, and the conditions under which they were obtained."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, ValidationError

from diffusion.common.config import Config, is_unset
from diffusion.common.errors import UserError
from diffusion.common.files import digest_of
from diffusion.common.fingerprint import Fingerprint
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.estimate import Estimate, MetricEstimate
from diffusion.evaluation.metrics.copies import Duplicates, Memorization
from diffusion.evaluation.metrics.held_out_loss import HeldOutLoss
from diffusion.evaluation.metrics.per_group import PerClass, PerShape
from diffusion.evaluation.metrics.pixel_metrics import AppearanceDrift, ImageSimilarity, ResamplingBaseline
from diffusion.evaluation.metrics.scores import Scores
from diffusion.evaluation.metrics.text_image_agreement import TextImageAgreement
from diffusion.families.config import FAMILIES
from diffusion.process.samplers import SamplingConfig


class EvaluationConditions(Config):
    """Conditions that two models must share for their metrics to be comparable."""

    format_version: Literal[4] = 4
    """Incremented when preprocessing, the choice of images or a formula changes."""
    content_digest: str
    """Digest of the data set whose held-out images are the reference."""
    extractor: str
    extractor_digest: str
    """SHA-256 of the feature network's weights."""
    preprocessing: str
    """Description of pre- and postprocessing of the feature network."""
    evaluation: EvaluationConfig
    """Configuration of the evaluation; a comparison that shares no images with it has ``seed`` + 1."""
    first: int = Field(0, ge=0, exclude_if=lambda first: not first)
    """Number of the first image in the seed: in a comparison the first one that chose no checkpoint."""
    text_image_encoder: str | None = Field(None, exclude_if=is_unset)
    """Digest of the files of the text-image encoder; None: none is set."""
    sampling: SamplingConfig
    low_resolution: int | None = Field(None, exclude_if=is_unset)
    """Height and width, in pixels, of the inputs of super-resolution models; None for other models."""
    extensions: dict[str, str] = Field({}, exclude_if=lambda extensions: not extensions)
    """Package and version of each metric that another package adds, by name."""

    @property
    def key(self) -> str:
        """Return the digest of the conditions."""
        # Other checkpoints change no metric, and neither does an unused option. Guidance is in the model file, and the
        # text-image encoder counts by its digest, not by where it lies.
        exclude = {"evaluation": {"ema_stds", "finalists", "first_samples", "guidance", "text_image_encoder"}}
        return digest_of(self.model_dump(mode="json", exclude=exclude, exclude_none=True))


def flatten(figures: Mapping[str, MetricEstimate]) -> dict[str, float]:
    """Flatten ``figures`` and the ends of their intervals, under names that end in _low and _high."""
    values: dict[str, float] = {}
    for name, estimate in figures.items():
        values |= {name: estimate.value, f"{name}_low": estimate.interval.low, f"{name}_high": estimate.interval.high}
    return values


class RealBaseline(Config):
    """Metrics of real training images in the place of generated ones."""

    scores: Scores
    estimates: dict[str, MetricEstimate]
    """Distances and shares by name, such as kid_efflite0; empty if there are too few images for errors."""

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name."""
        return self.scores.metrics() | flatten(self.estimates)


class Reconstruction(ImageSimilarity):
    """Reconstruction of held-out images by an autoencoder."""

    extractor: str
    images: int
    """Number of images."""
    fd: float
    """Fréchet distance between the images and their reconstructions: the perceptible loss of an autoencoder. 0 is best;
    lower than between different images, as these are the same."""

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name."""
        metrics = {f"reconstruction_{name}": value for name, value in super().metrics().items()}
        return metrics | {f"reconstruction_fd_{self.extractor}": self.fd}


@dataclass(frozen=True)
class SelectionMetric:
    """The metric by which checkpoints are selected."""

    name: str
    value: float
    error: float
    count: int
    """Number of images it was measured on."""
    sign: Literal[1, -1]
    """1 if higher is better, −1 if lower."""

    @property
    def rank(self) -> float:
        """Return a value by which models are ranked: higher is better."""
        return self.sign * self.value

    @property
    def estimate(self) -> Estimate:
        """Return the estimate of ``rank``."""
        return Estimate(value=self.rank, error=self.error, freedom=self.count - 1)

    def metrics(self) -> dict[str, float]:
        """Return the metric with its error and number of images, by name."""
        return {self.name: self.value, f"{self.name}_error": self.error, "samples": self.count}


class ModelScores(Config):
    """Scores of any evaluated model."""

    sha256: str
    """SHA-256 of the model file."""
    family: str = Field("ddpm", exclude_if=lambda family: family == "ddpm")
    images: int
    """Number of images seen in training."""
    fingerprint: Fingerprint
    """Fingerprint of the machine that generated its images."""
    scores: Scores
    """Scores of its images against held-out ones."""
    reconstruction: Reconstruction | None = Field(None, exclude_if=is_unset)
    """Reconstruction metrics, if the model is an autoencoder or generates in the latents of one."""
    similarity: ImageSimilarity | None = Field(None, exclude_if=is_unset)
    """Similarity of upscaled to real images."""
    text_image_agreement: TextImageAgreement | str | None = Field(None, exclude_if=is_unset)
    """Agreement of images with their prompts, or why it was not measured; None for models without captions."""

    per_shape: PerShape | None = Field(None, exclude_if=is_unset)
    """Distances by shape; None for images of one shape."""

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name."""
        figures = self.scores.metrics()
        for part in (self.reconstruction, self.similarity, self.per_shape):
            figures |= part.metrics() if part is not None else {}
        agreement = self.text_image_agreement
        return figures | (agreement.metrics() if isinstance(agreement, TextImageAgreement) else {})


class CheckpointEvaluation(ModelScores):
    """Evaluation of a checkpoint, for selection."""

    file: str
    """Path of the checkpoint."""

    @property
    def selection_metric(self) -> SelectionMetric:
        """Return KID of its images, or for an autoencoder the PSNR of its reconstructions."""
        if FAMILIES[self.family].evaluated_by == "reconstructions" and self.reconstruction is not None:
            quality = self.reconstruction
            return SelectionMetric("reconstruction_psnr", quality.psnr, quality.psnr_se, quality.images, 1)
        scores = self.scores
        return SelectionMetric(f"kid_{scores.extractor}", scores.kid, scores.kid_se, scores.samples, -1)


class ModelEvaluation(ModelScores):
    """All metrics of a model.

    The fields are what Darkroom itself reads; figures of other metrics of models stand beside them by the metric's
    name. See ``diffusion.evaluation.model_metrics``.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, dict[str, float]] = Field(init=False)

    sampling: SamplingConfig
    """How it was sampled: as configured, with the model's own guidance; a student as it was distilled."""
    memorization: Memorization
    duplicates: Duplicates
    drift: AppearanceDrift
    per_class: PerClass | None = Field(None, exclude_if=is_unset)
    """None for models without classes."""
    held_out_loss: HeldOutLoss
    gflop: float
    """Floating-point operations to generate one image, in 10⁹."""
    estimates: dict[str, MetricEstimate] = Field({})
    """Distances and shares by name, such as kid_efflite0, with intervals; empty where there are too few images."""

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name."""
        figures = super().metrics()
        for part in (self.memorization, self.duplicates, self.drift, self.held_out_loss, self.per_class):
            figures |= part.metrics() if part is not None else {}
        for extension_figures in self.__pydantic_extra__.values():
            figures |= extension_figures
        return figures | {"gflop_per_image": self.gflop} | flatten(self.estimates)


GuidanceVerdict = Literal["chosen", "better", "may lose too much recall", "not significantly better", "not a finalist"]
"""``better``: than none, but not than the chosen one by a standard error."""


class GuidanceScore(Config):
    """Scores of the best checkpoint's images with some guidance, or none, against training images."""

    sampling: SamplingConfig
    images: int
    """Number of generated images, of the last look, or of the first if this is not a finalist."""
    kid: float
    gain: Estimate | None = Field(None, exclude_if=is_unset)
    """How much lower ``kid`` is than without guidance, on as many images of the same noise; None without guidance."""
    p_value: float | None = Field(None, ge=0, le=1, exclude_if=is_unset)
    """One-sided p-value of ``gain`` by Holm's correction over all finalists; None if this is not one."""
    recall_loss: Estimate | None = Field(None, exclude_if=is_unset)
    """How much lower recall is than without guidance, on the first images if ``gain`` is not significant; None where it
    decides nothing, or images are too few."""
    verdict: GuidanceVerdict | None
    """None if this is without guidance and was not chosen."""


class GuidanceChoice(Config):
    """Choice of the guidance that a registered model samples with."""

    scores: list[GuidanceScore]
    """No guidance, and each one that was tried, the cheapest and least first."""
    confidence: float
    max_recall_loss: float | None
    """``gate.confidence`` and ``gate.recall_loss``, by which it was made."""

    @property
    def chosen(self) -> GuidanceScore:
        """Return the score of the chosen one."""
        return next(score for score in self.scores if score.verdict == "chosen")


class Evaluation(Config):
    """Scores of a run's checkpoints under equal conditions."""

    dataset: str
    conditions: EvaluationConditions
    eval_key: str
    """``conditions.key``: models are comparable only where it is equal."""
    real_baseline: RealBaseline
    features: str
    """Description of the feature network for display."""
    best: CheckpointEvaluation
    """The best of ``checkpoints`` by the selection metric: lowest KID, or highest PSNR for autoencoders."""
    checkpoints: list[CheckpointEvaluation]
    """Checkpoints evaluated in full, by images seen."""
    preliminary: list[CheckpointEvaluation] = Field([], exclude_if=lambda preliminary: not preliminary)
    """Checkpoints eliminated earlier, by images seen, with the scores of their last round, on fewer images: only their
    selection metrics are comparable. None of them is the best."""
    estimates: dict[str, MetricEstimate]
    """Estimates of the best checkpoint's metrics."""
    baselines: dict[str, ResamplingBaseline] | None = Field(None, exclude_if=is_unset)
    """Scores of resampling by name, for super-resolution models."""
    guidance: GuidanceChoice | None = Field(None, exclude_if=is_unset)
    """Choice of guidance for the best checkpoint; None if there was none."""

    @property
    def choosing_samples(self) -> int | None:
        """Return how many images of each checkpoint, the first ones, chose the best one; None if there was no choice.

        A single checkpoint may be the best of an evaluation that is not known.
        """
        if len(self.checkpoints) > 1:
            return self.conditions.evaluation.samples
        return max((checkpoint.scores.samples for checkpoint in self.preliminary), default=None)

    @property
    def sampling(self) -> SamplingConfig:
        """Return how the registered model samples: as configured, with the guidance that was chosen, if any was."""
        return self.conditions.sampling if self.guidance is None else self.guidance.chosen.sampling

    @classmethod
    def read(cls, path: Path) -> "Evaluation":
        """Read the evaluation in the file ``path``; raises UserError if another version of Darkroom wrote it."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise UserError(
                f"{path} was written by another version of Darkroom: run `darkroom evaluate` again"
            ) from error

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the best checkpoint, the real baseline and resampling, by name."""
        baseline = {f"real_baseline_{name}": value for name, value in self.real_baseline.metrics().items()}
        for name, base in (self.baselines or {}).items():
            distances = {
                f"{figure}_{base.scores.extractor}": base.scores.get_metric(figure) for figure in ("fd", "kid")
            }
            baseline |= {f"{name}_{figure}": value for figure, value in (distances | base.similarity.metrics()).items()}
        return {"images": self.best.images, **flatten(self.estimates), **self.best.metrics(), **baseline}
