"""Evaluation of a run's checkpoints: selects the best one and writes its metrics and a report.

With many checkpoints, successive halving evaluates all on few images and fewer and fewer on more.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from diffusion.checkpoints import read_model_header
from diffusion.common.errors import UserError
from diffusion.common.files import write_bytes, write_json
from diffusion.common.image_grids import above, grid, save_png
from diffusion.common.progress import Progress, silent
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.evaluator import CACHE, Evaluator
from diffusion.evaluation.real_images import SHOWN
from diffusion.evaluation.reports.evaluation_report import Sheets, write_report
from diffusion.evaluation.results import CheckpointEvaluation, Evaluation
from diffusion.generation.super_resolution import task_of
from diffusion.process.samplers import SamplingConfig

ETA = 4
"""η of successive halving: the share of checkpoints that goes on falls by it as the number of images grows by it, so
that every round generates about as many images as the one before."""


def select_finalists(
    checkpoints: Sequence[Path], config: EvaluationConfig, score: Callable[[Path, int], CheckpointEvaluation]
) -> tuple[list[Path], list[CheckpointEvaluation]]:
    """Select the checkpoints to evaluate in full, in their order; also returns the last scores of the others.

    Successive halving (arXiv 1502.07943): while there are more than ``config.finalists`` and images are fewer than
    ``config.samples``, all are scored by ``score(checkpoint, images)``, and the better quarter by the selection metric
    advances; of the last round only the finalists. The selection metric, KID or PSNR, is unbiased for any number of
    images.
    """
    left, behind = list(checkpoints), list[CheckpointEvaluation]()
    samples = config.first_samples or max(10, math.ceil(config.samples / 4))
    while len(left) > config.finalists and samples < config.samples:
        scored = [(path, score(path, samples)) for path in left]
        scored.sort(key=lambda pair: pair[1].selection_metric.rank, reverse=True)
        is_last = samples * ETA >= config.samples
        places = config.finalists if is_last else max(config.finalists, math.ceil(len(left) / ETA))
        going_on = {path for path, _ in scored[:places]}
        left = [path for path in left if path in going_on]
        behind += [each for _, each in scored[places:]]
        samples *= ETA
    return left, sorted(behind, key=lambda each: each.images)


REAL_GRID = "held_out.png"
"""File name of the grid of real images."""


def grid_name(checkpoint: CheckpointEvaluation) -> str:
    """Return the file name of a checkpoint's sample grid in the folder ``grids`` of an evaluation."""
    return f"{checkpoint.images:010d}-{checkpoint.sha256[:8]}.png"


def evaluate(
    data: Path,
    checkpoints: Sequence[Path],
    config: EvaluationConfig,
    sampling: SamplingConfig,
    output: Path,
    losses: Path | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Evaluate ``checkpoints`` on the held-out images of the data set in folder ``data``.

    All generate the same image numbers of the same seed; the best one has the best selection metric. Of more than
    ``config.finalists`` only the leading ones are evaluated in full, as shorter rounds select them. Expensive parts are
    cached in ``output``: the same call continues after a kill, and generates nothing once it is complete.

    Args:
        data: Folder of the data set.
        checkpoints: Model files.
        config: What to generate and to compare with.
        sampling: How to generate.
        output: Folder of ``evaluation.json``, ``metrics.json``, ``scores.csv``, if there were rounds
            ``preliminary.csv`` of those that fell behind, grids as PNG, and at last ``report.html``.
        losses: The CSV of losses by images seen that training left, for the report.
        progress: Called as the work proceeds.

    Raises:
        UserError: For a data set too small, or a file that is no model or one of another image size.
    """
    if not checkpoints:
        raise UserError("no checkpoint to evaluate: train first, with `darkroom train`")
    task = task_of(read_model_header(checkpoints[0]).model)
    evaluator = Evaluator(data, config, sampling, output / CACHE, progress, task)
    generated: dict[str, Tensor] = {}

    def score(path: Path, samples: int) -> CheckpointEvaluation:
        model = evaluator.model(path, samples)
        generated[model.sha256] = model.images[:SHOWN]
        return model.checkpoint()

    chosen, behind = select_finalists(checkpoints, config, score)
    scored = {each.sha256: each for each in (score(path, config.samples) for path in chosen)}
    evaluated = sorted(scored.values(), key=lambda each: each.images)
    best = max(evaluated, key=lambda each: each.selection_metric.rank)
    model = evaluator.model(Path(best.file))
    of_best, baseline = evaluator.replicates([model])
    evaluation = Evaluation(
        dataset=evaluator.real.dataset.manifest.name,
        conditions=evaluator.conditions,
        eval_key=evaluator.conditions.key,
        features=evaluator.real.extractor.about,
        real_baseline=evaluator.real_baseline(baseline),
        best=best,
        checkpoints=evaluated,
        preliminary=behind,
        estimates=evaluator.estimates(of_best),
        baselines=evaluator.baselines(),
    )
    sheets = Sheets(evaluator.real.shown_images, generated, model.reconstructed)
    _write(evaluation, sheets, output)
    write_report(output / "report.html", evaluation, sheets, losses)
    return evaluation


def _write(evaluation: Evaluation, sheets: Sheets, output: Path) -> None:
    grids = {REAL_GRID: grid(sheets.real)}
    grids |= {grid_name(each): grid(sheets.generated[each.sha256]) for each in evaluation.checkpoints}
    if sheets.reconstructed is not None:
        grids["held_out_reconstructed.png"] = above(sheets.real, sheets.reconstructed)
    for name, image in grids.items():
        save_png(output / "grids" / name, image)
    # Old grids go last: a concurrent evaluation of the same checkpoints has written the current ones as well.
    for path in (output / "grids").glob("*.png"):
        if path.name not in grids:
            path.unlink(missing_ok=True)
    _write_csv(output / "scores.csv", [{"images": each.images, **each.metrics()} for each in evaluation.checkpoints])
    # In a separate file: on one curve it would not show that they rest on fewer images.
    preliminary = [{"images": each.images, **each.selection_metric.metrics()} for each in evaluation.preliminary]
    if preliminary:
        _write_csv(output / "preliminary.csv", preliminary)
    else:
        (output / "preliminary.csv").unlink(missing_ok=True)
    write_json(output / "evaluation.json", json.loads(evaluation.model_dump_json()))
    write_json(output / "metrics.json", evaluation.metrics())


def _write_csv(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, table.getvalue().encode())
