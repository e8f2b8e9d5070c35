"""HTML report on an evaluation: which checkpoint is best, its scores, and how they came about."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffusion.common.escaping import pluralize
from diffusion.common.files import write_bytes
from diffusion.common.image_grids import interleave_images, make_grid, make_paired_grid, png_bytes, repeat_pixels
from diffusion.common.shapes import Images
from diffusion.evaluation.estimate import MetricEstimate
from diffusion.evaluation.guidance import describe_guidance
from diffusion.evaluation.metrics import load_figures
from diffusion.evaluation.metrics.pixel_metrics import TITLES, ResamplingBaseline, describe_baselines, resample
from diffusion.evaluation.metrics.scores import Scores
from diffusion.evaluation.metrics.text_image_agreement import TextImageAgreement, describe_agreement
from diffusion.evaluation.reports.charts import charts
from diffusion.evaluation.reports.html import (
    Cell,
    Sections,
    count_decimals,
    format_fixed,
    format_interval,
    format_plain,
    format_signed,
    format_with_error,
    make_sheet,
    render_page,
)
from diffusion.evaluation.results import Evaluation, ModelEvaluation, ModelScores, RealBaseline
from diffusion.generation.super_resolution import shrink_images

COMPARED = 16
"""Number of images whose upscaled versions are shown side by side."""


@dataclass(frozen=True)
class EvaluationPage:
    """What the report shows."""

    evaluation: Evaluation
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
    losses: Path | None = None
    """CSV of losses by ``images`` seen."""
    same_version: bool = True
    """Whether training had this version of the data set."""

    @property
    def best_images(self) -> Images:
        """Return the first images of the best checkpoint."""
        return self.generated[self.evaluation.best.sha256]

    def write(self, path: Path) -> str:
        """Write the HTML report to ``path``, whole; returns its SHA-256."""
        return write_bytes(path, render_page("report", SECTIONS, self, findings=findings(self.evaluation)))


def _enlargements(page: EvaluationPage) -> dict[str, object] | None:
    """Compare a super-resolution model with interpolation."""
    if not page.evaluation.baselines:
        return None
    rows: dict[str, ModelScores | ResamplingBaseline] = {"the model": page.evaluation.best}
    rows |= {TITLES[name]: baseline for name, baseline in page.evaluation.baselines.items()}
    images, scale = page.real[:COMPARED], page.scale
    small_images = [shrink_images(image[None], scale)[0] for image in images]
    bicubic = [resample(image[None], scale, "bicubic")[0] for image in small_images]
    columns = repeat_pixels(small_images, scale), bicubic, page.best_images[:COMPARED], images
    return {"enlargements": rows, "compared": png_bytes(make_grid(interleave_images(*columns), columns=8))}


def _images(page: EvaluationPage) -> dict[str, object]:
    images, seed = page.best_images, page.evaluation.conditions.evaluation.seed
    note = f"the first {len(images)} of seed {seed}, not selected"
    sheet = make_sheet("the best checkpoint", note, images, page.captions)
    return {"heading": "Images", "sheets": [sheet], "real": png_bytes(make_grid(page.real)), "images_note": None}


def _shapes(page: EvaluationPage) -> dict[str, object] | None:
    per_shape = page.evaluation.best.per_shape
    return {"shapes": per_shape.shapes, "champion_shapes": []} if per_shape else None


def _reconstructions(page: EvaluationPage) -> dict[str, object] | None:
    if page.reconstructed is None:
        return None
    return {"reconstructed": png_bytes(make_paired_grid(page.real, page.reconstructed))}


def _checkpoints(page: EvaluationPage) -> dict[str, object]:
    """Show the same images of each checkpoint."""
    scale = max(1, round(32 / max(image.shape[-1] for image in page.best_images)))
    generated = page.generated.items()
    return {"strips": {sha256: png_bytes(make_grid(images[:16], 8, 1, scale)) for sha256, images in generated}}


SECTIONS: Sections[EvaluationPage] = {
    "scores": lambda page: {"lines": score_lines(page.evaluation)},
    "shapes": _shapes,
    "guidance": lambda page: {} if page.evaluation.guidance else None,
    "enlargements": _enlargements,
    "images": _images,
    "reconstructions": _reconstructions,
    "over_training": lambda page: {"charts": charts(page.evaluation, page.losses)},
    "checkpoints": _checkpoints,
    "conditions": lambda page: {},
}
"""Sections in order, each with a template in ``templates/report``, or one that pages share in ``templates``."""


def describe_kid(
    evaluation: Evaluation, candidate: ModelEvaluation | None = None, real: RealBaseline | None = None
) -> str:
    """Describe the KID of the best checkpoint, with its 95 % interval if there is one, and of real images.

    It is without the guidance that was chosen, if any was: see ``choose_guidance``. With ``candidate`` it is the KID of
    that model, as the gate compared it beside the baseline ``real``: with its guidance, on other images.
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
    models = [*evaluation.checkpoints, *evaluation.preliminary]
    last_images = max(model.images for model in models)
    earlier_scores = min(
        (model for model in models if model.images >= last_images / 2), key=lambda model: model.images
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
    models = [*evaluation.checkpoints, *evaluation.preliminary]
    if others := [model for model in models if model.sha256 != best.sha256]:
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


def score_lines(evaluation: Evaluation) -> list[tuple[str, Cell, Cell, str, str]]:
    """Return name, value, real baseline, better direction and explanation of each score."""
    best, baseline = evaluation.best.scores, evaluation.real_baseline
    lines = [
        (
            f"{name}_{best.extractor}",
            score_cell(best, name, evaluation.estimates),
            score_cell(baseline.scores, name, baseline.estimates),
            figure.direction,
            figure.reading,
        )
        for name, figure in load_figures().items()
        if figure.reading is not None and best.find(name) is not None
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
            "Mean cosine of an image's and its prompt's embeddings; beside it the same of held-out images and their "
            f"captions. With the prompts of others it is {agreement.shuffled:.3f}, which is chance."
        )
        lines.append((f"text_image_agreement_{agreement.encoder}", value, real, "higher", meaning))
    elif agreement is not None:
        lines.append(("text_image_agreement", Cell("not measured"), Cell(), "higher", f"To measure it, {agreement}."))
    return lines


def score_cell(scores: Scores, name: str, estimates: Mapping[str, MetricEstimate]) -> Cell:
    """Return the cell of a figure, with its interval or else KID's error where they are known."""
    value, estimate = scores.find(name), estimates.get(f"{name}_{scores.extractor}")
    if value is None:
        return Cell()
    if name == "kid" and not estimates:
        return Cell(format_with_error(value, scores.kid_se))
    # Shares of images have equal digits.
    is_share = load_figures()[name].interval not in ("distance", None)
    return Cell(
        f"{value:.3f}" if is_share else format_signed(value), format_interval(estimate.interval) if estimate else ""
    )
