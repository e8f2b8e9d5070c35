"""The page to choose thresholds on: its numbers, its safety, and what a browser makes of it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from diffusion.curation.config import CurationConfig
from diffusion.curation.curate import curate
from diffusion.curation.report import CurationPage, write_curation_report
from diffusion.curation.rules import Rule
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.evaluation.config import EvaluationConfig
from tests.builders.browser import chromium, look
from tests.builders.ingested import files_of
from tests.builders.planted import plant, scene

HOSTILE = "</script><img src=x onerror=alert(1)>\u202egnp.png"


class Redness(Rule):
    """A rule of another package: the mean share of red."""

    title = "Redness"
    meaning = "mean share of red"
    bound = "max"

    def measure(self, images: np.ndarray, luma: np.ndarray) -> np.ndarray:
        means: np.ndarray = images.mean((1, 2))
        return np.asarray(means[:, 0] / np.maximum(means.sum(1), 1e-6))


RULES = CurationConfig(
    min_entropy=2, min_sharpness=1.2345678, min_brightness=3.3, max_brightness=251.5, max_dropped=0.9, max_text=1
).model_copy(update={"rules": {"redness": Redness(max=1)}})


@pytest.fixture(scope="module", autouse=True)
def installed_rule() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("diffusion.curation.config.all_rules", lambda: {"redness": Redness})
        yield


@pytest.fixture(scope="module")
def written_page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, IngestConfig, CurationPage]:
    root = tmp_path_factory.mktemp("page")
    plant(root / "images", 40)
    (root / "images" / "<").mkdir()
    scene(99).save(root / "images" / "<" / HOSTILE.rpartition("/")[2])
    config = IngestConfig(source=str(root / "images"), size=48, workers=1)
    ingest(root / "data" / "set", config)
    before = files_of(root / "data" / "set")
    page = write_curation_report(root / "data" / "set", root / "page.html", RULES, config, EvaluationConfig())
    assert files_of(root / "data" / "set") == before
    return root, config, page


def data_of(root: Path) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', (root / "page.html").read_text())
    assert match is not None
    return dict(json.loads(match[1]))


def test_numbers_at_thresholds_are_those_that_curation_drops(
    written_page: tuple[Path, IngestConfig, CurationPage],
) -> None:
    root, config, page = written_page
    data = data_of(root)
    assert data["total"] == page.images
    for name in ("sharpness", "border", "text", "redness"):
        (panel,) = (each for each in data["panels"] if each["name"] == name)
        assert sum(panel["counts"]) == page.images
        for place in (len(panel["limits"]) // 8, len(panel["limits"]) // 4):
            limit = panel["limits"][place]
            fields = {"rules": {"redness": {"max": limit}}} if name == "redness" else {panel["rule"]: limit}
            rules = CurationConfig.model_validate(fields | {"max_dropped": 1})
            result = curate(root / "data" / "set", rules, config, EvaluationConfig(), dry_run=True)
            assert panel["dropped"][place] == result.dropped
        assert (np.diff(panel["dropped"]) >= 0).all()
    assert page.dropped == 4
    assert page.near_duplicates >= 12


def test_configured_rules_are_kept_as_they_are(written_page: tuple[Path, IngestConfig, CurationPage]) -> None:
    data = data_of(written_page[0])
    assert CurationConfig.model_validate(data["rules"]) == RULES
    configured = {panel["rule"]: panel["limit"] for panel in data["panels"] if panel["limit"] is not None}
    assert configured == {setting: limit for setting, _, _, limit in RULES.limits if setting != "max_brightness"}
    for panel in data["panels"]:
        assert panel["limit"] is None or panel["limit"] in panel["limits"]
        assert panel["limits"] == sorted(panel["limits"], reverse=panel["bound"] == "max")


def test_page_is_self_contained_and_escapes_names(written_page: tuple[Path, IngestConfig, CurationPage]) -> None:
    html = (written_page[0] / "page.html").read_text()
    assert html.count("</script>") == 2
    assert "<img src=x" not in html
    # Neither as it is nor as JSON escapes it: a browser would write backwards what follows it.
    sources = [each["source"] for panel in data_of(written_page[0])["panels"] for each in panel["strip"]]
    assert not any("\u202e" in source for source in sources)
    assert any("\\u202e" in source for source in sources)
    assert not re.search(r"(src|href)=[\"']?https?:", html)
    assert "prefers-color-scheme: dark" in html
    markup = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert not re.search(r"(src|href|url)\s*[=(]", markup)
    assert "max_border" in markup


@pytest.mark.slow
@pytest.mark.long
def test_sliders_show_images_and_write_lines_that_are_valid(
    written_page: tuple[Path, IngestConfig, CurationPage], tmp_path: Path
) -> None:
    with chromium() as browser:
        for width in (1200, 390):
            page = browser.new_page(viewport={"width": width, "height": 900})
            problems: list[str] = []
            page.on("pageerror", lambda error, element=problems: element.append(str(error)))  # type: ignore[misc]
            page.on("dialog", lambda dialog, element=problems: (element.append("dialog"), dialog.dismiss()))  # type: ignore[misc]
            page.goto((written_page[0] / "page.html").as_uri())
            assert CurationConfig.model_validate(yaml.safe_load(page.inner_text("#yaml"))["curation"]) == RULES
            page.locator("#sharpness input[type=range]").fill("40")
            page.locator("select[data-verdict=near_duplicates]").select_option("largest")
            assert page.locator("#sharpness .dropped img").count() > 0
            assert page.locator("#sharpness .stays img").count() > 0
            rules = CurationConfig.model_validate(yaml.safe_load(page.inner_text("#yaml"))["curation"])
            assert rules.min_sharpness is not None
            assert rules.min_sharpness != RULES.min_sharpness
            expected_rules = {"min_sharpness": rules.min_sharpness, "near_duplicates": "largest"}
            assert rules == RULES.model_copy(update=expected_rules)
            page.locator("#entropy input[type=checkbox]").uncheck()
            assert "min_entropy" not in page.inner_text("#yaml")
            assert f"= {rules.min_sharpness:g} drops" in page.inner_text("#sharpness output")
            look(page, tmp_path / f"{width}.png")
            assert problems == []
