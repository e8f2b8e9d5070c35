"""What an evaluation found, and under which conditions."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, FiniteFloat, ValidationError

from diffusion.common.config import Config, unset
from diffusion.common.errors import UserError
from diffusion.common.files import digest_of
from diffusion.common.fingerprint import Fingerprint
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.estimate import Estimate, Interval
from diffusion.evaluation.metrics.copies import Duplicates, Memorization
from diffusion.evaluation.metrics.distances import Scores
from diffusion.evaluation.metrics.held_out_loss import HeldOutLoss
from diffusion.evaluation.metrics.per_class import PerClass
from diffusion.evaluation.metrics.pixel_metrics import AppearanceDrift, ImageSimilarity, ResamplingBaseline
from diffusion.models.config import FAMILIES
from diffusion.process.samplers import SamplingConfig

CONFIDENCE = 0.95
"""Two-sided, of all intervals that are shown."""


class EvaluationConditions(Config):
    """All that two models must have in common for their metrics to be compared."""

    format_version: Literal[3] = 3
    """Grows when preprocessing, the choice of images or a formula changes."""
    content_digest: str
    """Digest of the data set whose held-out images are the reference."""
    extractor: str
    """Name of the features."""
    extractor_digest: str
    """SHA-256 of the feature network's weights."""
    preprocessing: str
    """What is done to images before the network sees them, and to features after."""
    evaluation: EvaluationConfig
    """A comparison of candidate and champion has the seed by which checkpoints are chosen, plus 1."""
    sampling: SamplingConfig
    low_resolution: int | None = Field(None, exclude_if=unset)
    """Height and width of the held-out images that models were shown, to enlarge them; None: they were shown none."""

    @property
    def key(self) -> str:
        """Digest of the conditions; a model's metrics depend on it, on the weights, and within floating-point
        error on the fingerprint."""
        # What is evaluated besides changes no metric, and neither does an option that is not used.
        exclude = {"evaluation": {"ema_stds", "finalists", "first_samples"}}
        return digest_of(self.model_dump(mode="json", exclude=exclude, exclude_none=True))


class MetricEstimate(Config):
    """A metric with its error and interval."""

    value: FiniteFloat
    error: FiniteFloat
    """Its standard error, over other generated and held-out images."""
    interval: Interval

    @classmethod
    def of(cls, estimate: Estimate) -> "MetricEstimate":
        """What ``estimate`` says, with confidence CONFIDENCE."""
        return cls(value=estimate.value, error=estimate.error, interval=estimate.interval(CONFIDENCE))


def flatten(figures: Mapping[str, MetricEstimate]) -> dict[str, float]:
    """``figures`` with the ends of their intervals, under names that end in _low and _high."""
    found: dict[str, float] = {}
    for name, each in figures.items():
        found |= {name: each.value, f"{name}_low": each.interval.low, f"{name}_high": each.interval.high}
    return found


class RealBaseline(Config):
    """What real training images get in the place of generated ones."""

    scores: Scores
    estimates: dict[str, MetricEstimate]
    """Distances and shares by name, such as kid_efflite0; empty if there are too few images for errors."""

    def metrics(self) -> dict[str, float]:
        """All metrics under names that say what they are."""
        return self.scores.metrics() | flatten(self.estimates)


class Reconstruction(Config):
    """How close held-out images come back from an autoencoder."""

    extractor: str
    """Name of the features."""
    images: int
    """How many."""
    psnr: float
    """Peak signal-to-noise ratio in dB, the mean over the images; higher is better."""
    psnr_se: float
    """Its standard error, over other images."""
    ssim: float
    """Structural similarity, the mean over the images; higher is better."""
    fd: float
    """Fréchet distance between the images and their reconstructions: of what an autoencoder loses of what is seen.
    0 is best; lower than between other images, as these are the same."""

    def metrics(self) -> dict[str, float]:
        """The figures under names that say what they are."""
        return {
            "reconstruction_psnr": self.psnr,
            "reconstruction_psnr_se": self.psnr_se,
            "reconstruction_ssim": self.ssim,
            f"reconstruction_fd_{self.extractor}": self.fd,
        }


@dataclass(frozen=True)
class SelectionMetric:
    """The metric by which checkpoints are selected."""

    name: str
    value: float
    error: float
    """Its standard error."""
    count: int
    """Images it rests on."""
    sign: Literal[1, -1]
    """1 if higher is better, −1 if lower."""

    @property
    def rank(self) -> float:
        """Higher is better, whatever the figure."""
        return self.sign * self.value

    def metrics(self) -> dict[str, float]:
        """The figure with its error, and the images it rests on."""
        return {self.name: self.value, f"{self.name}_error": self.error, "samples": self.count}


