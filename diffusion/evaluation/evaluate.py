"""Evaluate: which of a run's checkpoints draws best, and how far that is from real."""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from diffusion.config import Config, unset
from diffusion.config_sampling import ANYTHING, Asked, SamplingConfig
from diffusion.data.captions import like
from diffusion.data.dataset import Dataset
from diffusion.data.manifest import read_manifest
from diffusion.device import resolve_device
from diffusion.errors import UserError
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.enlargement import RESAMPLING, Enlarged, Likeness, likeness, psnr, resampled, ssim
from diffusion.evaluation.features import features_of, make_extractor
from diffusion.evaluation.metrics import Scores, frechet_distance, judge
from diffusion.evaluation.report import Sheets, write_report
from diffusion.evaluation.results import Conditions, Evaluation, Judged, Reconstruction
from diffusion.files import digest_of, sha256_file, write_bytes, write_json
from diffusion.fingerprint import Fingerprint, fingerprint
from diffusion.grids import above, grid, save_png
from diffusion.model import Model, load_model, read_header, read_model_header, save_tensors
from diffusion.progress import Progress, silent
from diffusion.random import permutation
from diffusion.sampling import leads_anywhere, reconstructed, sample
from diffusion.upscaling import shrunk, upscale

FEWEST = 10
"""Pictures of either split without which no score means anything."""
SHOWN = 64
"""Pictures kept of each set to be looked at."""
CHUNK = 1000
"""Pictures brought through an autoencoder at a time."""
Shown = dict[str, Tensor]
"""Pictures, (N, C, H, W) uint8: ``shown`` and of an autoencoder ``reconstructed``."""


class Record(Config):
    """What is remembered of a set of pictures once judged; the pictures to be shown lie beside it."""

    key: str
    images: int
    scores: Scores
    reconstruction: Reconstruction | None = Field(None, exclude_if=unset)
    family: str = Field("ddpm", exclude_if=lambda family: family == "ddpm")
    fingerprint: Fingerprint
    likeness: Likeness | None = Field(None, exclude_if=unset)


