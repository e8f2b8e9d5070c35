"""An evaluation as one HTML page that needs nothing but itself."""

import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from diffusion.evaluation.charts import charts
from diffusion.evaluation.metrics import Scores
from diffusion.evaluation.pages import plain, render, with_error
from diffusion.evaluation.results import Evaluation
from diffusion.files import write_bytes
from diffusion.grids import grid, png_bytes

STRIP = 16
"""Pictures of each checkpoint in the table of all."""


@dataclass(frozen=True)
class Sheets:
    """Pictures to be shown."""

    real: Tensor
    """Held-out ones, (N, C, H, W) uint8."""
    drawn: dict[str, Tensor]
    """Per SHA-256 of a model file, the first ones it drew."""


@dataclass(frozen=True)
class Line:
    """A line of the table of scores."""

    name: str
    value: str
    floor: str
    better: str
    meaning: str


def write_report(path: Path, evaluation: Evaluation, sheets: Sheets, losses: Path | None = None) -> str:
    """Write the page to ``path``; returns its SHA-256. ``losses``: a CSV of losses by ``images`` seen."""
    best = sheets.drawn[evaluation.best.sha256]
    page = render(
        "report.html",
        evaluation=evaluation,
        findings=findings(evaluation),
        lines=score_lines(evaluation.best.scores, evaluation.floor),
        drawn=png_bytes(grid(best)),
        real=png_bytes(grid(sheets.real)),
        shown=len(best),
        charts=charts(evaluation, losses),
        strips={sha256: png_bytes(_strip(drawn)) for sha256, drawn in sheets.drawn.items()},
    )
    return write_bytes(path, page)


def findings(evaluation: Evaluation) -> list[str]:
    """What the figures say, in words no stronger than their errors allow."""
    best, floor = evaluation.best, evaluation.floor
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
    return said


def score_lines(scores: Scores, floor: Scores) -> list[Line]:
    """The table of scores: each beside what real pictures get."""
    name = scores.extractor

    def shares(share: float) -> str:
        return f"{share:.3f}"

    return [
        Line(
            f"kid_{name}",
            with_error(scores.kid, scores.kid_se),
            with_error(floor.kid, floor.kid_se),
            "lower",
            "Unbiased at any number of pictures: the one to go by.",
        ),
        Line(
            f"fd_{name}",
            plain(scores.fd),
            plain(floor.fd),
            "lower",
            "Grows as pictures get fewer: means something only beside its floor.",
        ),
        Line(
            f"precision_{name}",
            shares(scores.precision),
            shares(floor.precision),
            "higher",
            "Share of drawn pictures that lie among real ones: fidelity.",
        ),
        Line(
            f"recall_{name}",
            shares(scores.recall),
            shares(floor.recall),
            "higher",
            "Share of real pictures that lie among drawn ones: variety.",
        ),
    ]


def _strip(drawn: Tensor) -> Image.Image:
    return grid(drawn[:STRIP], columns=8, pad=1, scale=max(1, round(32 / drawn.shape[-1])))
