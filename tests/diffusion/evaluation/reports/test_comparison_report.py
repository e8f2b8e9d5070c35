"""The page of a trial: the verdict, and all that was measured of both sides, beside what can be looked at."""

from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from diffusion.common.image_grids import make_grid
from diffusion.evaluation.reports.comparison_report import ComparisonPage, write_verdict
from diffusion.evaluation.reports.evaluation_report import EvaluationPage
from diffusion.evaluation.reports.html import format_p_value, format_signed
from tests.builders.browser import chromium, look
from tests.builders.comparison_results import Shown, example_comparison
from tests.builders.evaluations import an_evaluation
from tests.builders.evaluations import images as random_images
from tests.builders.html_pages import Page

HEADINGS = [
    "What the gate says",
    "Side by side",
    "Metrics",
    "Copies of training images",
    "Images generated more than once",
    "Worst classes",
    "Held-out images",
    "Colours and brightness",
    "Conditions",
]


@cache
def whole() -> Shown:
    return example_comparison()


def write(path: Path, context: Shown) -> str:
    names = context.model, context.dataset, context.candidate, context.champion
    return ComparisonPage(context.comparison, context.grids, *names).write(path)


def write_page(context: Shown, folder: Path) -> Page:
    write(folder / "comparison.html", context)
    return Page((folder / "comparison.html").read_text())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page on ``whole``, which most tests look at."""
    return write_page(whole(), tmp_path_factory.mktemp("comparison"))


def test_the_lead_is_shown_between_the_bounds_that_decide(page: Page) -> None:
    comparison = whole().comparison
    headline = comparison.compared.headline
    assert headline is not None
    low, high = headline.lead.lower_bound(comparison.confidence), headline.lead.upper_bound(comparison.gate.confidence)
    words = [f"at least {format_signed(low)} with", f"at most {format_signed(high)} with"]
    assert f"The lead: {words[0]}" in page.text
    reason = comparison.decision.findings[0].reason
    assert all(each in reason and each in page.text for each in words)


def test_comparison_report_has_verdict_reasons_and_rule_results(page: Page) -> None:
    text = page.text
    assert whole().comparison.decision.verdict == "promote"
    assert "promote: version 3 against version 2, the champion" in text
    for finding in whole().comparison.decision.findings:
        assert f"{finding.rule} {finding.verdict} {finding.reason}" in text


def test_images_of_both_sides_and_real_ones_are_shown(page: Page) -> None:
    context = whole()
    assert context.grids.champion is not None
    for name, images in (
        ("Images of version 3", context.grids.candidate),
        ("Images of version 2", context.grids.champion),
        ("Real held-out images", context.grids.real),
    ):
        assert np.array_equal(page.image(name), np.asarray(make_grid(images)))


def test_comparison_report_shows_nearest_training_images_and_copies(page: Page) -> None:
    context = whole()
    memorization = context.comparison.candidate.memorization
    copies = [pair for pair in memorization.pairs if pair.is_copy]
    # Those that were planted are the first that it drew, and the last that it learned from.
    assert len(copies) >= 12
    assert {pair.generated for pair in copies} >= set(range(12))
    assert page.text.count(", a copy") == len(copies)
    for pair, image, training in zip(
        memorization.pairs, context.grids.nearest_generated, context.grids.nearest_training, strict=True
    ):
        both = np.asarray(make_grid(torch.stack([image, training]), columns=2))
        assert np.array_equal(page.image(f"Generated image {pair.generated} and its nearest training image"), both)


def test_comparison_report_groups_duplicate_images(page: Page) -> None:
    context = whole()
    duplicates = context.comparison.candidate.duplicates
    # Those that were planted are one group.
    [planted] = [group for group in duplicates.groups if 20 in group.members]
    assert {20, 31, 42} <= set(planted.members)
    for group, images in zip(duplicates.groups, context.grids.duplicates, strict=True):
        numbers = "no. " + ", ".join(map(str, group.members[:4])) + (" …" if group.size > 4 else "")
        assert np.array_equal(page.image(f"Duplicates {numbers}"), np.asarray(make_grid(images[:4], columns=4)))


def test_comparison_report_shows_worst_classes_below_real_images(page: Page) -> None:
    context = whole()
    assert len(context.grids.classes) == 2
    for name, (real, generated) in context.grids.classes.items():
        sheet = page.image(f"Real images of {name} above generated ones")
        assert np.array_equal(sheet, np.asarray(make_grid(torch.cat([real, generated]), columns=len(real))))


def test_comparison_report_shows_metrics_with_intervals_and_baseline(page: Page) -> None:
    context, text = whole(), page.text
    assert "metric version 3 version 2 real-vs-real baseline" in text
    assert "On 240 images of each side, against 240 held-out images" in text
    for name, figure in context.comparison.candidate.estimates.items():
        after = text.partition("version 2 real-vs-real baseline ")[2].partition(f"{name} ")[2]
        value, low, between, high = (word.replace("−", "-") for word in after.split()[:4])
        assert float(value) == pytest.approx(figure.value, rel=0.01)
        assert between == "…"
        length = figure.interval.high - figure.interval.low
        assert (float(low), float(high)) == pytest.approx((figure.interval.low, figure.interval.high), abs=length / 10)


def test_the_worst_class_comes_first_and_small_ones_are_named(page: Page) -> None:
    per_class, text = whole().comparison.candidate.per_class, page.text
    assert per_class is not None
    assert per_class.worst is not None
    rows = text.partition("else taken for ")[2]
    assert rows.startswith(f"{per_class.worst.name} ")
    assert per_class.skipped
    assert f"too few images: {', '.join(each.name for each in per_class.skipped)}" in text


def changed(context: Shown, **changes: object) -> Shown:
    """With other fields of the candidate's evaluation."""
    candidate = context.comparison.candidate.model_copy(update=changes)
    return replace(context, comparison=context.comparison.model_copy(update={"candidate": candidate}))


