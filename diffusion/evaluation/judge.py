"""The judge: draws pictures from model files and compares them with the held-out pictures of one data set."""

import math
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from diffusion.config import Config, unset
from diffusion.config_sampling import ANYTHING, Asked, SamplingConfig
from diffusion.data.captions import like
from diffusion.data.dataset import Dataset, Rows
from diffusion.data.manifest import read_manifest
from diffusion.device import resolve_device
from diffusion.errors import UserError
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.drawing import drawn as drawn_in_pieces
from diffusion.evaluation.enlargement import RESAMPLING, Enlarged, Likeness, likeness, psnr, resampled, ssim
from diffusion.evaluation.features import extractor_for
from diffusion.evaluation.intervals import HalvesKey, estimates
from diffusion.evaluation.metrics import Scores, judge
from diffusion.evaluation.moments import distance, moments
from diffusion.evaluation.reference import Reference, cached_features, cached_reference
from diffusion.evaluation.results import Conditions, Estimates, Judged, Reconstruction
from diffusion.evaluation.sealed import Tensors, pieces_of, recall_found
from diffusion.files import sha256_file
from diffusion.fingerprint import Fingerprint, fingerprint
from diffusion.model import Model, load_model
from diffusion.progress import Progress
from diffusion.random import permutation
from diffusion.sampling import leads_anywhere, reconstructed
from diffusion.upscaling import shrunk

JUDGED = "judged"
"""Folder, in that of an evaluation, of all that is remembered, of real pictures too."""
FEWEST = 10
"""Pictures of either split without which no score means anything."""
SHOWN = 64
"""Pictures kept of each set to be looked at."""
CHUNK = 1000
"""Pictures brought through an autoencoder at a time."""
Kept = Tensors
"""``shown`` and of an autoencoder ``reconstructed``: pictures, (N, C, H, W) uint8. Of a model that was judged in full
also ``features`` of all that it drew, (samples, D) float32."""


class RecordKey(Config):
    """All that a judgement depends on, but for the machine, which moves it by no more than rounding does."""

    kind: Literal["floor", "model", "preliminary", "baseline"]
    format_version: Literal[1] = 1
    """Grows when records say other things; what changes a score is in the conditions."""
    conditions: str
    """Key of those under which it is made."""
    judged: str | None = None
    """SHA-256 of the model's file, or of a baseline its name; None: the floor."""


class Record(Config):
    """What is remembered of a set of pictures once judged; pictures to be shown and features lie beside it."""

    images: int
    scores: Scores
    reconstruction: Reconstruction | None = Field(None, exclude_if=unset)
    family: str = "ddpm"
    fingerprint: Fingerprint
    likeness: Likeness | None = Field(None, exclude_if=unset)


def require_enough(data: Path) -> None:
    """Raise UserError if a split of the data set in folder ``data`` is too small to judge by."""
    for split, count in read_manifest(data).counts.items():
        if count < FEWEST:
            raise UserError(
                f"data set {data} has {count} {split.replace('_', '-').replace('train', 'training')} pictures, "
                f"and evaluation needs {FEWEST}: ingest more, or change ingest.held_out"
            )


