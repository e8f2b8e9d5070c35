"""What an evaluation found, and under which conditions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from diffusion.config import Config, unset
from diffusion.config_sampling import SamplingConfig
from diffusion.errors import UserError
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.enlargement import Enlarged, Likeness
from diffusion.evaluation.estimate import Estimate, Share
from diffusion.evaluation.metrics import Scores
from diffusion.families.config import FAMILIES
from diffusion.files import digest_of
from diffusion.fingerprint import Fingerprint

CONFIDENCE = 0.95
"""Share of evaluations whose intervals hold the true figure."""


class Conditions(Config):
    """All that two models must have in common for their scores to be compared."""

    format_version: Literal[2] = 2
    """Grows when preprocessing, the choice of pictures or a formula changes."""
    content_digest: str
    """Digest of the data set whose held-out pictures are the reference."""
    extractor_digest: str
    """SHA-256 of the feature network's weights."""
    preprocessing: str | None = Field(None, exclude_if=unset)
    """What is done to pictures before the network sees them, and to features after. None: not said in those days."""
    evaluation: EvaluationConfig
    sampling: SamplingConfig
    low_resolution: int | None = Field(None, exclude_if=unset)
    """Height and width of the held-out pictures that models were shown, to enlarge them; None: they were shown none."""

    @property
    def key(self) -> str:
        """Digest of the conditions; a model's scores depend on it, on the weights, and within floating-point
        error on the fingerprint."""
        # What is judged besides changes no score, and neither does an option that is not used.
        exclude = {"evaluation": {"ema_lengths", "finalists", "first_samples"}}
        return digest_of(self.model_dump(mode="json", exclude=exclude, exclude_none=True))

    def on(self, samples: int) -> "Conditions":
        """The same with so many pictures of each model."""
        return self.model_copy(update={"evaluation": self.evaluation.model_copy(update={"samples": samples})})


class Reconstruction(Config):
    """How close held-out pictures come back from an autoencoder."""

    extractor: str
    """Name of the features."""
    pictures: int
    """How many."""
    psnr: float
    """Peak signal-to-noise ratio in dB, the mean over the pictures; higher is better."""
    psnr_se: float
    """Its standard error, over other pictures."""
    ssim: float
    """Structural similarity, the mean over the pictures; higher is better."""
    fd: float
    """Fréchet distance between the pictures and their reconstructions: of what an autoencoder loses of what is seen.
    0 is best; lower than between other pictures, as these are the same."""

    def named(self) -> dict[str, float]:
        """The figures under names that say what they are."""
        return {
            "reconstruction_psnr": self.psnr,
            "reconstruction_psnr_se": self.psnr_se,
            "reconstruction_ssim": self.ssim,
            f"reconstruction_fd_{self.extractor}": self.fd,
        }


@dataclass(frozen=True)
class Merit:
    """The figure by which models are told better from worse."""

    name: str
    value: float
    error: float
    """Its standard error."""
    count: int
    """Pictures it rests on."""
    sign: Literal[1, -1]
    """1 if higher is better, −1 if lower."""

    @property
    def rank(self) -> float:
        """Higher is better, whatever the figure."""
        return self.sign * self.value

    def named(self) -> dict[str, float]:
        """The figure with its error, and the pictures it rests on."""
        return {self.name: self.value, f"{self.name}_error": self.error, "samples": self.count}


class Judged(Config):
    """A model file with its scores."""

    file: str
    """Where it lies."""
    sha256: str
    """Of the file."""
    images: int
    """Pictures it had seen in training."""
    scores: Scores
    reconstruction: Reconstruction | None = Field(None, exclude_if=unset)
    """Where the model is an autoencoder, or draws in the latents of one."""
    family: str = Field("ddpm", exclude_if=lambda family: family == "ddpm")
    """What kind of model it is."""
    fingerprint: Fingerprint
    """Of the machine that drew its pictures."""
    likeness: Likeness | None = Field(None, exclude_if=unset)
    """Of enlarged pictures to the real ones."""

    def named(self) -> dict[str, float]:
        """The figures under names that say what they are."""
        further = self.reconstruction.named() if self.reconstruction else {}
        return self.scores.named() | further | (self.likeness.model_dump() if self.likeness else {})

    @property
    def merit(self) -> Merit:
        """KID of what it draws; of an autoencoder, which is there to be built upon, how close pictures come back."""
        if FAMILIES[self.family].judged == "reconstructed" and self.reconstruction is not None:
            found = self.reconstruction
            return Merit("reconstruction_psnr", found.psnr, found.psnr_se, found.pictures, 1)
        scores = self.scores
        return Merit(f"kid_{scores.extractor}", scores.kid, scores.kid_se, scores.samples, -1)


class Estimates(Config):
    """Figures with their errors, over other pictures of the same model and other held-out ones: see ``bootstrap``.

    By name (fd, kid, precision, recall, density, coverage); for what as many pictures get on average.
    """

    best: dict[str, Share | Estimate]
    """Of the best checkpoint."""
    floor: dict[str, Share | Estimate]
    """Of the real pictures behind the floor."""


class Evaluation(Config):
    """Scores of a run's checkpoints under equal conditions."""

    dataset: str
    """Name of the data set."""
    conditions: Conditions
    eval_key: str
    """``conditions.key``: compare models only where it is equal."""
    floor: Scores
    """Real training pictures, judged as if a model had drawn them."""
    features: str | None = Field(None, exclude_if=unset)
    """What the feature network is, for people. None: not said in those days."""
    best: Judged
    """The best of ``checkpoints`` by its merit: the one with the lowest KID, or of autoencoders the highest PSNR."""
    checkpoints: list[Judged]
    """Those judged in full, by images seen."""
    preliminary: list[Judged] = Field([], exclude_if=lambda preliminary: not preliminary)
    """Those that fell behind before, by images seen, with the scores of the last round that they were in, which rest on
    fewer pictures: of these only merits compare. None of them is the best."""
    estimates: Estimates | None = Field(None, exclude_if=unset)
    """None: either side has too few pictures, or the models enlarge pictures that are among those they are compared
    with, and the two sides are not independent."""
    baselines: dict[str, Enlarged] | None = Field(None, exclude_if=unset)
    """For models that enlarge, by name: the same small pictures enlarged without one."""

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
        """The best checkpoint's figures beside the floor's, flat and under names that say what they are."""
        floor = {f"floor_{name}": value for name, value in self.floor.named().items()}
        baselines = {
            f"{name}_{figure}": value
            for name, each in (self.baselines or {}).items()
            for figure, value in {
                f"fd_{each.scores.extractor}": each.scores.fd,
                f"kid_{each.scores.extractor}": each.scores.kid,
                **each.likeness.model_dump(),
            }.items()
        }
        return {"images": self.best.images, **self.best.named(), **self._intervals(), **floor, **baselines}

    def _intervals(self) -> dict[str, float]:
        """The ends of the best checkpoint's intervals, such as ``kid_low_efflite0``."""
        found = {}
        for figure, estimate in (self.estimates.best if self.estimates else {}).items():
            interval = estimate.interval(CONFIDENCE)
            found[f"{figure}_low_{self.best.scores.extractor}"] = interval.low
            found[f"{figure}_high_{self.best.scores.extractor}"] = interval.high
        return found
