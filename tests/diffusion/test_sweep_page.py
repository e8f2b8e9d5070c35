"""The page of a sweep: which settings were best, how surely, and what each of them draws."""

from pathlib import Path

import numpy as np
import pytest

from diffusion.evaluation.sweep_page import Tried, finding, ranked, write_sweep_page
from diffusion.grids import grid, png_bytes
from tests.browser import chromium, look
from tests.diffusion.html_pages import Page
from tests.diffusion.test_report import an_evaluation, pictures


def tried(kid: float, rate: float, tmp_path: Path, width: int = 32) -> Tried:
    losses = tmp_path / f"{rate}-{width}.csv"
    losses.write_text("images,held_out_loss_ema\n100,0.5\n200,0.4\n")
    return Tried(
        settings={"training.learning_rate": rate, "model.width": width},
        evaluation=an_evaluation([kid + 0.5, kid]),
        losses=losses,
        drawn=png_bytes(grid(pictures(int(kid * 100)))),
        run_id=f"{int(kid * 100):032x}",
        output=f"runs/{rate}",
    )


def test_the_best_comes_first_and_each_has_its_settings_figures_and_pictures(tmp_path: Path) -> None:
    all_tried = [tried(0.9, 1e-3, tmp_path), tried(0.2, 4e-3, tmp_path), tried(0.5, 8e-3, tmp_path, 64)]
    write_sweep_page(tmp_path / "sweep.html", "digits", all_tried)
    page = Page((tmp_path / "sweep.html").read_text())
    words = " ".join(page.words)
    assert [each.evaluation.best.scores.kid for each in ranked(all_tried)] == [0.2, 0.5, 0.9]
    assert "learning_rate 0.004, width 32" in words
    assert words.index("0.200 ± 0.020") < words.index("0.500 ± 0.020") < words.index("0.900 ± 0.020")
    assert "--set training.learning_rate=0.004 --set model.width=32" in words
    shown = {name: pixels for name, pixels in page.images if name.startswith("Pictures drawn")}
    assert len(shown) == 3
    expected = np.asarray(grid(pictures(20)))
    np.testing.assert_array_equal(shown["Pictures drawn with learning_rate 0.004, width 32"], expected)
    assert all(address.startswith("data:") for address in page.addresses)


@pytest.mark.parametrize(
    ("kids", "words"),
    [
        ([0.2], "nothing to compare"),
        ([0.2, 0.9], "better than every other"),
        ([0.2, 0.23, 0.9], "1 other cannot be"),
    ],
)
def test_it_says_no_more_than_the_errors_allow(kids: list[float], words: str, tmp_path: Path) -> None:
    assert words in finding([tried(kid, kid, tmp_path) for kid in kids])


def test_settings_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    one = tried(0.2, 1e-3, tmp_path)
    evil = Tried(
        {"training.x": "<script>alert(1)</script>"}, one.evaluation, one.losses, one.drawn, one.run_id, one.output
    )
    write_sweep_page(tmp_path / "sweep.html", "digits", [evil])
    assert "<script" not in (tmp_path / "sweep.html").read_text()


def test_equal_sweeps_give_equal_pages(tmp_path: Path) -> None:
    both = [write_sweep_page(tmp_path / name, "digits", [tried(0.2, 1e-3, tmp_path)]) for name in ("a", "b")]
    assert both[0] == both[1]


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_whole_in_a_browser(width: int, tmp_path: Path) -> None:
    write_sweep_page(tmp_path / "sweep.html", "digits", [tried(0.2 + n / 9, n / 1000, tmp_path) for n in range(1, 7)])
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.goto((tmp_path / "sweep.html").as_uri())
        look(page, tmp_path / f"sweep-{width}.png")
