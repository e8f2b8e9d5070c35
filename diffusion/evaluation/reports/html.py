"""Self-contained HTML pages, and the formatting of numbers and images in them."""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from diffusion.common.escaping import escape_controls, pluralize
from diffusion.common.shapes import Images
from diffusion.evaluation.estimate import CONFIDENCE, DEVIATIONS, Interval, MetricEstimate

if TYPE_CHECKING:
    from jinja2 import Environment

    from diffusion.evaluation.metrics.pixel_metrics import AppearanceShift


@dataclass(frozen=True)
class Cell:
    """A cell of a table: a value and below it an interval, either of which may be empty."""

    value: str = ""
    interval: str = ""


def metric_cell(metric: MetricEstimate | None, missing: str = "") -> Cell:
    """Return the cell of a metric; ``missing`` if it was not measured."""
    return Cell(missing) if metric is None else Cell(format_signed(metric.value), format_interval(metric.interval))


def shift_cell(shift: "AppearanceShift") -> Cell:
    """Return the cell of a shift, in units of the real spread, or of the property if that is 0."""
    unit = shift.real_spread or 1.0
    reach, middle = DEVIATIONS * shift.standard_error / unit, shift.difference / unit
    interval = format_interval(Interval(low=middle - reach, high=middle + reach, confidence=CONFIDENCE))
    return Cell(f"{middle:+.3f}".replace("-", "−"), interval)


def make_sheet(title: str, note: str, images: Images, captions: Sequence[str] = ()) -> dict[str, object]:
    """Lay out ``images``, each (C, H, W) uint8, for the section ``images``: each with its caption, if they have any."""
    from diffusion.common.image_grids import make_grid, png_bytes, to_pil_image

    samples = [(png_bytes(to_pil_image(image)), text) for image, text in zip(images, captions, strict=False)]
    return {"title": title, "note": note, "png": b"" if samples else png_bytes(make_grid(images)), "samples": samples}


Subject = TypeVar("Subject")
Sections = Mapping[str, Callable[[Subject], Mapping[str, object] | None]]
"""The sections of a page by name, in order: what each shows of the page's subject, or None to leave it out."""


def render(template: str, **content: object) -> bytes:
    """Render ``template`` with ``content``, every text escaped."""
    return _environment().get_template(template).render(**content).encode()


def render_page(page: str, sections: Sections[Subject], subject: Subject, **content: object) -> bytes:
    """Render the template ``page``.html with its ``sections``, every text escaped.

    Each section has a template in the folder ``page``, or one that pages share beside it. All of them see the fields of
    ``subject``, a dataclass, and ``content``.
    """
    environment, shared = _environment(), vars(subject) | content
    shown = [(name, values) for name, show in sections.items() if (values := show(subject)) is not None]
    rendered = [
        environment.select_template([f"{page}/{name}.html", f"{name}.html"]).render(**{**shared, **values})
        for name, values in shown
    ]
    return environment.get_template(f"{page}.html").render(**shared, sections=rendered).encode()


def _environment() -> "Environment":
    # Imported here: modules that only format numbers, such as the gate, do not need it.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("diffusion.evaluation.reports"),
        autoescape=True,
        finalize=_escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    formats = format_count, format_p_value, format_plain, format_share, format_signed, format_size, format_with_error
    filters = *formats, encode_data_uri, metric_cell, pluralize, shift_cell
    environment.filters |= {function.__name__: function for function in filters}
    return environment


def _escape(value: Any) -> Any:
    """Escape characters in text that would reorder or hide what stands beside it."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "\n".join(map(escape_controls, value.split("\n")))


def encode_data_uri(png: bytes) -> str:
    """Encode a PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def count_decimals(error: float) -> int:
    """Return the number of decimals that shows the second significant digit of ``error``; 3 if it is 0."""
    return max(0, 1 - math.floor(math.log10(error))) if error > 0 else 3


def format_fixed(value: float, digits: int) -> str:
    """Format ``value`` with this many decimals and a typographic minus, but never as −0."""
    text = f"{value:,.{digits}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else text.lstrip("-")


def format_with_error(value: float, error: float) -> str:
    """Format ``value`` ± ``error``, both to the error's second significant digit, with a typographic minus."""
    digits = count_decimals(error)
    return f"{format_fixed(value, digits)} ± {error:,.{digits}f}"


def format_plain(value: float) -> str:
    """Format ``value`` to three significant digits or six decimals, never in powers of ten; less is 0."""
    digits = min(6, max(0, 2 - math.floor(math.log10(abs(value))))) if abs(value) >= 5e-7 else 0
    return f"{value:,.{digits}f}" if digits or value >= 0.5 or value <= -0.5 else "0"


def format_signed(value: float) -> str:
    """Format ``value`` as ``format_plain`` does, with a typographic minus."""
    return format_plain(value).replace("-", "−")


def format_interval(interval: Interval) -> str:
    """Format both ends of an interval to the second significant digit of its length."""
    digits = count_decimals(interval.high - interval.low)
    return f"{format_fixed(interval.low, digits)} … {format_fixed(interval.high, digits)}"


def format_p_value(p: float) -> str:
    """Format a p-value, never in powers of ten."""
    return "under 0.001" if p < 0.001 else f"{p:.3f}"


def format_count(number: int) -> str:
    """Format a number of things."""
    return f"{number:,}"


def format_share(part: int, whole: int) -> str:
    """Format ``part`` of ``whole`` in per cent, never 0 % of something nor 100 % of less than all."""
    if not part or part == whole:
        return "100 %" if part else "0 %"
    if (percent := 100 * part / whole) < 0.1:
        return "under 0.1 %"
    return "over 99.9 %" if percent > 99.9 else f"{percent:.1f} %"


def format_size(size: int) -> str:
    """Format ``size`` bytes to three digits, in the largest decimal unit that leaves at least 1."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        # A value that rounds to a thousand belongs to the next unit.
        if size >= 0.9995 * 10**power:
            number = size / 10**power
            return f"{number:,.0f} {unit}" if number >= 999.5 else f"{number:.3g} {unit}"
    return f"{size} bytes"
