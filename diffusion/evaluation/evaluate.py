"""Evaluation of a run's checkpoints: selects the best one and writes its metrics and a report.

With many checkpoints, successive halving evaluates all on few images and fewer and fewer on more.
"""

import csv
import io
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from diffusion.checkpoints import read_model_header
from diffusion.common.errors import UserError
from diffusion.common.files import write_bytes, write_json
from diffusion.common.image_grids import make_grid, make_paired_grid, save_png
from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.shapes import Images
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.evaluator import CACHE, Evaluator
from diffusion.evaluation.gate import GateConfig
from diffusion.evaluation.guidance import choose_guidance
from diffusion.evaluation.real_images import SHOWN
from diffusion.evaluation.reports.evaluation_report import EvaluationPage
from diffusion.evaluation.results import CheckpointEvaluation, Evaluation
from diffusion.generation.super_resolution import task_of
from diffusion.process.samplers import SamplingConfig

logger = logging.getLogger(__name__)
OTHER_VERSION = (
    "%s was trained on another version of data set %s: if ingest.held_out was changed since, some of the held-out "
    "images may be its training images, and its scores too good; train again then"
)
ETA = 4
"""η of successive halving: the factor by which checkpoints get fewer and their images more in each round."""
MIN_COMPARED = 10
"""Fewest images on which checkpoints are compared before an evaluation in full."""


def select_finalists(
    checkpoints: Sequence[Path],
    config: EvaluationConfig,
    compute_batch: int,
    score: Callable[[Path, int], CheckpointEvaluation],
) -> tuple[list[Path], list[CheckpointEvaluation]]:
    """Select the checkpoints to evaluate in full, in any order; also returns the last scores of the others.

    Successive halving (arXiv 1502.07943) by ``score(checkpoint, images)`` and its selection metric, which is unbiased
    for any number of images: while there are more than ``config.finalists``, the better quarter advances, to four times
    as many images, and at last more than those are compared on the first half of ``config.samples``. These are whole
    batches of ``compute_batch`` where that is near, as a part takes as long. Halves of fewer than ``MIN_COMPARED``
    compare nothing: all are evaluated in full then.
    """
    candidates, preliminary = list(checkpoints), list[CheckpointEvaluation]()
    half, quarter = config.samples // 2, max(MIN_COMPARED, math.ceil(config.samples / ETA))
    samples = config.first_samples or _whole_batches(quarter, compute_batch)
    last = _whole_batches(half, compute_batch)
    if (config.first_samples or MIN_COMPARED) > last:
        last = half
    while len(candidates) > config.finalists and last >= MIN_COMPARED:
        samples = last if len(candidates) == config.finalists + 1 else min(samples, last)
        evaluations = [(path, score(path, samples)) for path in candidates]
        evaluations.sort(key=lambda pair: pair[1].selection_metric.rank, reverse=True)
        rest = max(config.finalists + 1, math.ceil(len(candidates) / ETA))
        places = config.finalists if samples == last else rest
        preliminary += [evaluation for _, evaluation in evaluations[places:]]
        candidates = [path for path, _ in evaluations[:places]]
        samples *= ETA
    return candidates, sorted(preliminary, key=lambda evaluation: evaluation.images)


def _whole_batches(samples: int, compute_batch: int) -> int:
    """Return the largest multiple of ``compute_batch`` up to a tenth above ``samples``; these if there is none."""
    return samples * 11 // 10 // compute_batch * compute_batch or samples


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
    progress: Progress = ignore_progress,
    cache: Path | None = None,
    gate: GateConfig = GateConfig(),  # noqa: B008 (frozen)
) -> Evaluation:
    """Evaluate ``checkpoints`` on the held-out images of the data set in folder ``data``.

    All generate the same image numbers of one seed; ``select_finalists`` says which are evaluated in full, the best
    one has the best selection metric, and guidance is chosen for it by ``choose_guidance`` and ``gate``. Expensive
    parts are cached in the folder ``cache``, by default one in ``output``: the same call continues after a kill, and
    generates nothing once it is complete. ``output`` gets ``evaluation.json``, ``metrics.json``, ``scores.csv``,
    ``preliminary.csv`` of those not evaluated in full, grids as PNG, and at last ``report.html``, with the curves of
    ``losses``, a CSV by images seen.

    Raises UserError for a data set that is too small, a file that is not a model, or a model of another image size.
    """
    if not checkpoints:
        raise UserError("no checkpoint to evaluate: train first, with `darkroom train`")
    header = read_model_header(checkpoints[0])
    task = task_of(header.model, header.size)
    evaluator = Evaluator(data, config, sampling, cache or output / CACHE, progress, task)
    generated: dict[str, Images] = {}
    same_version = header.content_digest == evaluator.conditions.content_digest
    if not same_version and header.dataset == evaluator.real.dataset.manifest.name:
        logger.warning(OTHER_VERSION, checkpoints[0], header.dataset)

    def score(path: Path, samples: int) -> CheckpointEvaluation:
        model = evaluator.model(path, samples)
        generated[model.sha256] = model.images[:SHOWN]
        return CheckpointEvaluation(**dict(model.compute_model_scores()), file=str(path))

    finalists, preliminary = select_finalists(checkpoints, config, sampling.compute_batch, score)
    by_sha256 = {each.sha256: each for each in (score(path, config.samples) for path in finalists)}
    evaluations = sorted(by_sha256.values(), key=lambda checkpoint: checkpoint.images)
    best = max(evaluations, key=lambda checkpoint: checkpoint.selection_metric.rank)
    model = evaluator.model(Path(best.file))
    replicates, baseline = evaluator.replicates([model])
    evaluation = Evaluation(
        dataset=evaluator.real.dataset.manifest.name,
        conditions=evaluator.conditions,
        eval_key=evaluator.conditions.key,
        features=evaluator.real.extractor.about,
        real_baseline=evaluator.real_baseline(baseline),
        best=best,
        checkpoints=evaluations,
        preliminary=preliminary,
        estimates=evaluator.estimates(replicates),
        baselines=evaluator.baselines(),
        guidance=choose_guidance(evaluator, model, gate),
    )
    shown = evaluator.real.shown_images, generated, model.captions, model.reconstructed
    _write(EvaluationPage(evaluation, *shown, task.scale, losses, same_version), output)
    return evaluation


def _write(page: EvaluationPage, output: Path) -> None:
    evaluation = page.evaluation
    grids = {REAL_GRID: make_grid(page.real)}
    grids |= {grid_name(model): make_grid(page.generated[model.sha256]) for model in evaluation.checkpoints}
    if page.reconstructed is not None:
        grids["held_out_reconstructed.png"] = make_paired_grid(page.real, page.reconstructed)
    for name, image in grids.items():
        save_png(output / "grids" / name, image)
    # Old grids go last: a concurrent evaluation of the same checkpoints has written the current ones as well.
    for path in (output / "grids").glob("*.png"):
        if path.name not in grids:
            path.unlink(missing_ok=True)
    _write_csv(output / "scores.csv", [{"images": model.images, **model.metrics()} for model in evaluation.checkpoints])
    # In a separate file: on one curve it would not show that they rest on fewer images.
    if preliminary := [
        {"images": model.images, **model.selection_metric.metrics()} for model in evaluation.preliminary
    ]:
        _write_csv(output / "preliminary.csv", preliminary)
    else:
        (output / "preliminary.csv").unlink(missing_ok=True)
    write_json(output / "evaluation.json", json.loads(evaluation.model_dump_json()))
    write_json(output / "metrics.json", evaluation.metrics())
    page.write(output / "report.html")


def _write_csv(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, table.getvalue().encode())
