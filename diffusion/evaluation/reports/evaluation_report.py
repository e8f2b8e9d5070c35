"""HTML report on an evaluation, self-contained."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from diffusion.common.files import write_bytes
from diffusion.common.image_grids import above, beside, blocks, grid, png_bytes
from diffusion.evaluation.estimate import MetricEstimate
from diffusion.evaluation.metrics.distances import Scores
from diffusion.evaluation.metrics.pixel_metrics import TITLES, ResamplingBaseline, describe_baselines, resample
from diffusion.evaluation.reports.charts import charts
from diffusion.evaluation.reports.html import Cell, between, counted, plain, render, signed, with_error
from diffusion.evaluation.results import Evaluation, ModelScores
from diffusion.generation.super_resolution import shrunk

COMPARED = 16
"""Number of images whose upscaled versions are shown side by side."""
SHARES = ("precision", "recall", "density", "coverage")
"""Scores between 0 and about 1, formatted with equal digits."""


@dataclass(frozen=True)
class Sheets:
    """Images of the report."""

    real: Tensor
    """Held-out images, (N, C, H, W) uint8."""
    generated: dict[str, Tensor]
    """First generated images by SHA-256 of the model file."""
    reconstructed: Tensor | None = None
    """Reconstructions of the real images by the best model's autoencoder, if it has one."""


Line = tuple[str, Cell, Cell, str, str]
"""Name of a score, its value, its real baseline, the better direction and an explanation."""


def write_report(path: Path, evaluation: Evaluation, sheets: Sheets, losses: Path | None = None) -> str:
    """Write the page to ``path``; returns its SHA-256. ``losses``: a CSV of losses by ``images`` seen."""
    best, low = sheets.generated[evaluation.best.sha256], evaluation.conditions.low_resolution
    enlarged: dict[str, ModelScores | ResamplingBaseline] = {}
    if evaluation.baselines:
        enlarged = {"the model": evaluation.best}
        enlarged |= {TITLES[name]: each for name, each in evaluation.baselines.items()}
    strip_scale = max(1, round(32 / best.shape[-1]))
    page = render(
        "report.html",
        evaluation=evaluation,
        findings=findings(evaluation),
        lines=score_lines(evaluation),
        generated=png_bytes(grid(best)),
        real=png_bytes(grid(sheets.real)),
        reconstructed=None if sheets.reconstructed is None else png_bytes(above(sheets.real, sheets.reconstructed)),
        shown=len(best),
        charts=charts(evaluation, losses),
        metric=evaluation.best.selection_metric.name,
        enlarged=enlarged,
        compared=low and png_bytes(compared(sheets.real, best, low)),
        strips={sha256: png_bytes(grid(x[:16], 8, 1, strip_scale)) for sha256, x in sheets.generated.items()},
    )
    return write_bytes(path, page)


def findings(evaluation: Evaluation) -> list[str]:
    """Describe the metrics in sentences no stronger than their errors allow."""
    best, baseline = evaluation.best, evaluation.real_baseline.scores
    gap = best.scores.kid - baseline.kid
    error = math.hypot(best.scores.kid_se, baseline.kid_se)
    if gap <= 2 * error:
        said = [f"On {best.scores.samples:,} images its KID cannot be told from that of real ones."]
    else:
        times = f"{gap / error:,.0f} times the standard error"
        said = [f"Its KID lies {plain(gap)} above that of real images, {times}."]
    others = [each for each in evaluation.checkpoints if each.sha256 != best.sha256]
    if others:
        second = min(others, key=lambda each: each.scores.kid)
        error = math.hypot(best.scores.kid_se, second.scores.kid_se)
        lead = second.scores.kid - best.scores.kid
        within = "within" if lead <= 2 * error else "beyond"
        said.append(f"Its lead over the next best ({second.images:,} images) is {within} two standard errors.")
    if evaluation.preliminary:
        fewest = min(each.selection_metric.count for each in evaluation.preliminary)
        said.append(
            f"{counted(len(evaluation.preliminary), 'more checkpoint')} fell behind on fewer images, from "
            f"{fewest:,} on, and {'was' if len(evaluation.preliminary) == 1 else 'were'} not evaluated in full."
        )
    if evaluation.baselines:
        said.append(describe_baselines(best.scores, evaluation.baselines))
    return said


def compared(real: Tensor, generated: Tensor, low_resolution: int) -> Image.Image:
    """Arrange each held-out image small, upscaled by bicubic interpolation and by a model, and at full size."""
    images, size = real[:COMPARED], real.shape[-1]
    small = shrunk(images, low_resolution)
    bicubic = resample(small, size // low_resolution, "bicubic")
    return grid(beside(blocks(small, size), bicubic, generated[:COMPARED], images), columns=8)


MEANINGS = {
    "kid": ("lower", "Unbiased at any number of images: the one to go by."),
    "fd": ("lower", "Grows as images get fewer: means something only beside its real baseline."),
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


def score_lines(evaluation: Evaluation) -> list[Line]:
    """Return the rows of the table of scores; real images lose nothing on the way through an autoencoder."""
    best, baseline = evaluation.best.scores, evaluation.real_baseline
    lines = [
        (
            f"{name}_{best.extractor}",
            _score(best, name, evaluation.estimates),
            _score(baseline.scores, name, baseline.estimates),
            better,
            meaning,
        )
        for name, (better, meaning) in MEANINGS.items()
        if getattr(best, name) is not None
    ]
    if (found := evaluation.best.reconstruction) is not None:
        ratio, structure = Cell(f"{found.psnr:.2f} ± {found.psnr_se:.2f} dB"), Cell(f"{found.ssim:.3f}")
        meaning = "How close held-out images come back from the autoencoder, pixel by pixel."
        lines.append(("reconstruction_psnr", ratio, Cell(), "higher", meaning))
        meaning = "The same by what the eye sees of structure."
        lines.append(("reconstruction_ssim", structure, Cell("1"), "higher", meaning))
        name, meaning = f"reconstruction_fd_{found.extractor}", "What they lose on the way of what is seen."
        lines.append((name, Cell(plain(found.fd)), Cell("0"), "lower", meaning))
    return lines


def _score(scores: Scores, name: str, estimates: Mapping[str, MetricEstimate]) -> Cell:
    """Return the cell of a score, with the interval of its metric or else KID's error where they are known."""
    value, estimate = getattr(scores, name), estimates.get(f"{name}_{scores.extractor}")
    if value is None:
        return Cell()
    if name == "kid" and not estimates:
        return Cell(with_error(value, scores.kid_se))
    text = f"{value:.3f}" if name in SHARES else signed(value)
    return Cell(text, between(estimate.interval) if estimate else "")
