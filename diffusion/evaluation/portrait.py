"""A portrait: all that is known of the pictures that one model draws under given conditions.

Drawing, features, neighbours and losses are each kept in a file of their own when they are done, so that what is killed
goes on, and what did not change is not done again: under a digest of the weights and of all else that they depend on.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from diffusion.config import Config, unset
from diffusion.config_sampling import ANYTHING, Asked, SamplingConfig
from diffusion.data.captions import like
from diffusion.device import resolve_device
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.cost import gflop
from diffusion.evaluation.drawing import drawn
from diffusion.evaluation.drift import Drift, appearance, drift
from diffusion.evaluation.duplicates import Duplicates, duplicates
from diffusion.evaluation.enlargement import psnr
from diffusion.evaluation.estimate import Estimate, paired_difference
from diffusion.evaluation.features import BATCH
from diffusion.evaluation.held_out_loss import HeldOutLoss, held_out_loss, measure, told_of_rows
from diffusion.evaluation.memorisation import Memorisation, memorisation
from diffusion.evaluation.metrics import Scores
from diffusion.evaluation.per_class import Labelled, PerClass, per_class
from diffusion.evaluation.real import CHUNK, Real, moved_in_pieces, packed, unpacked
from diffusion.evaluation.reference import FeaturesKey
from diffusion.evaluation.sealed import pieces_of, recall
from diffusion.evaluation.terms import Terms
from diffusion.families.config import FAMILIES
from diffusion.files import sha256_file
from diffusion.fingerprint import Fingerprint, fingerprint
from diffusion.model import Model, load_model, read_model_header
from diffusion.progress import Progress, silent
from diffusion.sampling import labels_of, leads_anywhere, reconstructed


class Portrait(Config):
    """What one model's pictures are like."""

    sha256: str
    """Of its file."""
    family: str
    images: int
    """Pictures it had seen in training."""
    fingerprint: Fingerprint
    """Of the machine that drew."""
    scores: Scores
    """How far its pictures lie from held-out ones."""
    memorisation: Memorisation
    """Whether they are copies of training pictures."""
    duplicates: Duplicates
    """Whether they are copies of one another."""
    drift: Drift
    """Their colours and brightness."""
    per_class: PerClass | None = Field(None, exclude_if=unset)
    """The same class by class; None: it was told none."""
    held_out_loss: HeldOutLoss
    """What it makes of pictures that it has never seen."""
    psnr: Estimate | None = Field(None, exclude_if=unset)
    """In dB, how close held-out pictures come back from an autoencoder, or enlarged ones come to the real ones; None:
    it is shown none."""
    gflop: float
    """Floating-point operations to draw one picture, in 10⁹."""

    def named(self) -> dict[str, float]:
        """The figures under names that say what they are."""
        figures = self.scores.named() | self.memorisation.named() | self.duplicates.named() | self.drift.named()
        figures |= self.held_out_loss.named()
        if self.per_class is not None:
            figures |= self.per_class.named()
        if self.psnr is not None:
            name = "reconstruction_psnr" if FAMILIES[self.family].judged == "reconstructed" else "psnr"
            figures |= {name: self.psnr.value, f"{name}_se": self.psnr.error}
        return figures | {"gflop_per_picture": self.gflop}


class DrawnKey(Config):
    """All that the pictures of a model depend on."""

    kind: Literal["drawn"] = "drawn"
    format_version: Literal[1] = 1
    """Grows when the same model draws other pictures, or is asked for others."""
    model: str
    """SHA-256 of its file."""
    samples: int
    seed: int
    sampling: SamplingConfig
    fingerprint: Fingerprint
    content_digest: str | None
    """Of the data set whose captions it is asked for, or whose small pictures it is shown; None: neither, so that what
    it draws is the same for every data set."""
    reference: int | None
    """Held-out pictures that these are of; None: likewise."""


class FeaturesOfDrawnKey(Config):
    """All that their features depend on."""

    kind: Literal["features of drawn pictures"] = "features of drawn pictures"
    format_version: Literal[1] = 1
    """Grows when features of the same name and preprocessing come out another way."""
    drawn: DrawnKey
    extractor: str
    extractor_digest: str
    preprocessing: str
    fingerprint: Fingerprint


class NeighboursKey(Config):
    """All that the training pictures nearest to them depend on."""

    kind: Literal["neighbours of drawn pictures"] = "neighbours of drawn pictures"
    format_version: Literal[1] = 1
    """Grows when thumbnails or distances come out another way."""
    drawn: FeaturesOfDrawnKey
    training: FeaturesKey
    mirrored: bool


