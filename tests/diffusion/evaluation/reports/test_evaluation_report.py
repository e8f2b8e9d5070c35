"""The report: one page that shows what was measured, and needs nothing but itself."""

import base64
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from diffusion.common.image_grids import make_grid, png_bytes, to_pil_image
from diffusion.evaluation.estimate import Estimate, MetricEstimate, Share
from diffusion.evaluation.reports.charts import read_losses
from diffusion.evaluation.reports.evaluation_report import EvaluationPage, advise_longer, findings
from diffusion.evaluation.reports.html import format_plain, format_with_error
from diffusion.evaluation.results import Evaluation, RealBaseline
from tests.builders.browser import chromium, look
from tests.builders.evaluations import an_evaluation, images, scores
from tests.builders.html_pages import Page


def figures() -> dict[str, MetricEstimate]:
    """Some metrics with their errors."""
    return measured(
        kid=Estimate(value=0.2, error=0.005, freedom=1000),
        fd=Estimate(value=123.4, error=2, freedom=1000),
        precision=Share(value=0.812, error=0.005, freedom=1000, count=500),
        coverage=Share(value=0.5, error=0.005, freedom=1000, count=480),
    )


def measured(**estimates: Estimate) -> dict[str, MetricEstimate]:
    return {f"{name}_efflite0": MetricEstimate.from_estimate(each) for name, each in estimates.items()}


def with_more(evaluation: Evaluation) -> Evaluation:
    """The same with intervals, density and coverage, and with two that fell behind on fewer images."""
    behind = [
        evaluation.best.model_copy(
            update={"sha256": digit * 64, "images": images, "scores": scores(kid, samples=125, fd=987.6)}
        )
        for digit, images, kid in (("a", 1500, 0.7), ("b", 2500, -0.4))
    ]
    newer = {"density": 0.9, "coverage": 0.5, "fd_infinity": 100.4}
    models = [each.model_copy(update={"scores": scores(each.scores.kid, **newer)}) for each in evaluation.checkpoints]
    update = {
        "estimates": figures(),
        "preliminary": behind,
        "best": next(each for each in models if each.sha256 == evaluation.best.sha256),
        "checkpoints": models,
        "real_baseline": RealBaseline(
            scores=scores(0.01, fd=61.2, density=1.02, coverage=0.97, fd_infinity=0.3),
            estimates=measured(kid=Estimate(value=0.01, error=0.005, freedom=1000), fd=Estimate(value=61.2, error=1)),
        ),
    }
    return evaluation.model_copy(update=update | {"features": "EfficientNet-Lite0 trained on ImageNet"})


def page_of(evaluation: Evaluation, losses: Path | None = None) -> EvaluationPage:
    images_by_model = {
        each.sha256: images(number) for number, each in enumerate(evaluation.checkpoints + evaluation.preliminary)
    }
    return EvaluationPage(evaluation, real=images(99), generated=images_by_model, losses=losses)


@pytest.fixture
def losses(tmp_path: Path) -> Path:
    path = tmp_path / "losses.csv"
    path.write_text("images,train_loss,held_out_loss\n100,0.5,nan\n200,0.3,nan\n")
    return path


def write_page(folder: Path, evaluation: Evaluation, losses: Path | None = None) -> Page:
    page_of(evaluation, losses).write(folder / "report.html")
    return Page((folder / "report.html").read_text())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """A page without intervals."""
    return write_page(tmp_path_factory.mktemp("report"), an_evaluation([0.5, 0.2]))


@pytest.fixture(scope="module")
def whole_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """A page with everything."""
    return write_page(tmp_path_factory.mktemp("report"), with_more(an_evaluation([0.5, 0.2])))


def test_report_is_self_contained_and_deterministic(tmp_path: Path, losses: Path) -> None:
    evaluation = an_evaluation([0.5, 0.2], dataset="<script>alert(1)</script>")
    page = write_page(tmp_path, evaluation, losses)
    html = (tmp_path / "report.html").read_text()
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not [word for word in ("url(", "@import", "<script") if word in html]
    write_page(tmp_path, evaluation, losses)
    assert (tmp_path / "report.html").read_text() == html


def test_evaluation_report_shows_best_images_beside_real_ones(page: Page) -> None:
    shown_images = [base64.b64decode(each.split(",")[1]) for each in page.addresses]
    assert shown_images[:2] == [png_bytes(make_grid(images(1))), png_bytes(make_grid(images(99)))]
    assert all(png.startswith(b"\x89PNG") for png in shown_images)


@pytest.mark.parametrize(
    "words",
    [
        "kid_efflite0 0.200 ± 0.020 0.010 ± 0.020 lower",
        "fd_efflite0 123 61.2 lower",
        "precision_efflite0 0.812 0.812 higher",
        "500 generated real-vs-real baseline: 500 real",
        "the same 480 held-out images",
        "2,000 best",
        "For intervals there must be 12 images of each kind.",
    ],
)
def test_evaluation_report_shows_scores_with_their_real_baseline(words: str, page: Page) -> None:
    assert words in page.text
    assert "95 of 100" not in page.text


