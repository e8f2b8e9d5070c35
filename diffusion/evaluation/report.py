"""An evaluation as one HTML page that needs nothing but itself."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from diffusion.evaluation.charts import charts
from diffusion.evaluation.enlargement import TITLES, Enlarged, resampled, verdict
from diffusion.evaluation.metrics import Scores
from diffusion.evaluation.pages import between, counted, plain, render, signed, with_error
from diffusion.evaluation.results import Evaluation, Floor, Measured, Reconstruction
from diffusion.files import write_bytes
from diffusion.grids import above, beside, blocks, grid, png_bytes
from diffusion.upscaling import shrunk

COMPARED = 16
"""Pictures whose enlargements stand side by side."""
SHARES = ("precision", "recall", "density", "coverage")
"""Scores near 1, with as many digits each."""
STRIP = 16
"""Pictures of each checkpoint in the table of all."""


@dataclass(frozen=True)
class Sheets:
    """Pictures to be shown."""

    real: Tensor
    """Held-out ones, (N, C, H, W) uint8."""
    drawn: dict[str, Tensor]
    """Per SHA-256 of a model file, the first ones it drew."""
    reconstructed: dict[str, Tensor] = field(default_factory=dict)
    """The real ones as they come back from its autoencoder, if it has one."""


@dataclass(frozen=True)
class Line:
    """A line of the table of scores."""

    name: str
    value: str
    floor: str
    better: str
    meaning: str
    interval: str = ""
    """Where the true value lies, if that is known."""
    floor_interval: str = ""


def write_report(path: Path, evaluation: Evaluation, sheets: Sheets, losses: Path | None = None) -> str:
    """Write the page to ``path``; returns its SHA-256. ``losses``: a CSV of losses by ``images`` seen."""
    best, low = sheets.drawn[evaluation.best.sha256], evaluation.conditions.low_resolution
    back = sheets.reconstructed.get(evaluation.best.sha256)
    page = render(
        "report.html",
        evaluation=evaluation,
        findings=findings(evaluation),
        lines=score_lines(evaluation.best.scores, evaluation.figures, evaluation.floor)
        + reconstruction_lines(evaluation.best.reconstruction),
        drawn=png_bytes(grid(best)),
        real=png_bytes(grid(sheets.real)),
        reconstructed=None if back is None else png_bytes(above(sheets.real, back)),
        shown=len(best),
        charts=charts(evaluation, losses),
        merit=evaluation.best.merit.name,
        enlarged=enlarged_lines(evaluation),
        compared=low and png_bytes(compared(sheets.real, best, low)),
        strips={sha256: png_bytes(_strip(drawn)) for sha256, drawn in sheets.drawn.items()},
    )
    return write_bytes(path, page)


def findings(evaluation: Evaluation) -> list[str]:
    """What the figures say, in words no stronger than their errors allow."""
    best, floor = evaluation.best, evaluation.floor.scores
    gap = best.scores.kid - floor.kid
    error = math.hypot(best.scores.kid_se, floor.kid_se)
    if gap <= 2 * error:
        said = [f"On {best.scores.samples:,} pictures its KID cannot be told from that of real ones."]
    else:
        times = f"{gap / error:,.0f} times the standard error"
        said = [f"Its KID lies {plain(gap)} above that of real pictures, {times}."]
    others = [each for each in evaluation.checkpoints if each.sha256 != best.sha256]
    if others:
        second = min(others, key=lambda each: each.scores.kid)
        error = math.hypot(best.scores.kid_se, second.scores.kid_se)
        lead = second.scores.kid - best.scores.kid
        within = "within" if lead <= 2 * error else "beyond"
        said.append(f"Its lead over the next best ({second.images:,} images) is {within} two standard errors.")
    if evaluation.preliminary:
        fewest = min(each.merit.count for each in evaluation.preliminary)
        said.append(
            f"{counted(len(evaluation.preliminary), 'more checkpoint')} fell behind on fewer pictures, from "
            f"{fewest:,} on, and {'was' if len(evaluation.preliminary) == 1 else 'were'} not judged in full."
        )
    if evaluation.baselines:
        said.append(verdict(best.scores, evaluation.baselines))
    return said


def enlarged_lines(evaluation: Evaluation) -> list[tuple[str, str, str, str]]:
    """The table of enlargements, none for models that draw from nothing: name, Fréchet distance, PSNR and SSIM."""
    if evaluation.baselines is None or evaluation.best.likeness is None:
        return []
    ours = Enlarged(scores=evaluation.best.scores, likeness=evaluation.best.likeness)
    named = {"the model": ours} | {TITLES[name]: each for name, each in evaluation.baselines.items()}
    return [
        (name, plain(each.scores.fd), f"{each.likeness.psnr:.2f} dB", f"{each.likeness.ssim:.3f}")
        for name, each in named.items()
    ]


def compared(real: Tensor, drawn: Tensor, low_resolution: int) -> Image.Image:
    """Of each held-out picture: small, enlarged by bicubic interpolation and by a model, and as it is."""
    pictures, size = real[:COMPARED], real.shape[-1]
    small = shrunk(pictures, low_resolution)
    bicubic = resampled(small, size // low_resolution, "bicubic")
    return grid(beside(blocks(small, size), bicubic, drawn[:COMPARED], pictures), columns=8)


MEANINGS = {
    "kid": ("lower", "Unbiased at any number of pictures: the one to go by."),
    "fd": ("lower", "Grows as pictures get fewer: means something only beside its floor."),
    "fd_infinity": ("lower", "The same as it would be of endlessly many pictures."),
    "precision": ("higher", "Share of drawn pictures that lie among real ones: fidelity."),
    "recall": ("higher", "Share of real pictures that lie among drawn ones: variety."),
    "density": (
        "higher",
        "How many real ones a drawn one lies among, of real ones about 1: fidelity, robustly.",
    ),
    "coverage": ("higher", "Share of real pictures that have a drawn one near them: variety, robustly."),
}
"""Of each score which is better, and how to read it."""


def score_lines(scores: Scores, figures: Mapping[str, Measured], floor: Floor) -> list[Line]:
    """The table of scores that there are: each beside what real images get, both with intervals if there are any."""
    return [
        Line(
            f"{name}_{scores.extractor}",
            _score(scores, name, figures),
            _score(floor.scores, name, floor.figures),
            better,
            meaning,
            interval_of(figures, f"{name}_{scores.extractor}"),
            interval_of(floor.figures, f"{name}_{scores.extractor}"),
        )
        for name, (better, meaning) in MEANINGS.items()
        if getattr(scores, name) is not None
    ]


def interval_of(figures: Mapping[str, Measured], name: str) -> str:
    """Of one metric at 95 %, such as ``0.012 … 0.034``; empty if it is not among them."""
    return between(figures[name].interval) if name in figures else ""


def _score(scores: Scores, name: str, figures: Mapping[str, Measured]) -> str:
    value: float | None = getattr(scores, name)
    if value is None:
        return ""
    if name == "kid" and not figures:
        return with_error(value, scores.kid_se)
    return f"{value:.3f}" if name in SHARES else signed(value)


def reconstruction_lines(found: Reconstruction | None) -> list[Line]:
    """What an autoencoder loses, in the same table; real pictures lose nothing."""
    if found is None:
        return []
    return [
        Line(
            "reconstruction_psnr",
            f"{found.psnr:.2f} ± {found.psnr_se:.2f} dB",
            "",
            "higher",
            "How close held-out pictures come back from the autoencoder, pixel by pixel.",
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


def _strip(drawn: Tensor) -> Image.Image:
    return grid(drawn[:STRIP], columns=8, pad=1, scale=max(1, round(32 / drawn.shape[-1])))
