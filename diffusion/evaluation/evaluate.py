"""Evaluation of a run's checkpoints: selects the best one and writes its metrics and a report.

With many checkpoints, successive halving evaluates all on few images and fewer and fewer on more.
"""

import csv
import io
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffusion.checkpoints import read_model_header
from diffusion.common.errors import UserError
from diffusion.common.escaping import pluralize
from diffusion.common.files import write_bytes, write_json
from diffusion.common.image_grids import (
    interleave_images,
    make_captioned_grid,
    make_grid,
    make_paired_grid,
    png_bytes,
    repeat_pixels,
    save_png,
)
from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.shapes import Images
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.estimate import MetricEstimate
from diffusion.evaluation.evaluator import CACHE, Evaluator
from diffusion.evaluation.gate import GateConfig
from diffusion.evaluation.guidance import choose_guidance, describe_guidance
from diffusion.evaluation.metrics.distances import Scores
from diffusion.evaluation.metrics.pixel_metrics import TITLES, ResamplingBaseline, describe_baselines, resample
from diffusion.evaluation.metrics.text_image_agreement import TextImageAgreement, describe_agreement
from diffusion.evaluation.real_images import SHOWN
from diffusion.evaluation.reports.charts import charts
from diffusion.evaluation.reports.html import (
    Cell,
    caption_images,
    count_decimals,
    format_fixed,
    format_interval,
    format_plain,
    format_signed,
    format_with_error,
    metric_cell,
    render,
)
from diffusion.evaluation.results import (
    CheckpointEvaluation,
    Evaluation,
    ModelEvaluation,
    ModelScores,
    RealBaseline,
)
from diffusion.generation.super_resolution import shrink_images, task_of
from diffusion.process.samplers import SamplingConfig

logger = logging.getLogger(__name__)
ETA = 4
"""η of successive halving: the factor by which checkpoints get fewer and their images more in each round."""


def select_finalists(
    checkpoints: Sequence[Path], config: EvaluationConfig, score: Callable[[Path, int], CheckpointEvaluation]
) -> tuple[list[Path], list[CheckpointEvaluation]]:
    """Select the checkpoints to evaluate in full, in their order; also returns the last scores of the others.

    Successive halving (arXiv 1502.07943): while there are more than ``config.finalists`` and images are fewer than
    ``config.samples``, all are scored by ``score(checkpoint, images)``, and the better quarter by the selection metric,
    which is unbiased for any number of images, advances; of the last round only the finalists.
    """
    candidates, preliminary = list(checkpoints), list[CheckpointEvaluation]()
    samples = config.first_samples or max(10, math.ceil(config.samples / 4))
    while len(candidates) > config.finalists and samples < config.samples:
        evaluations = [(path, score(path, samples)) for path in candidates]
        evaluations.sort(key=lambda pair: pair[1].selection_metric.rank, reverse=True)
        is_last = samples * ETA >= config.samples
        places = config.finalists if is_last else max(config.finalists, math.ceil(len(candidates) / ETA))
        survivors = {path for path, _ in evaluations[:places]}
        candidates = [path for path in candidates if path in survivors]
        preliminary += [evaluation for _, evaluation in evaluations[places:]]
        samples *= ETA
    return candidates, sorted(preliminary, key=lambda evaluation: evaluation.images)


REAL_GRID = "held_out.png"
"""File name of the grid of real images."""


def grid_name(checkpoint: CheckpointEvaluation) -> str:
    """Return the file name of a checkpoint's sample grid in the folder ``grids`` of an evaluation."""
    return f"{checkpoint.images:010d}-{checkpoint.sha256[:8]}.png"


