"""The report on a sweep: which settings were best, how surely, and what each of them generates."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from pydantic import JsonValue

from diffusion.common.image_grids import make_grid, png_bytes
from diffusion.evaluation.ranking import Ranking, rank_evaluations
from diffusion.evaluation.reports.ranking_report import RankingPage, describe_ranking, training_charts
from tests.builders.browser import chromium, look
from tests.builders.evaluations import an_evaluation, images
from tests.builders.html_pages import Page

REAL = png_bytes(make_grid(images(7)))


def settings(rate: float, width: int = 32) -> dict[str, JsonValue]:
    return {"training.learning_rate": rate, "model.width": width}


def ranked(kids: Mapping[float, float] | list[float], several: list[dict[str, JsonValue]] | None = None) -> Ranking:
    values = list(kids)
    several = several or [settings(kid) for kid in values]
    evaluations = [an_evaluation([kid + 0.5, kid]) for kid in values]
    return rank_evaluations(evaluations, several, [f"{int(kid * 100):032x}" for kid in values])


def write(path: Path, ranking: Ranking) -> str:
    sheets = {each.name: png_bytes(make_grid(images(int(each.value * 100)))) for each in ranking.models}
    losses = path.with_suffix(".csv")
    losses.write_text("images,held_out_loss_ema\n100,0.5\n200,0.4\n")
    evaluations = [an_evaluation([each.value + 0.5, each.value]) for each in ranking.models]
    charts = training_charts(list(sheets), evaluations, [losses] * len(evaluations))
    return RankingPage(ranking, sheets, REAL, charts).write(path)


def test_the_best_comes_first_each_with_settings_metrics_and_images(tmp_path: Path) -> None:
    ranking = ranked([0.9, 0.2, 0.5], [settings(1e-3), settings(4e-3), settings(8e-3, 64)])
    write(tmp_path / "sweep.html", ranking)
    page = Page((tmp_path / "sweep.html").read_text())
    words = " ".join(page.words)
    assert [each.value for each in ranking.models] == [0.2, 0.5, 0.9]
    assert "Best of 3: learning_rate 0.004, width 32" in words
    assert words.index("0.200 ± 0.020") < words.index("0.500 ± 0.020") < words.index("0.900 ± 0.020")
    assert "--set training.learning_rate=0.004 --set model.width=32" in words
    assert f"{20:032x}" in words
    shown_images = {name: pixels for name, pixels in page.images if name.startswith("Images of")}
    assert len(shown_images) == 3
    expected = np.asarray(make_grid(images(20)))
    np.testing.assert_array_equal(shown_images["Images of learning_rate 0.004, width 32"], expected)
    assert all(address.startswith("data:") for address in page.addresses)


def test_the_suggested_command_has_the_options_of_the_sweep(tmp_path: Path) -> None:
    ranking, path = ranked([0.2]), tmp_path / "sweep.html"
    sheets = {each.name: REAL for each in ranking.models}
    RankingPage(ranking, sheets, REAL, options=["--set", "training.images=4000"]).write(path)
    words = " ".join(Page(path.read_text()).words)
    assert "--set training.images=4000 --set training.learning_rate=0.2 --set model.width=32" in words


@pytest.mark.parametrize(
    ("kids", "words"),
    [
        ([0.2], "nothing to compare"),
        ([0.2, 0.9], "is better than learning_rate 0.9, width 32: by"),
        ([0.2, 0.23], "is not distinguishable from the best"),
        ([0.2, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4], "better than every other"),
        ([0.2, 0.23, 0.9, 1.0, 1.1, 1.2, 1.3], "1 other is not distinguishable from the best"),
    ],
)
def test_sweep_findings_respect_the_standard_errors(kids: list[float], words: str) -> None:
    assert words in describe_ranking(ranked(kids))[0]


def test_settings_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    write(tmp_path / "sweep.html", ranked([0.2], [{"training.x": "<script>alert(1)</script>"}]))
    assert "<script" not in (tmp_path / "sweep.html").read_text()


def test_equal_sweeps_give_equal_pages(tmp_path: Path) -> None:
    assert write(tmp_path / "a.html", ranked([0.2, 0.3])) == write(tmp_path / "b.html", ranked([0.2, 0.3]))


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_whole_in_a_browser(width: int, tmp_path: Path) -> None:
    write(tmp_path / "sweep.html", ranked([0.2 + n / 9 for n in range(1, 7)]))
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.goto((tmp_path / "sweep.html").as_uri())
        look(page, tmp_path / f"sweep-{width}.png")