def test_metrics_and_real_baselines_have_intervals_where_known(whole_page: Page) -> None:
    ends = figures()["precision_efflite0"].interval
    for words in (
        # 1.96 standard errors to either side.
        "kid_efflite0 0.200 0.190 … 0.210 0.0100 0.000 … 0.020 lower",
        "fd_efflite0 123 119.5 … 127.3 61.2",
        f"precision_efflite0 0.812 {ends.low:.3f} … {ends.high:.3f} 0.812 higher",
        "recall_efflite0 0.745 0.745 higher",
        "density_efflite0 0.900 1.020 higher",
        "coverage_efflite0 0.500 0.45",
        "fd_infinity_efflite0 100 0.300 lower",
        "95 of 100 evaluations",
        "EfficientNet-Lite0 trained on ImageNet, weights",
    ):
        assert words in whole_page.text


def test_eliminated_checkpoints_are_marked_with_comparable_scores_only(whole_page: Page) -> None:
    text = whole_page.text
    assert "Best of 4: the checkpoint that has seen 2,000 images" in text
    assert "2 more checkpoints fell behind on fewer images, from 125 on, and were not evaluated in full." in text
    # However lucky it was on few images.
    assert "2,500 not evaluated in full −0.400 ± 0.020 125 images" in text
    assert "1,500 not evaluated in full 0.700 ± 0.020 125 images" in text
    assert "2,000 best" in text
    assert not [words for words in ("1,500 best", "2,500 best", "988") if words in text]


@pytest.mark.slow
def test_the_page_is_whole_in_a_browser(tmp_path: Path) -> None:
    write_page(tmp_path, with_more(an_evaluation([0.5, 0.2])))
    schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    with chromium() as browser:
        for scheme, width in product(schemes, (1280, 390)):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.goto((tmp_path / "report.html").as_uri())
            look(page, tmp_path / f"report-{scheme}-{width}.png")
            headings = ["Scores of the checkpoint", "Images", "Over training", "All checkpoints", "Conditions"]
            assert page.locator("h2").all_inner_texts() == headings


@pytest.mark.parametrize("few", [False, True])
def test_evaluation_report_notes_a_baseline_of_fewer_images(few: bool, tmp_path: Path) -> None:
    baseline = scores(0.01, samples=300 if few else 500)
    text = write_page(tmp_path, an_evaluation([0.5], baseline=baseline)).text
    assert ("has only 300 training images, fewer than were generated" in text) == few


@pytest.mark.slow
def test_curves_appear_light_and_dark_and_losses_if_any(tmp_path: Path, losses: Path) -> None:
    evaluation = an_evaluation([0.5, 0.2])

    def charts_with(path: Path | None) -> int:
        page_of(evaluation, path).write(tmp_path / "report.html")
        html = (tmp_path / "report.html").read_text()
        assert html.count("<source") == html.count("against images seen")
        return html.count("<source")

    empty = tmp_path / "empty.csv"
    empty.write_text("images,train_loss\n")
    assert (charts_with(None), charts_with(empty), charts_with(losses)) == (4, 4, 5)


def test_losses_that_are_not_finite_are_left_out(losses: Path) -> None:
    assert read_losses(losses) == {"train_loss": [(100.0, 0.5), (200.0, 0.3)]}


def test_samples_have_their_class_or_prompt_below_them(tmp_path: Path) -> None:
    evaluation = an_evaluation([0.5])
    sheets = replace(page_of(evaluation), captions=[f"a <bird> number {n}" for n in range(64)])
    sheets.write(tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    generated = sheets.generated[evaluation.best.sha256]
    assert np.array_equal(page.image("a <bird> number 63"), np.asarray(to_pil_image(generated[63])))
    assert "a <bird> number 0" in page.text


@pytest.mark.parametrize(
    ("kids", "expected"),
    [
        ([0.03], ["KID 0.030 ± 0.020; real images 0.0100.", "On 500 images that cannot be told from real ones."]),
        ([0.51], ["KID 0.510 ± 0.020; real images 0.0100."]),
    ],
)
def test_evaluation_findings_respect_the_standard_errors(kids: list[float], expected: list[str]) -> None:
    assert findings(an_evaluation(kids)) == expected


@pytest.mark.parametrize(
    ("kids", "advised"),
    [([2.0, 1.0, 0.5], True), ([0.5, 0.51, 0.5], False), ([2.0, 0.5, 0.6], False), ([3.0, 2.9, 2.8], False)],
)
def test_longer_training_is_advised_where_kid_still_falls(kids: list[float], advised: bool) -> None:
    evaluation = an_evaluation(kids)
    assert (advise_longer(evaluation) is not None) == advised
    assert any("training.images" in line for line in findings(evaluation)) == advised


@pytest.mark.parametrize(("second", "word"), [(0.52, "within"), (0.9, "beyond")])
def test_findings_weigh_the_lead_over_the_next_best(second: float, word: str) -> None:
    assert findings(an_evaluation([0.5, 2.0, second]))[1] == (
        f"Its lead over the next best (3,000 images) is {word} two standard errors."
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234.5, "1,234"),
        (61.23, "61.2"),
        (0.01234, "0.0123"),
        (0.0, "0"),
        (-0.5, "-0.500"),
        (2e-7, "0"),
        (4.3e-19, "0"),
        (-0.000012345, "-0.000012"),
    ],
)
def test_figures_have_three_digits_and_no_powers_of_ten(value: float, text: str) -> None:
    assert format_plain(value) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1.23456, 0.0123, "1.235 ± 0.012"),
        (1234.5, 67.8, "1,234 ± 68"),
        (0.5, 0.0, "0.500 ± 0.000"),
        (-0.001, 0.002, "−0.0010 ± 0.0020"),
    ],
)
def test_a_figure_has_the_digits_that_its_error_leaves(value: float, error: float, text: str) -> None:
    assert format_with_error(value, error) == text