class ShownKey(Config):
    """All that depends on what a model makes of the first held-out pictures."""

    kind: Literal["losses", "reconstructions"]
    format_version: Literal[1] = 1
    """Grows when they are measured another way."""
    model: str
    """SHA-256 of its file."""
    content_digest: str
    count: int
    fingerprint: Fingerprint


@dataclass(frozen=True)
class Portrayed:
    """A portrait, and what it was made of."""

    portrait: Portrait
    pictures: Tensor
    """All that it drew, (N, C, H, W) uint8."""
    features: Tensor
    """Of them, (N, D) float32."""
    key: FeaturesOfDrawnKey
    """Of these features."""
    psnr: Tensor | None
    """Of each held-out picture that it was shown, (M,) float64 in dB; None: it was shown none."""
    classes: tuple[str, ...]
    """That it was told."""
    labels: Tensor | None
    """Which of them each picture is to show, (N,); None: it was told none."""


class Sitter:
    """A model file of which a portrait is made; what takes long is done when first asked for, and kept in ``folder``.

    Raises UserError if it is no model.
    """

    def __init__(
        self, path: Path, real: Real, config: EvaluationConfig, sampling: SamplingConfig, folder: Path, report: Progress
    ) -> None:
        self.header = read_model_header(path)
        self.sha256 = sha256_file(path)
        self.path = path
        self.real = real
        self.config = config
        self.sampling = sampling
        self.folder = folder
        self.report = report
        self.fingerprint = fingerprint(sampling.compute_batch, sampling.precision, sampling.device)

    @cached_property
    def model(self) -> Model:
        """The model."""
        return load_model(self.path)

    @cached_property
    def asked(self) -> Asked:
        """To show what held-out pictures do, if the model was told captions; else what there is, as often."""
        if not self.header.model.text:
            return ANYTHING
        real = self.real
        captioned = [caption is not None for caption in real.dataset.captions(real.held_out)]
        return like(real.dataset, real.held_out[captioned][: self.config.samples], self.model.classes)

    @cached_property
    def guided(self) -> SamplingConfig:
        """As it is to draw: a champion may have been told less than what the configuration is for now."""
        leads = leads_anywhere(self.model.classes, self.asked) and self.header.model.low_resolution is None
        return self.sampling if leads else self.sampling.unguided()

    @cached_property
    def drawn(self) -> Tensor:
        """What it draws, (N, C, H, W) uint8."""

        small = None if self.header.model.low_resolution is None else self.real.small
        count = self.config.samples if small is None else len(small)
        pieces = pieces_of(self.folder, self.drawn_key)

        def work() -> dict[str, Tensor]:
            given = self.model, count, self.config.seed, self.guided, self.report, self.asked, small
            return {"pictures": drawn(pieces, *given)}

        return recall(self.folder, self.drawn_key, work)["pictures"]

    @cached_property
    def features(self) -> Tensor:
        """Of what it draws, (N, D) float32."""
        kept = recall(self.folder, self.features_key, lambda: {"features": self.real.extractor(self.drawn)})
        return kept["features"]

    @cached_property
    def memorisation(self) -> Memorisation:
        """Whether it copies training pictures, mirrored ones as well if it learned from those."""
        mirrored = bool(self.header.training.get("flip", False))

        def work() -> dict[str, Tensor]:
            views = self.real.views(torch.split(self.drawn, CHUNK), self.features, mirrored)
            return unpacked(self.real.neighbours(views))

        key = NeighboursKey(drawn=self.features_key, training=self.real.training_key, mirrored=mirrored)
        return memorisation(packed(recall(self.folder, key, work)), self.real.held_out_neighbours(mirrored))

    @cached_property
    def labels(self) -> Tensor | None:
        """The class that each picture is to show, (N,), see ``labels_of``; None: it was told none."""
        if self.header.model.low_resolution:
            return None
        return labels_of(self.model, range(self.config.samples), self.config.seed, self.asked)

    @cached_property
    def per_class(self) -> PerClass | None:
        """How it does class by class; None: it was told none, or none that the data set has pictures of."""
        classes, real = self.model.classes, self.real
        if self.labels is None or not real.dataset.manifest.class_histogram.keys() & set(classes):
            return None
        drawn = Labelled(self.features, self.labels)
        return per_class(drawn, real.labelled(classes), real.reader(classes), classes, real.extractor.name)

    @cached_property
    def held_out_loss(self) -> HeldOutLoss:
        """What it makes of held-out pictures, as many as it draws."""
        rows = self.real.held_out[: self.config.samples]

        def work() -> dict[str, Tensor]:
            starts = range(0, len(rows), CHUNK)
            chunks = (rows[start : start + CHUNK] for start in starts)
            dataset = self.real.dataset
            pieces = ((dataset.pictures(some), told_of_rows(self.model, dataset, some)) for some in chunks)
            terms = measure(self.model, pieces, self.sampling, self.report)
            bits = {} if terms.bits is None else {"bits": terms.bits}
            return {"edges": terms.edges, "losses": terms.losses, **bits}

        kept = recall(self.folder, self._shown_key("losses", len(rows)), work)
        return held_out_loss(Terms(kept["edges"], kept["losses"], kept.get("bits")))

    @cached_property
    def psnr(self) -> Tensor | None:
        """How close each held-out picture comes that it is shown, (M,) in dB; None: it is shown none."""
        real = self.real
        if self.header.model.low_resolution is not None:
            originals = real.pictures(real.shown)
            return torch.cat([psnr(*pair) for pair in zip(torch.split(self.drawn, CHUNK), originals, strict=True)])
        if self.header.model.judged != "reconstructed":
            return None

        def work() -> dict[str, Tensor]:
            model = self.model.on(resolve_device(self.sampling.device))
            return {"psnr": torch.cat([psnr(reconstructed(model, each, self.sampling), each) for each in pictures])}

        pictures = real.pictures(real.held_out)
        return recall(self.folder, self._shown_key("reconstructions", len(real.held_out)), work)["psnr"]

    @property
    def drawn_key(self) -> DrawnKey:
        """That of what it draws."""
        told = self.header.model.text or self.header.model.low_resolution is not None
        return DrawnKey(
            model=self.sha256,
            samples=self.config.samples,
            seed=self.config.seed,
            sampling=self.sampling,
            fingerprint=self.fingerprint,
            content_digest=self.real.dataset.manifest.content_digest if told else None,
            reference=self.config.reference if told else None,
        )

    @property
    def features_key(self) -> FeaturesOfDrawnKey:
        """That of the features of what it draws."""
        extractor = self.real.extractor
        return FeaturesOfDrawnKey(
            drawn=self.drawn_key,
            extractor=extractor.name,
            extractor_digest=extractor.digest,
            preprocessing=extractor.preprocessing,
            fingerprint=fingerprint(BATCH, "fp32", "cpu"),
        )

    def _shown_key(self, kind: Literal["losses", "reconstructions"], count: int) -> ShownKey:
        return ShownKey(
            kind=kind,
            model=self.sha256,
            content_digest=self.real.dataset.manifest.content_digest,
            count=count,
            fingerprint=self.fingerprint,
        )