def test_comparison_report_says_when_no_class_has_enough_images(tmp_path: Path) -> None:
    per_class = whole().comparison.candidate.per_class
    assert per_class is not None
    text = write_page(changed(whole(), per_class=per_class.model_copy(update={"classes": []})), tmp_path).text
    assert "Worst classes No class has images enough" in text
    assert "taken for" not in text


def test_bits_are_a_bound_or_exact_as_the_model_says(page: Page) -> None:
    assert "version 3: 3.800 ± 0.020 on 240 images, in bits per dimension." in page.text
    assert "version 2: at most 3.900 ± 0.020 on 240 images, in bits per dimension." in page.text


def test_comparison_report_is_self_contained_and_deterministic(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    context = replace(whole(), model=evil, dataset=evil, candidate=evil, champion=evil + "2")
    page = write_page(context, tmp_path)
    html = (tmp_path / "comparison.html").read_text()
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "url(" not in html
    assert "<script" not in html
    assert write(tmp_path / "again.html", context) == write(tmp_path / "comparison.html", context)


def test_comparison_report_omits_unmeasured_metrics(tmp_path: Path) -> None:
    context = example_comparison(with_champion=False)
    loss = context.comparison.candidate.held_out_loss.model_copy(update={"levels": [], "bits_per_dim": None})
    text = write_page(changed(context, estimates={}, per_class=None, held_out_loss=loss), tmp_path).text
    missing = {"Metrics", "Worst classes", "Held-out images"}
    assert [heading for heading in HEADINGS if f" {heading} " in text] == [
        heading for heading in HEADINGS if heading not in missing
    ]
    assert "promote: version 1 promote" not in text
    assert "champion, " not in text


@pytest.mark.slow
def test_a_first_version_is_shown_without_a_champion(tmp_path: Path) -> None:
    text = write_page(example_comparison(with_champion=False), tmp_path).text
    assert "promote: version 1 first version: there was no champion" in text
    assert "metric version 1 real-vs-real baseline" in text
    assert "champion's" not in text


@pytest.mark.parametrize(("p", "text"), [(0.5, "0.500"), (0.0012, "0.001"), (1e-9, "under 0.001")])
def test_probabilities_have_no_powers_of_ten(p: float, text: str) -> None:
    assert format_p_value(p) == text


@pytest.mark.slow
def test_the_page_is_whole_in_a_browser(tmp_path: Path) -> None:
    write(tmp_path / "comparison.html", whole())
    schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    with chromium() as browser:
        for scheme, width in product(schemes, (1280, 390)):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.goto((tmp_path / "comparison.html").as_uri())
            look(page, tmp_path / f"comparison-{scheme}-{width}.png")
            assert page.locator("h2").all_inner_texts() == HEADINGS
            assert page.locator("h1 .verdict").inner_text() == "Promote"


def test_evaluation_report_begins_with_the_verdict_and_its_figures(tmp_path: Path) -> None:
    evaluation, comparison = an_evaluation([0.5]), whole().comparison
    page = EvaluationPage(evaluation, random_images(0), {evaluation.best.sha256: random_images(1)})
    path = tmp_path / "report.html"
    page.write(path)
    before = Page(path.read_text()).text
    for title, reason in (("models:/clothes/2 is held", "first <words>"), ("models:/clothes/3 is held", "other words")):
        write_verdict(path, evaluation, comparison, "hold", title, reason)
    text = Page(path.read_text()).text
    assert text.index(f"{title} {reason}") < text.index("the checkpoint that has seen")
    assert "models:/clothes/2" not in text
    precision = comparison.candidate.estimates[f"precision_{comparison.candidate.scores.extractor}"].value
    assert f"precision {precision:.3g}" in text
    # The rest of the page is as it was.
    assert text.endswith(before[before.index("Scores of the checkpoint") :])