class Judge:
    """Judges model files against the held-out pictures of one data set, each of them once.

    What it makes of real pictures is kept in ``output``, for all judges of the same data set. Models that enlarge
    what they are shown at ``low_resolution`` draw the held-out pictures again.
    """

    def __init__(
        self,
        data: Path,
        config: EvaluationConfig,
        sampling: SamplingConfig,
        output: Path,
        progress: Progress,
        low_resolution: int | None = None,
    ) -> None:
        self.dataset = Dataset.open(data)
        self.config = config
        self.sampling = sampling
        self.progress = progress
        require_enough(data)
        self.folder = output / JUDGED
        self.extractor = extractor_for(config, self.dataset, self.folder, progress)
        self.held_out = self.dataset.rows("held_out")[: config.reference]
        self.conditions = Conditions(
            content_digest=self.dataset.manifest.content_digest,
            extractor_digest=self.extractor.digest,
            preprocessing=self.extractor.preprocessing,
            evaluation=config,
            sampling=sampling,
            low_resolution=low_resolution,
        )

    @cached_property
    def reference(self) -> Reference:
        """The held-out pictures, as scores see them."""
        return cached_reference(self.folder, self.dataset, self.held_out, self.extractor, self.progress)

    def floor(self) -> tuple[Scores, Tensor]:
        """Scores of real pictures, and some held-out ones to look at.

        Judged are training pictures, chosen by seed: as many as are drawn from a model, or all there
        are. None of them belongs to the reference.
        """

        def work() -> tuple[Record, Kept]:
            shown = self.dataset.pictures(self.held_out[:SHOWN])
            return self._record(self._floor_features(), images=0), {"shown": shown}

        record, kept = recall_found(self.folder, RecordKey(kind="floor", conditions=self.conditions.key), Record, work)
        return record.scores, kept["shown"]

    def model(self, path: Path) -> tuple[Judged, Kept]:
        """A model file's scores, and some pictures to look at; raises UserError if it is none or misfits."""
        return self._judged(path, "model", self.config.samples)

    def preliminary(self, path: Path, samples: int) -> tuple[Judged, Kept]:
        """The same of the first ``samples`` pictures, and of as many held-out ones that an autoencoder brings back."""
        return self._judged(path, "preliminary", samples)

    def estimates(self, judged: Judged, features: Tensor) -> Estimates | None:
        """Intervals of the figures that a model has got for the ``features`` of what it drew; None: see there."""
        if self.conditions.low_resolution is not None:
            return None
        key = HalvesKey(model=judged.sha256, conditions=self.conditions.key, fingerprint=judged.fingerprint)
        sides = features, self._floor_features(), self.reference.features
        return estimates(self.folder, key, *sides, self.progress)

    def _judged(self, path: Path, kind: Literal["model", "preliminary"], samples: int) -> tuple[Judged, Kept]:
        if not path.is_file():
            raise UserError(f"no model at {path}: train one with `darkroom train`")
        sha256 = sha256_file(path)
        key = RecordKey(kind=kind, conditions=self.conditions.on(samples).key, judged=sha256)
        record, kept = recall_found(self.folder, key, Record, lambda: self._work(path, key, samples))
        judged = Judged(
            file=str(path),
            sha256=sha256,
            images=record.images,
            scores=record.scores,
            reconstruction=record.reconstruction,
            family=record.family,
            fingerprint=record.fingerprint,
            likeness=record.likeness,
        )
        return judged, kept

    def _work(self, path: Path, key: RecordKey, samples: int) -> tuple[Record, Kept]:
        def named(what: str, done: int, total: int | None, note: str = "") -> None:
            self.progress(f"{path.stem}: {what}", done, total, note)

        model = load_model(path)
        self._require_same_shape(path, model)
        self._require_same_task(path, model)
        drawn, alike = self._drawn(model, samples, pieces_of(self.folder, key), named)
        features = self.extractor(drawn)
        record = self._record(features, model.header.images, alike)
        record = record.model_copy(update={"family": model.config.family})
        kept = {"shown": drawn[:SHOWN]} | ({"features": features} if key.kind == "model" else {})
        if model.coder is None:
            return record, kept
        rows = self.held_out if key.kind == "model" else self.held_out[:samples]
        reconstruction, shown = self._reconstruction(model, rows, named)
        return record.model_copy(update={"reconstruction": reconstruction}), kept | {"reconstructed": shown}

    def _drawn(self, model: Model, samples: int, pieces: Path, progress: Progress) -> tuple[Tensor, Likeness | None]:
        """The first pictures, and of enlarged ones how like the real ones they are; ``pieces``: a folder of theirs."""
        asked = self.asked(model)
        # A champion may have been told less than what the configuration is for now.
        sampling = self.sampling if leads_anywhere(model.classes, asked) else self.sampling.unguided()
        seed = self.config.seed
        if self.conditions.low_resolution is None:
            return drawn_in_pieces(pieces, model, samples, seed, sampling, progress, asked), None
        small = self.small[:samples]
        drawn = drawn_in_pieces(pieces, model, len(small), seed, sampling, progress, small=small)
        return drawn, likeness(drawn, self.to_enlarge[:samples])

    def _floor_features(self) -> Tensor:
        rows = self.dataset.rows("train")
        order = permutation(self.config.seed, "evaluation/floor", 0, len(rows))
        chosen = rows[order[: self.config.samples]]
        return cached_features(self.folder, self.dataset, chosen, self.extractor, self.progress)

    def baselines(self) -> dict[str, Enlarged] | None:
        """What models that enlarge must beat: the same small pictures without one; None if they enlarge nothing."""
        if self.conditions.low_resolution is None:
            return None
        return {name: self._baseline(name) for name in RESAMPLING}

    def _baseline(self, name: str) -> Enlarged:
        def work() -> tuple[Record, Kept]:
            large = resampled(self.small, self.dataset.manifest.size // self.small.shape[-1], name)
            record = self._record(self.extractor(large), 0, likeness(large, self.to_enlarge))
            return record, {"shown": large[:SHOWN]}

        key = RecordKey(kind="baseline", conditions=self.conditions.key, judged=name)
        record, _ = recall_found(self.folder, key, Record, work)
        assert record.likeness is not None
        return Enlarged(scores=record.scores, likeness=record.likeness)

    @cached_property
    def to_enlarge(self) -> Tensor:
        """The held-out pictures that models enlarge."""
        return self.dataset.pictures(self.held_out[: self.config.samples])

    @cached_property
    def small(self) -> Tensor:
        """The same as they are shown."""
        assert self.conditions.low_resolution is not None
        return shrunk(self.to_enlarge, self.conditions.low_resolution)

    def asked(self, model: Model) -> Asked:
        """To show what held-out pictures do, if the model was told captions; else what there is, as often."""
        if not model.config.text:
            return ANYTHING
        captioned = [caption is not None for caption in self.dataset.captions(self.held_out)]
        return like(self.dataset, self.held_out[captioned][: self.config.samples], model.classes)

    def _reconstruction(self, model: Model, rows: Rows, progress: Progress) -> tuple[Reconstruction, Tensor]:
        """How close the held-out pictures in ``rows`` come back, and the first of them as they do."""
        model = model.on(resolve_device(self.sampling.device))
        ratios: list[Tensor] = []
        similar: list[Tensor] = []
        features: list[Tensor] = []
        first: list[Tensor] = []
        for start in range(0, len(rows), CHUNK):
            pictures = self.dataset.pictures(rows[start : start + CHUNK])
            back = reconstructed(model, pictures, self.sampling)
            ratios.append(psnr(back, pictures))
            similar.append(ssim(back, pictures))
            features.append(self.extractor(back))
            first = first or [back[:SHOWN]]
            progress("pictures reconstructed", start + len(pictures), len(rows))
        of_each = torch.cat(ratios)
        found = Reconstruction(
            extractor=self.extractor.name,
            pictures=len(of_each),
            psnr=of_each.mean().item(),
            psnr_se=of_each.std().item() / math.sqrt(len(of_each)),
            ssim=torch.cat(similar).mean().item(),
            fd=distance(moments(torch.cat(features)), self.reference.moments),
        )
        return found, first[0]

    def _record(self, features: Tensor, images: int, alike: Likeness | None = None) -> Record:
        scores = judge(features, self.reference, self.extractor.name)
        machine = fingerprint(self.sampling.compute_batch, self.sampling.precision, self.sampling.device)
        return Record(images=images, scores=scores, fingerprint=machine, likeness=alike)

    def _require_same_shape(self, path: Path, model: Model) -> None:
        if model.shape != self.dataset.shape:
            theirs, ours = ("×".join(map(str, shape)) for shape in (model.shape, self.dataset.shape))
            raise UserError(
                f"{path} draws pictures of {theirs} and {self.dataset.folder} holds {ours} "
                "(channels × height × width): evaluate it on the data set it was trained on"
            )

    def _require_same_task(self, path: Path, model: Model) -> None:
        theirs, ours = model.config.low_resolution, self.conditions.low_resolution
        if theirs != ours:
            they, we = (f"enlarges from {low} pixels" if low else "draws from nothing" for low in (theirs, ours))
            raise UserError(f"{path} {they}, and what it would be compared with {we}: scores say nothing of two tasks")
