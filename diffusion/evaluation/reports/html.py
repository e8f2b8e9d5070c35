"""Pages that need nothing but themselves, and how figures and images are set in them."""

import base64
import math
from dataclasses import dataclass
from typing import Any, Protocol

from diffusion.common.escaping import escape_controls
from diffusion.evaluation.estimate import Interval


class Bounded(Protocol):
    """A metric with its interval."""

    @property
    def value(self) -> float:
        """The measured value."""

    @property
    def interval(self) -> Interval:
        """The interval of 95 %."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table: a value and below it an interval, either of which may be empty."""

    value: str = ""
    interval: str = ""


def metric_cell(metric: Bounded | None) -> Cell:
    """The cell of a metric; empty if it was not measured."""
    return Cell() if metric is None else Cell(signed(metric.value), between(metric.interval))


def render(template: str, **content: object) -> bytes:
    """The page that ``template`` makes of ``content``, every text of which is escaped."""
    # Not at the top: whoever sets figures, as the gate does in every configuration, renders no page.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("diffusion.evaluation.reports"),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "uri": data_uri,
        "with_error": with_error,
        "plain": plain,
        "signed": signed,
        "count": count,
        "counted": counted,
        "share": share,
        "storage": storage,
    }
    return environment.get_template(template).render(**content).encode()


def _visible(value: Any) -> Any:
    """``value`` as it is put on a page: of text, no character that would reorder or hide what stands beside it."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "\n".join(map(escape_controls, value.split("\n")))


def data_uri(png: bytes) -> str:
    """A PNG file as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def with_error(value: float, error: float) -> str:
    """``value`` ± ``error``, both to the error's second significant digit."""
    digits = max(0, 1 - math.floor(math.log10(error))) if error > 0 else 3
    return f"{value:,.{digits}f} ± {error:,.{digits}f}"


def plain(value: float) -> str:
    """``value`` to three significant digits, never in powers of ten."""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}"


def signed(value: float) -> str:
    """``value`` as ``plain`` sets it, with a real minus."""
    return plain(value).replace("-", "−")


def between(interval: Interval) -> str:
    """Both ends of an interval, to the second significant digit of its length."""
    length = interval.high - interval.low
    digits = max(0, 1 - math.floor(math.log10(length))) if length > 0 else 3
    return f"{interval.low:,.{digits}f} … {interval.high:,.{digits}f}".replace("-", "−")


def count(number: int) -> str:
    """A number of things."""
    return f"{number:,}"


def counted(number: int, one: str, several: str | None = None) -> str:
    """A number of things with their name; ``several``: its plural, if that is not the name with an s."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def share(part: int, whole: int) -> str:
    """``part`` of ``whole`` in per cent, never 0 % of something nor 100 % of less than all."""
    if not part or part == whole:
        return "100 %" if part else "0 %"
    percent = 100 * part / whole
    if percent < 0.1:
        return "under 0.1 %"
    return "over 99.9 %" if percent > 99.9 else f"{percent:.1f} %"


def storage(size: int) -> str:
    """``size`` bytes to three digits, in the largest decimal unit that leaves at least 1."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        # What would be rounded to a thousand is one of the next.
        if size >= 0.9995 * 10**power:
            found = size / 10**power
            return f"{found:,.0f} {unit}" if found >= 999.5 else f"{found:.3g} {unit}"
    return f"{size} bytes"
