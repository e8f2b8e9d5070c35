"""Numbers as pages and tables say them, and pages made of sections."""

from pathlib import Path
from typing import Any

import pytest

from diffusion.evaluation.reports import comparison_report, dataset_report, evaluation_report, html, ranking_report
from diffusion.evaluation.reports.html import Sections, format_size


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (123_456, "123 kB"),
        (999_499, "999 kB"),
        (999_999, "1 MB"),
        (999_600_000, "1 GB"),
        (25_300_000_000, "25.3 GB"),
        (10**15, "1,000 TB"),
        (2_345 * 10**12, "2,345 TB"),
    ],
)
def test_sizes_have_three_digits_and_the_largest_fitting_unit(size: int, words: str) -> None:
    assert format_size(size) == words


@pytest.mark.parametrize(
    ("page", "sections"),
    [
        ("champion_comparison", comparison_report.SECTIONS),
        ("dataset", dataset_report.SECTIONS),
        ("ranking", ranking_report.SECTIONS),
        ("report", evaluation_report.SECTIONS),
    ],
)
def test_each_section_has_a_template_of_its_name(page: str, sections: Sections[Any]) -> None:
    templates = Path(html.__file__).parent / "templates"
    names = {path.stem for path in (templates / page).iterdir()} - {"figures"}  # macros
    assert names <= sections.keys()
    assert sections.keys() - names <= {path.stem for path in templates.glob("*.html")}
