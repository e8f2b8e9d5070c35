"""Evaluate: which of a run's checkpoints draws best, and how far that is from real."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from diffusion.checkpoints import read_model_header
from diffusion.config_sampling import SamplingConfig
from diffusion.errors import UserError
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.evaluator import CACHE, Evaluator
from diffusion.evaluation.real import SHOWN
from diffusion.evaluation.report import Sheets, write_report
from diffusion.evaluation.results import CheckpointEvaluation, Evaluation
from diffusion.evaluation.selection import finalists
from diffusion.files import write_bytes, write_json
from diffusion.grids import above, grid, save_png
from diffusion.progress import Progress, silent


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

    All draw the same picture numbers of the same seed, and the best is that of the highest merit. Of more than
    ``config.finalists`` only the leading ones are judged in full, as shorter rounds choose them. ``losses``: the CSV
    of losses by images seen that training left, for the report. Written into ``output``: ``evaluation.json``,
    ``metrics.json``, ``scores.csv``, if there were rounds ``preliminary.csv`` of those that fell behind, grids as PNG,
    and at last ``report.html``. What was judged before is remembered in ``judged`` there, so the same call after a
    kill goes on, and after the end draws nothing.
    Raises UserError for a data set too small, or a file that is no model or one of another picture size.
    """
    if not checkpoints:
        raise UserError("no checkpoint to evaluate: train first, with `darkroom train`")
    low_resolution = read_model_header(checkpoints[0]).model.low_resolution
    evaluator = Evaluator(data, config, sampling, output / CACHE, progress, low_resolution)
    seen: dict[str, Tensor] = {}

    def briefly(path: Path, samples: int) -> CheckpointEvaluation:
        model = evaluator.model(path, samples)
        seen[model.sha256] = model.images[:SHOWN]
        return model.checkpoint()

    chosen, behind = finalists(checkpoints, config, briefly)
    models = {model.sha256: model for model in map(evaluator.model, chosen)}
    evaluated = sorted((model.checkpoint() for model in models.values()), key=lambda each: each.images)
    best = max(evaluated, key=lambda each: each.merit.rank)
    halves = evaluator.halves([models[best.sha256]])
    evaluation = Evaluation(
        dataset=evaluator.real.dataset.manifest.name,
        conditions=evaluator.conditions,
        eval_key=evaluator.conditions.key,
        features=evaluator.real.extractor.about,
        floor=evaluator.floor(halves[-1] if halves else None),
        best=best,
        checkpoints=evaluated,
        preliminary=behind,
        figures=evaluator.measured(halves[0]) if halves else {},
        baselines=evaluator.baselines(),
    )
    sheets = Sheets(
        real=evaluator.real.shown_images,
        drawn=seen | {sha256: model.images[:SHOWN] for sha256, model in models.items()},
        reconstructed={
            sha256: model.reconstructed for sha256, model in models.items() if model.reconstructed is not None
        },
    )
    _write(evaluation, sheets, output)
    write_report(output / "report.html", evaluation, sheets, losses)
    return evaluation


def _write(evaluation: Evaluation, sheets: Sheets, output: Path) -> None:
    grids = {"held_out.png": grid(sheets.real)}
    grids |= {
        f"{each.images:010d}-{each.sha256[:8]}.png": grid(sheets.drawn[each.sha256]) for each in evaluation.checkpoints
    }
    if (back := sheets.reconstructed.get(evaluation.best.sha256)) is not None:
        grids["held_out_reconstructed.png"] = above(sheets.real, back)
    for name, picture in grids.items():
        save_png(output / "grids" / name, picture)
    # Afterwards, and only others: somebody who judges the same at the same time has written these as well.
    for path in (output / "grids").glob("*.png"):
        if path.name not in grids:
            path.unlink(missing_ok=True)
    _write_csv(output / "scores.csv", [{"images": each.images, **each.named()} for each in evaluation.checkpoints])
    # In a file of their own: on a curve nobody would see that they rest on fewer pictures.
    behind = output / "preliminary.csv"
    if evaluation.preliminary:
        _write_csv(behind, [{"images": each.images, **each.merit.named()} for each in evaluation.preliminary])
    else:
        behind.unlink(missing_ok=True)
    write_json(output / "evaluation.json", json.loads(evaluation.model_dump_json()))
    write_json(output / "metrics.json", evaluation.metrics())


def _write_csv(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, table.getvalue().encode())