@dataclass(frozen=True)
class ReportImages:
    """Images of the report."""

    real: Images
    """Held-out images, each (C, H, W) uint8."""
    generated: dict[str, Images]
    """First generated images by SHA-256 of the model file."""
    captions: list[str] = field(default_factory=list)
    """Prompt or class of each image of the best model; empty if they have none."""
    reconstructed: Images | None = None
    """Reconstructions of the real images by the best model's autoencoder, if it has one."""
    scale: int = 1
    """Factor of super-resolution."""


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

    All generate the same image numbers of the same seed; the best one has the best selection metric. Of more than
    ``config.finalists`` only the leading ones are evaluated in full, as shorter rounds select them. For the best one
    guidance is chosen that ``gate`` will not object to: see ``choose_guidance``. Expensive parts are
    cached in the folder ``cache``, by default one in ``output``: the same call continues after a kill, and generates
    nothing once it is complete. ``output`` gets ``evaluation.json``, ``metrics.json``, ``scores.csv``, if there were
    rounds ``preliminary.csv`` of those that fell behind, grids as PNG, and at last ``report.html``, with ``losses``:
    the CSV by images seen that training left.

    Raises UserError for a data set too small, or a file that is no model or one of another image size.
    """
    if not checkpoints:
        raise UserError("no checkpoint to evaluate: train first, with `darkroom train`")
    header = read_model_header(checkpoints[0])
    task = task_of(header.model, header.size)
    evaluator = Evaluator(data, config, sampling, cache or output / CACHE, progress, task)
    generated_images: dict[str, Images] = {}
    same_version = header.content_digest == evaluator.conditions.content_digest
    if not same_version and header.dataset == evaluator.real.dataset.manifest.name:
        logger.warning(
            "%s was trained on another version of data set %s: if ingest.held_out was changed since, some of the "
            "held-out images may be its training images, and its scores too good; train again then",
            checkpoints[0],
            evaluator.real.dataset.manifest.name,
        )

    def score(path: Path, samples: int) -> CheckpointEvaluation:
        model = evaluator.model(path, samples)
        generated_images[model.sha256] = model.images[:SHOWN]
        return CheckpointEvaluation(**dict(model.compute_model_scores()), file=str(path))

    finalists, preliminary = select_finalists(checkpoints, config, score)
    by_sha256 = {checkpoint.sha256: checkpoint for checkpoint in (score(path, config.samples) for path in finalists)}
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
    sheets = ReportImages(
        evaluator.real.shown_images, generated_images, model.captions, model.reconstructed, task.scale
    )
    _write(evaluation, sheets, output)
    write_report(output / "report.html", evaluation, sheets, losses, same_version)
    return evaluation


def _write(evaluation: Evaluation, sheets: ReportImages, output: Path) -> None:
    grids = {REAL_GRID: make_grid(sheets.real)}
    grids |= {grid_name(model): make_grid(sheets.generated[model.sha256]) for model in evaluation.checkpoints}
    if sheets.reconstructed is not None:
        grids["held_out_reconstructed.png"] = make_paired_grid(sheets.real, sheets.reconstructed)
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


def _write_csv(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, table.getvalue().encode())


COMPARED = 16
"""Number of images whose upscaled versions are shown side by side."""
SHARES = ("precision", "recall", "density", "coverage")
"""Scores between 0 and about 1, formatted with equal digits."""


def write_report(
    path: Path, evaluation: Evaluation, sheets: ReportImages, losses: Path | None = None, same_version: bool = True
) -> str:
    """Write the HTML report to ``path``; returns its SHA-256.

    ``losses``: a CSV of losses by ``images`` seen. ``same_version``: whether training had this version of the data set.
    """
    best, low = sheets.generated[evaluation.best.sha256], evaluation.conditions.low_resolution
    scores: dict[str, ModelScores | ResamplingBaseline] = {}
    if evaluation.baselines:
        scores = {"the model": evaluation.best}
        scores |= {TITLES[name]: baseline for name, baseline in evaluation.baselines.items()}
    comparison = None
    if low:
        images, scale = sheets.real[:COMPARED], sheets.scale
        small_images = [shrink_images(image[None], scale)[0] for image in images]
        bicubic = [resample(image[None], scale, "bicubic")[0] for image in small_images]
        comparison = png_bytes(
            make_grid(
                interleave_images(repeat_pixels(small_images, scale), bicubic, best[:COMPARED], images), columns=8
            )
        )
    strip_scale = max(1, round(32 / max(image.shape[-1] for image in best)))
    page = render(
        "report.html",
        evaluation=evaluation,
        same_version=same_version,
        findings=findings(evaluation),
        lines=score_lines(evaluation),
        generated=png_bytes(make_captioned_grid(best, sheets.captions) if sheets.captions else make_grid(best)),
        samples=caption_images(best, sheets.captions),
        real=png_bytes(make_grid(sheets.real)),
        reconstructed=None
        if sheets.reconstructed is None
        else png_bytes(make_paired_grid(sheets.real, sheets.reconstructed)),
        shown=len(best),
        charts=charts(evaluation, losses),
        metric=evaluation.best.selection_metric.name,
        enlargements=scores,
        compared=comparison,
        metric_cell=metric_cell,
        strips={sha256: png_bytes(make_grid(x[:16], 8, 1, strip_scale)) for sha256, x in sheets.generated.items()},
    )
    return write_bytes(path, page)


def describe_kid(
    evaluation: Evaluation, candidate: ModelEvaluation | None = None, real: RealBaseline | None = None
) -> str:
    """Describe the best checkpoint's KID, with its 95 % interval if there is one, beside that of real images.

    It is without the guidance that was chosen, if any was: see ``choose_guidance``. With ``candidate`` it is the KID of
    that model, as the gate compared it beside the baseline ``real``: with its guidance, and of another seed.
    """
    scores, baseline = (candidate or evaluation.best).scores, (real or evaluation.real_baseline).scores
    estimate = (candidate or evaluation).estimates.get(f"kid_{scores.extractor}")
    if estimate is None:
        return f"KID {format_with_error(scores.kid, scores.kid_se)}; real images {format_signed(baseline.kid)}"
    is_unguided = candidate is None and evaluation.guidance and evaluation.sampling.is_guided
    unguided = ", without guidance" if is_unguided else ""
    digits = count_decimals(estimate.interval.high - estimate.interval.low)
    kid, low, high, real_kid = (
        format_fixed(value, digits)
        for value in (estimate.value, estimate.interval.low, estimate.interval.high, baseline.kid)
    )
    return f"KID {kid} [{low}, {high}]{unguided}; real images {real_kid}"


def advise_longer(evaluation: Evaluation) -> str | None:
    """Advise a longer training if the last checkpoint is the best and KID was still falling; None if not, or unknown.

    Falling is: in the second half of the training, surely (by two standard errors) and by a tenth or more of what
    separates it from real images.
    """
    best, baseline = evaluation.best, evaluation.real_baseline.scores
    last_images = max(model.images for model in evaluation.checkpoints)
    earlier_scores = min(
        (model for model in evaluation.checkpoints if model.images >= last_images / 2), key=lambda model: model.images
    ).scores
    fall = earlier_scores.kid - best.scores.kid
    is_sure = fall > 2 * math.hypot(earlier_scores.kid_se, best.scores.kid_se)
    if (
        best.images < last_images
        or best.selection_metric.sign > 0
        or not is_sure
        or 10 * fall < best.scores.kid - baseline.kid
    ):
        return None
    return (
        f"KID was still falling at the end, from {format_signed(earlier_scores.kid)} to "
        f"{format_signed(best.scores.kid)}: more training.images, or training.minutes, would give better images"
    )


def findings(evaluation: Evaluation) -> list[str]:
    """Describe the metrics in sentences no stronger than their errors allow."""
    best, baseline = evaluation.best, evaluation.real_baseline.scores
    lines = [f"{describe_kid(evaluation)}."]
    if best.scores.kid - baseline.kid <= 2 * math.hypot(best.scores.kid_se, baseline.kid_se):
        lines.append(f"On {best.scores.samples:,} images that cannot be told from real ones.")
    if (agreement := best.text_image_agreement) is not None:
        lines.append(f"T{describe_agreement(agreement)[1:]}.")
    if (words := advise_longer(evaluation)) is not None:
        lines.append(f"{words}.")
    if others := [model for model in evaluation.checkpoints if model.sha256 != best.sha256]:
        runner_up = min(others, key=lambda model: model.scores.kid)
        error = math.hypot(best.scores.kid_se, runner_up.scores.kid_se)
        relation = "within" if runner_up.scores.kid - best.scores.kid <= 2 * error else "beyond"
        lines.append(f"Its lead over the next best ({runner_up.images:,} images) is {relation} two standard errors.")
    if evaluation.preliminary:
        min_images = min(model.selection_metric.count for model in evaluation.preliminary)
        lines.append(
            f"{pluralize(len(evaluation.preliminary), 'more checkpoint')} fell behind on fewer images, from "
            f"{min_images:,} on, and {'was' if len(evaluation.preliminary) == 1 else 'were'} not evaluated in full."
        )
    if evaluation.guidance is not None:
        lines.append(describe_guidance(evaluation.guidance))
    if evaluation.baselines:
        lines.append(describe_baselines(best.scores, evaluation.baselines))
    return lines


MEANINGS = {
    "kid": ("lower", "Unbiased at any number of images: the one to go by."),
    "fd": ("lower", "Grows as images get fewer: means something only beside its real-vs-real baseline."),
    "fd_infinity": ("lower", "The same as it would be of endlessly many images."),
    "precision": ("higher", "Share of generated images that lie among real ones: fidelity."),
    "recall": ("higher", "Share of real images that lie among generated ones: variety."),
    "density": (
        "higher",
        "How many real ones a generated one lies among, of real ones about 1: fidelity, robustly.",
    ),
    "coverage": ("higher", "Share of real images that have a generated one near them: variety, robustly."),
}
"""Direction and explanation of each score."""


def score_lines(evaluation: Evaluation) -> list[tuple[str, Cell, Cell, str, str]]:
    """Return name, value, real baseline, better direction and explanation of each score."""
    best, baseline = evaluation.best.scores, evaluation.real_baseline
    lines = [
        (
            f"{name}_{best.extractor}",
            score_cell(best, name, evaluation.estimates),
            score_cell(baseline.scores, name, baseline.estimates),
            direction,
            meaning,
        )
        for name, (direction, meaning) in MEANINGS.items()
        if getattr(best, name) is not None
    ]
    if (quality := evaluation.best.reconstruction) is not None:
        ratio, structure = Cell(f"{quality.psnr:.2f} ± {quality.psnr_se:.2f} dB"), Cell(f"{quality.ssim:.3f}")
        meaning = "How close held-out images come back from the autoencoder, pixel by pixel."
        lines.append(("reconstruction_psnr", ratio, Cell(), "higher", meaning))
        meaning = "The same by what the eye sees of structure."
        lines.append(("reconstruction_ssim", structure, Cell("1"), "higher", meaning))
        name, meaning = f"reconstruction_fd_{quality.extractor}", "What they lose on the way of what is seen."
        lines.append((name, Cell(format_plain(quality.fd)), Cell("0"), "lower", meaning))
    if isinstance(agreement := evaluation.best.text_image_agreement, TextImageAgreement):
        value, real = (
            Cell(f"{mean.value:.3f}", format_interval(mean.interval)) for mean in (agreement.agreement, agreement.real)
        )
        meaning = (
            "Mean cosine of an image's and its prompt's embeddings; beside it that of held-out images and their "
            f"captions. With the prompts of others it is {agreement.shuffled:.3f}, which is chance."
        )
        lines.append((f"text_image_agreement_{agreement.encoder}", value, real, "higher", meaning))
    elif agreement is not None:
        lines.append(("text_image_agreement", Cell("not measured"), Cell(), "higher", f"To measure it, {agreement}."))
    return lines


def score_cell(scores: Scores, name: str, estimates: Mapping[str, MetricEstimate]) -> Cell:
    """Return the cell of a score, with the interval of its metric or else KID's error where they are known."""
    value, estimate = getattr(scores, name), estimates.get(f"{name}_{scores.extractor}")
    if value is None:
        return Cell()
    if name == "kid" and not estimates:
        return Cell(format_with_error(value, scores.kid_se))
    return Cell(
        f"{value:.3f}" if name in SHARES else format_signed(value),
        format_interval(estimate.interval) if estimate else "",
    )
