"""HTML report on an evaluation, self-contained."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from diffusion.common.files import write_bytes
from diffusion.common.image_grids import above, beside, blocks, grid, png_bytes
from diffusion.evaluation.metrics.distances import Scores
from diffusion.evaluation.metrics.pixel_metrics import TITLES, ResamplingBaseline, describe_baselines, resample
from diffusion.evaluation.reports.charts import charts
from diffusion.evaluation.reports.html import between, counted, plain, render, signed, with_error
from diffusion.evaluation.results import Evaluation, MetricEstimate, RealBaseline, Reconstruction
from diffusion.generation.super_resolution import shrunk

COMPARED = 16
"""Number of images whose upscaled versions are shown side by side."""
SHARES = ("precision", "recall", "density", "coverage")
"""Scores between 0 and about 1, formatted with equal digits."""
STRIP = 16
"""Number of images per checkpoint in the table of checkpoints."""


@dataclass(frozen=True)
class Sheets:
    """Images of the report."""

    real: Tensor
    """Held-out images, (N, C, H, W) uint8."""
    generated: dict[str, Tensor]
    """First generated images by SHA-256 of the model file."""
    reconstructed: dict[str, Tensor] = field(default_factory=dict)
    """Reconstructions of the real images by its autoencoder, if it has one."""


@dataclass(frozen=True)
class Line:
    """A line of the table of scores."""

    name: str
    value: str
    real_baseline: str
    better: str
    meaning: str
    interval: str = ""
    """Interval of the true value, if known."""
    real_baseline_interval: str = ""


def write_report(path: Path, evaluation: Evaluation, sheets: Sheets, losses: Path | None = None) -> str:
    """Write the page to ``path``; returns its SHA-256. ``losses``: a CSV of losses by ``images`` seen."""
    best, low = sheets.generated[evaluation.best.sha256], evaluation.conditions.low_resolution
    back = sheets.reconstructed.get(evaluation.best.sha256)
    page = render(
        "report.html",
        evaluation=evaluation,
        findings=findings(evaluation),
        lines=score_lines(evaluation.best.scores, evaluation.estimates, evaluation.real_baseline)
        + reconstruction_lines(evaluation.best.reconstruction),
        generated=png_bytes(grid(best)),
        real=png_bytes(grid(sheets.real)),
        reconstructed=None if back is None else png_bytes(above(sheets.real, back)),
        shown=len(best),
        charts=charts(evaluation, losses),
        metric=evaluation.best.selection_metric.name,
        enlarged=enlarged_lines(evaluation),
        compared=low and png_bytes(compared(sheets.real, best, low)),
        strips={sha256: png_bytes(_strip(generated)) for sha256, generated in sheets.generated.items()},
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


def enlarged_lines(evaluation: Evaluation) -> list[tuple[str, str, str, str]]:
    """Return the rows of the table of super-resolution: name, Fréchet distance, PSNR and SSIM; otherwise empty."""
    if evaluation.baselines is None or evaluation.best.similarity is None:
        return []
    ours = ResamplingBaseline(scores=evaluation.best.scores, similarity=evaluation.best.similarity)
    named = {"the model": ours} | {TITLES[name]: each for name, each in evaluation.baselines.items()}
    return [
        (name, plain(each.scores.fd), f"{each.similarity.psnr:.2f} dB", f"{each.similarity.ssim:.3f}")
        for name, each in named.items()
    ]


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


def score_lines(scores: Scores, figures: Mapping[str, MetricEstimate], real_baseline: RealBaseline) -> list[Line]:
    """Return the rows of the table of scores: each beside its real baseline, with intervals where available."""
    return [
        Line(
            f"{name}_{scores.extractor}",
            _score(scores, name, figures),
            _score(real_baseline.scores, name, real_baseline.estimates),
            better,
            meaning,
            interval_of(figures, f"{name}_{scores.extractor}"),
            interval_of(real_baseline.estimates, f"{name}_{scores.extractor}"),
        )
        for name, (better, meaning) in MEANINGS.items()
        if getattr(scores, name) is not None
    ]


def interval_of(figures: Mapping[str, MetricEstimate], name: str) -> str:
    """Format the 95 % interval of a metric, such as ``0.012 … 0.034``; empty if there is none."""
    return between(figures[name].interval) if name in figures else ""


def _score(scores: Scores, name: str, figures: Mapping[str, MetricEstimate]) -> str:
    value: float | None = getattr(scores, name)
    if value is None:
        return ""
    if name == "kid" and not figures:
        return with_error(value, scores.kid_se)
    return f"{value:.3f}" if name in SHARES else signed(value)


def reconstruction_lines(found: Reconstruction | None) -> list[Line]:
    """Return the rows of the table for an autoencoder's loss; real images lose nothing."""
    if found is None:
        return []
    return [
        Line(
            "reconstruction_psnr",
            f"{found.psnr:.2f} ± {found.psnr_se:.2f} dB",
            "",
            "higher",
            "How close held-out images come back from the autoencoder, pixel by pixel.",
        ),
        Line(
            "reconstruction_ssim",
            f"{found.ssim:.3f}",
            "1",
            "higher",
            "The same by what the eye sees of structure.",
        ),
        Line(
            f"reconstruction_fd_{found.extractor}",
            plain(found.fd),
            "0",
            "lower",
            "What they lose on the way of what is seen.",
        ),
    ]


def _strip(generated: Tensor) -> Image.Image:
    return grid(generated[:STRIP], columns=8, pad=1, scale=max(1, round(32 / generated.shape[-1])))