class ModelScores(Config):
    """What is measured of every model that is evaluated."""

    sha256: str
    """Of its file."""
    family: str = Field("ddpm", exclude_if=lambda family: family == "ddpm")
    """What kind of model it is."""
    images: int
    """Images it had seen in training."""
    fingerprint: Fingerprint
    """Of the machine that generated its images."""
    scores: Scores
    """How far its images lie from held-out ones."""
    reconstruction: Reconstruction | None = Field(None, exclude_if=unset)
    """Where the model is an autoencoder, or generates in the latents of one."""
    similarity: ImageSimilarity | None = Field(None, exclude_if=unset)
    """Of enlarged images to the real ones."""

    def metrics(self) -> dict[str, float]:
        """The metrics under names that say what they are."""
        figures = self.scores.metrics()
        for part in (self.reconstruction, self.similarity):
            figures |= part.metrics() if part is not None else {}
        return figures


class CheckpointEvaluation(ModelScores):
    """The metrics by which one of many checkpoints is chosen."""

    file: str
    """Where it lies."""

    @property
    def selection_metric(self) -> SelectionMetric:
        """KID of its images; of an autoencoder, which is there to be built upon, how close images come back."""
        if FAMILIES[self.family].evaluated_by == "reconstructions" and self.reconstruction is not None:
            found = self.reconstruction
            return SelectionMetric("reconstruction_psnr", found.psnr, found.psnr_se, found.images, 1)
        scores = self.scores
        return SelectionMetric(f"kid_{scores.extractor}", scores.kid, scores.kid_se, scores.samples, -1)


class ModelEvaluation(ModelScores):
    """All metrics of a model."""

    memorization: Memorization
    """Whether its images are copies of training images."""
    duplicates: Duplicates
    """Whether they are copies of one another."""
    drift: AppearanceDrift
    """Their colours and brightness."""
    per_class: PerClass | None = Field(None, exclude_if=unset)
    """The same class by class; None: it has no classes."""
    held_out_loss: HeldOutLoss
    """Its loss on held-out images."""
    gflop: float
    """Floating-point operations to generate one image, in 10⁹."""
    estimates: dict[str, MetricEstimate] = Field({})
    """Distances and shares by name, such as kid_efflite0, with intervals; empty where there are too few images."""

    def metrics(self) -> dict[str, float]:
        """The metrics under names that say what they are."""
        figures = super().metrics()
        for part in (self.memorization, self.duplicates, self.drift, self.held_out_loss, self.per_class):
            figures |= part.metrics() if part is not None else {}
        return figures | {"gflop_per_image": self.gflop} | flatten(self.estimates)


class Evaluation(Config):
    """Scores of a run's checkpoints under equal conditions."""

    dataset: str
    """Name of the data set."""
    conditions: EvaluationConditions
    eval_key: str
    """``conditions.key``: compare models only where it is equal."""
    real_baseline: RealBaseline
    features: str
    """What the feature network is, for people."""
    best: CheckpointEvaluation
    """The best of ``checkpoints`` by its merit: the one with the lowest KID, or of autoencoders the highest PSNR."""
    checkpoints: list[CheckpointEvaluation]
    """Those evaluated in full, by images seen."""
    preliminary: list[CheckpointEvaluation] = Field([], exclude_if=lambda preliminary: not preliminary)
    """Those that fell behind before, by images seen, with the scores of the last round that they were in, which rest on
    fewer images: of these only merits compare. None of them is the best."""
    estimates: dict[str, MetricEstimate]
    """Of the best checkpoint."""
    baselines: dict[str, ResamplingBaseline] | None = Field(None, exclude_if=unset)
    """For models that enlarge, by name: the same small images enlarged without one."""

    @classmethod
    def read(cls, path: Path) -> "Evaluation":
        """The one in the file ``path``; raises UserError if another version of Darkroom wrote it."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise UserError(
                f"{path} was written by another version of Darkroom: run `darkroom evaluate` again"
            ) from error

    def metrics(self) -> dict[str, float]:
        """The best checkpoint's metrics and those of the real baseline and of resampling, by name."""
        baseline = {f"real_baseline_{name}": value for name, value in self.real_baseline.metrics().items()}
        baselines = {
            f"{name}_{figure}": value
            for name, each in (self.baselines or {}).items()
            for figure, value in {
                f"fd_{each.scores.extractor}": each.scores.fd,
                f"kid_{each.scores.extractor}": each.scores.kid,
                **each.similarity.metrics(),
            }.items()
        }
        return {"images": self.best.images, **flatten(self.estimates), **self.best.metrics(), **baseline, **baselines}