@dataclass(frozen=True)
class Memory:
    """Finished judgements in a folder, each under a digest of everything that went into it.

    A judgement is ``<key>.safetensors`` and, written last, its digest: what is cut short or damaged is
    judged again.
    """

    folder: Path

    def recall(self, key: str, work: Callable[[], tuple[Record, Shown]]) -> tuple[Record, Shown]:
        """The judgement remembered under ``key``, or else the one that ``work`` makes."""
        path = self.folder / f"{key}.safetensors"
        seal = path.with_suffix(".sha256")
        if not (path.is_file() and seal.is_file() and sha256_file(path) == seal.read_text().strip()):
            record, shown = work()
            digest = save_tensors(path, shown, record.model_dump(mode="json"))
            write_bytes(seal, f"{digest}\n".encode())
        return Record.model_validate(read_header(path)), load_file(path)


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

    Features of real pictures are computed at most once, and only if something is not remembered. Models that enlarge
    what they are shown at ``low_resolution`` draw these pictures again.
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
        self.extractor = make_extractor(config)
        self.memory = Memory(output / "judged")
        self.held_out = self.dataset.rows("held_out")[: config.reference]
        require_enough(data)
        self.conditions = Conditions(
            content_digest=self.dataset.manifest.content_digest,
            extractor_digest=self.extractor.digest,
            evaluation=config,
            sampling=sampling,
            low_resolution=low_resolution,
        )

    @cached_property
    def reference(self) -> Tensor:
        """Features of the held-out pictures."""
        return features_of(self.dataset, self.held_out, self.extractor, self.progress)

    def floor(self) -> tuple[Scores, Tensor]:
        """Scores of real pictures, and some held-out ones to look at.

        Judged are training pictures, chosen by seed: as many as are drawn from a model, or all there
        are. None of them belongs to the reference.
        """

        def work() -> tuple[Record, Shown]:
            rows = self.dataset.rows("train")
            order = permutation(self.config.seed, "evaluation/floor", 0, len(rows))
            chosen = rows[order[: self.config.samples]]
            features = features_of(self.dataset, chosen, self.extractor, self.progress)
            return self._record(key, features, images=0), {"shown": self.dataset.pictures(self.held_out[:SHOWN])}

        key = digest_of(["floor", self.conditions.key])
        record, shown = self.memory.recall(key, work)
        return record.scores, shown["shown"]

    def model(self, path: Path) -> tuple[Judged, Shown]:
        """A model file's scores, and some pictures to look at; raises UserError if it is none or misfits."""

        def named(what: str, done: int, total: int | None, note: str = "") -> None:
            self.progress(f"{path.stem}: {what}", done, total, note)

        def work() -> tuple[Record, Shown]:
            model = load_model(path)
            self._require_same_shape(path, model)
            self._require_same_task(path, model)
            asked = self.asked(model)
            # A champion may have been told less than what the configuration is for now.
            sampling = self.sampling if leads_anywhere(model.classes, asked) else self.sampling.unguided()
            if self.conditions.low_resolution is None:
                drawn, alike = sample(model, range(self.config.samples), self.config.seed, sampling, named, asked), None
            else:
                drawn = upscale(model, self.small, self.config.seed, sampling, named)
                alike = likeness(drawn, self.to_enlarge)
            record = self._record(key, self.extractor(drawn), model.header.images, alike)
            record = record.model_copy(update={"family": model.config.family})
            if model.coder is None:
                return record, {"shown": drawn[:SHOWN]}
            reconstruction, shown = self._reconstruction(model, named)
            record = record.model_copy(update={"reconstruction": reconstruction})
            return record, {"shown": drawn[:SHOWN], "reconstructed": shown}

        if not path.is_file():
            raise UserError(f"no model at {path}: train one with `darkroom train`")
        sha256 = sha256_file(path)
        key = digest_of(["model", sha256, self.conditions.key])
        record, shown = self.memory.recall(key, work)
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
        return judged, shown

    def baselines(self) -> dict[str, Enlarged] | None:
        """What models that enlarge must beat: the same small pictures without one; None if they enlarge nothing."""
        if self.conditions.low_resolution is None:
            return None
        return {name: self._baseline(name) for name in RESAMPLING}

    def _baseline(self, name: str) -> Enlarged:
        def work() -> tuple[Record, Shown]:
            large = resampled(self.small, self.dataset.manifest.size // self.small.shape[-1], name)
            return self._record(key, self.extractor(large), 0, likeness(large, self.to_enlarge)), {
                "shown": large[:SHOWN]
            }

        key = digest_of(["baseline", name, self.conditions.key])
        record, _ = self.memory.recall(key, work)
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

    def _reconstruction(self, model: Model, progress: Progress) -> tuple[Reconstruction, Tensor]:
        """How close the held-out pictures come back, and the first of them as they do."""
        model = model.on(resolve_device(self.sampling.device))
        ratios: list[Tensor] = []
        similar: list[Tensor] = []
        features: list[Tensor] = []
        first: list[Tensor] = []
        for start in range(0, len(self.held_out), CHUNK):
            pictures = self.dataset.pictures(self.held_out[start : start + CHUNK])
            back = reconstructed(model, pictures, self.sampling)
            ratios.append(psnr(back, pictures))
            similar.append(ssim(back, pictures))
            features.append(self.extractor(back))
            first = first or [back[:SHOWN]]
            progress("pictures reconstructed", start + len(pictures), len(self.held_out))
        of_each = torch.cat(ratios)
        found = Reconstruction(
            extractor=self.extractor.name,
            pictures=len(of_each),
            psnr=of_each.mean().item(),
            psnr_se=of_each.std().item() / math.sqrt(len(of_each)),
            ssim=torch.cat(similar).mean().item(),
            fd=frechet_distance(torch.cat(features), self.reference),
        )
        return found, first[0]

    def _record(self, key: str, features: Tensor, images: int, alike: Likeness | None = None) -> Record:
        config = self.config
        scores = judge(features, self.reference, self.extractor.name, config.kid_subsets, config.kid_subset_size)
        machine = fingerprint(self.sampling.compute_batch, self.sampling.precision, self.sampling.device)
        return Record(key=key, images=images, scores=scores, fingerprint=machine, likeness=alike)

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


def evaluate(
    data: Path,
    checkpoints: Sequence[Path],
    config: EvaluationConfig,
    sampling: SamplingConfig,
    output: Path,
    losses: Path | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Judge ``checkpoints`` against the held-out pictures of the data set in folder ``data``.

    All draw the same picture numbers of the same seed. The best is that of the highest merit. ``losses``: the CSV of
    losses by images seen that training left, for the report. Written into ``output``: ``evaluation.json``,
    ``metrics.json``, ``scores.csv``, grids as PNG, and at last ``report.html``. What was judged before is
    remembered in ``judged`` there, so the same call after a kill goes on, and after the end draws nothing.
    Raises UserError for a data set too small, or a file that is no model or one of another picture size.
    """
    if not checkpoints:
        raise UserError("no checkpoint to evaluate: train first, with `darkroom train`")
    low_resolution = read_model_header(checkpoints[0]).model.low_resolution
    jury = Judge(data, config, sampling, output, progress, low_resolution)
    floor, real = jury.floor()
    judged = sorted((jury.model(path) for path in checkpoints), key=lambda pair: pair[0].images)
    models = [each for each, _ in judged]
    evaluation = Evaluation(
        dataset=jury.dataset.manifest.name,
        conditions=jury.conditions,
        eval_key=jury.conditions.key,
        floor=floor,
        best=max(models, key=lambda each: each.merit.rank),
        checkpoints=models,
        baselines=jury.baselines(),
    )
    sheets = Sheets(
        real=real,
        drawn={each.sha256: shown["shown"] for each, shown in judged},
        reconstructed={each.sha256: shown["reconstructed"] for each, shown in judged if "reconstructed" in shown},
    )
    _write(evaluation, sheets, output)
    write_report(output / "report.html", evaluation, sheets, losses)
    return evaluation


def evaluate_one(
    model_file: Path,
    data: Path,
    config: EvaluationConfig,
    sampling: SamplingConfig,
    output: Path,
    progress: Progress = silent,
    low_resolution: int | None = None,
) -> Judged:
    """Judge one model file as ``evaluate`` would under equal conditions, and remember it in ``output``.

    ``low_resolution``: that of the models that it is compared with; UserError if it has another.
    """
    judged, _ = Judge(data, config, sampling, output, progress, low_resolution).model(model_file)
    return judged


def _write(evaluation: Evaluation, sheets: Sheets, output: Path) -> None:
    for path in (output / "grids").glob("*.png"):
        path.unlink()
    save_png(output / "grids" / "held_out.png", grid(sheets.real))
    for each in evaluation.checkpoints:
        save_png(output / "grids" / f"{each.images:010d}-{each.sha256[:8]}.png", grid(sheets.drawn[each.sha256]))
    if (back := sheets.reconstructed.get(evaluation.best.sha256)) is not None:
        save_png(output / "grids" / "held_out_reconstructed.png", above(sheets.real, back))
    rows = [{"images": each.images, **each.named()} for each in evaluation.checkpoints]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(output / "scores.csv", table.getvalue().encode())
    write_json(output / "evaluation.json", json.loads(evaluation.model_dump_json()))
    write_json(output / "metrics.json", evaluation.metrics())
