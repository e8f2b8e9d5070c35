"""Evaluate: which of a run's checkpoints draws best, and how far that is from real."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from diffusion.config import Config
from diffusion.config_sampling import ANYTHING, Asked, SamplingConfig
from diffusion.data.captions import like
from diffusion.data.dataset import Dataset
from diffusion.data.manifest import read_manifest
from diffusion.errors import UserError
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.features import features_of, make_extractor
from diffusion.evaluation.metrics import Scores, judge
from diffusion.evaluation.report import Sheets, write_report
from diffusion.evaluation.results import Conditions, Evaluation, Judged
from diffusion.files import digest_of, sha256_file, write_bytes, write_json
from diffusion.fingerprint import Fingerprint, fingerprint
from diffusion.grids import grid, save_png
from diffusion.model import DiffusionModel, load_model, read_header, save_tensors
from diffusion.progress import Progress, silent
from diffusion.random import permutation
from diffusion.sampling import leads_anywhere, sample

FEWEST = 10
"""Pictures of either split without which no score means anything."""
SHOWN = 64
"""Pictures kept of each set to be looked at."""


class Record(Config):
    """What is remembered of a set of pictures once judged; the pictures to be shown lie beside it."""

    key: str
    images: int
    scores: Scores
    fingerprint: Fingerprint


@dataclass(frozen=True)
class Memory:
    """Finished judgements in a folder, each under a digest of everything that went into it.

    A judgement is ``<key>.safetensors`` and, written last, its digest: what is cut short or damaged is
    judged again.
    """

    folder: Path

    def recall(self, key: str, work: Callable[[], tuple[Record, Tensor]]) -> tuple[Record, Tensor]:
        """The judgement remembered under ``key``, or else the one that ``work`` makes."""
        path = self.folder / f"{key}.safetensors"
        seal = path.with_suffix(".sha256")
        if not (path.is_file() and seal.is_file() and sha256_file(path) == seal.read_text().strip()):
            record, shown = work()
            digest = save_tensors(path, {"shown": shown}, record.model_dump(mode="json"))
            write_bytes(seal, f"{digest}\n".encode())
        return Record.model_validate(read_header(path)), load_file(path)["shown"]


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

    Features of real pictures are computed at most once, and only if something is not remembered.
    """

    def __init__(
        self, data: Path, config: EvaluationConfig, sampling: SamplingConfig, output: Path, progress: Progress
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

        def work() -> tuple[Record, Tensor]:
            rows = self.dataset.rows("train")
            order = permutation(self.config.seed, "evaluation/floor", 0, len(rows))
            chosen = rows[order[: self.config.samples]]
            features = features_of(self.dataset, chosen, self.extractor, self.progress)
            return self._record(key, features, images=0), self.dataset.pictures(self.held_out[:SHOWN])

        key = digest_of(["floor", self.conditions.key])
        record, shown = self.memory.recall(key, work)
        return record.scores, shown

    def model(self, path: Path) -> tuple[Judged, Tensor]:
        """A model file's scores, and the first of its pictures; raises UserError if it is none or misfits."""

        def named(what: str, done: int, total: int | None, note: str = "") -> None:
            self.progress(f"{path.stem}: {what}", done, total, note)

        def work() -> tuple[Record, Tensor]:
            model = load_model(path)
            self._require_same_shape(path, model)
            numbers, asked = range(self.config.samples), self.asked(model)
            # A champion may have been told less than what the configuration is for now.
            sampling = self.sampling if leads_anywhere(model.classes, asked) else self.sampling.unguided()
            drawn = sample(model, numbers, self.config.seed, sampling, named, asked)
            return self._record(key, self.extractor(drawn), model.header.images), drawn[:SHOWN]

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
            fingerprint=record.fingerprint,
        )
        return judged, shown

    def asked(self, model: DiffusionModel) -> Asked:
        """To show what held-out pictures do, if the model was told captions; else what there is, as often."""
        if not model.config.text:
            return ANYTHING
        captioned = [caption is not None for caption in self.dataset.captions(self.held_out)]
        return like(self.dataset, self.held_out[captioned][: self.config.samples], model.classes)

    def _record(self, key: str, features: Tensor, images: int) -> Record:
        config = self.config
        scores = judge(features, self.reference, self.extractor.name, config.kid_subsets, config.kid_subset_size)
        machine = fingerprint(self.sampling.compute_batch, self.sampling.precision, self.sampling.device)
        return Record(key=key, images=images, scores=scores, fingerprint=machine)

    def _require_same_shape(self, path: Path, model: DiffusionModel) -> None:
        if model.shape != self.dataset.shape:
            theirs, ours = ("×".join(map(str, shape)) for shape in (model.shape, self.dataset.shape))
            raise UserError(
                f"{path} draws pictures of {theirs} and {self.dataset.folder} holds {ours} "
                "(channels × height × width): evaluate it on the data set it was trained on"
            )


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

    All draw the same picture numbers of the same seed. The best has the lowest KID. ``losses``: the CSV of
    losses by images seen that training left, for the report. Written into ``output``: ``evaluation.json``,
    ``metrics.json``, ``scores.csv``, grids as PNG, and at last ``report.html``. What was judged before is
    remembered in ``judged`` there, so the same call after a kill goes on, and after the end draws nothing.
    Raises UserError for a data set too small, or a file that is no model or one of another picture size.
    """
    if not checkpoints:
        raise UserError("no checkpoint to evaluate: train first, with `darkroom train`")
    jury = Judge(data, config, sampling, output, progress)
    floor, real = jury.floor()
    judged = sorted((jury.model(path) for path in checkpoints), key=lambda pair: pair[0].images)
    models = [each for each, _ in judged]
    evaluation = Evaluation(
        dataset=jury.dataset.manifest.name,
        conditions=jury.conditions,
        eval_key=jury.conditions.key,
        floor=floor,
        best=min(models, key=lambda each: each.scores.kid),
        checkpoints=models,
    )
    sheets = Sheets(real=real, drawn={each.sha256: shown for each, shown in judged})
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
) -> Judged:
    """Judge one model file as ``evaluate`` would under equal conditions, and remember it in ``output``."""
    judged, _ = Judge(data, config, sampling, output, progress).model(model_file)
    return judged


def _write(evaluation: Evaluation, sheets: Sheets, output: Path) -> None:
    for path in (output / "grids").glob("*.png"):
        path.unlink()
    save_png(output / "grids" / "held_out.png", grid(sheets.real))
    for each in evaluation.checkpoints:
        save_png(output / "grids" / f"{each.images:010d}-{each.sha256[:8]}.png", grid(sheets.drawn[each.sha256]))
    rows = [{"images": each.images, **each.scores.named()} for each in evaluation.checkpoints]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(output / "scores.csv", table.getvalue().encode())
    write_json(output / "evaluation.json", json.loads(evaluation.model_dump_json()))
    write_json(output / "metrics.json", evaluation.metrics())