def portray(
    path: Path,
    real: Real,
    config: EvaluationConfig,
    sampling: SamplingConfig,
    folder: Path,
    progress: Progress = silent,
) -> Portrayed:
    """The portrait of the model in the file ``path`` beside ``real`` pictures of its shape and task.

    It draws picture numbers 0 … ``config.samples`` − 1 of ``config.seed``, or enlarges what it is shown. Raises
    UserError if it is no model, or cannot draw as ``sampling`` says.
    """

    def named(what: str, done: int, total: int | None, note: str = "") -> None:
        progress(f"{path.stem}: {what}", done, total, note)

    sitter = Sitter(path, real, config, sampling, folder, named)
    looks = [appearance(pictures) for pictures in torch.split(sitter.drawn, CHUNK)]
    near = sitter.psnr
    portrait = Portrait(
        sha256=sitter.sha256,
        family=sitter.header.model.family,
        images=sitter.header.images,
        fingerprint=sitter.fingerprint,
        scores=real.scores(sitter.features_key, sitter.features),
        memorisation=sitter.memorisation,
        duplicates=duplicates(moved_in_pieces(torch.split(sitter.drawn, CHUNK)), real.thumbnails),
        drift=drift({name: torch.cat([each[name] for each in looks]) for name in looks[0]}, real.appearance),
        per_class=sitter.per_class,
        held_out_loss=sitter.held_out_loss,
        psnr=None if near is None else paired_difference(near.tolist(), [0.0] * len(near)),
        gflop=gflop(sitter.model, sitter.guided),
    )
    return Portrayed(
        portrait=portrait,
        pictures=sitter.drawn,
        features=sitter.features,
        key=sitter.features_key,
        psnr=near,
        classes=tuple(sitter.model.classes),
        labels=sitter.labels,
    )
