"""What a person finds in MLflow's UI and in the pages on the run, in a browser on a real stack."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.client import MlflowClient
from playwright.sync_api import Browser, Page, expect

from tests.builders.browser import chromium, look
from tests.builders.workspace import PARAMS, Workspace, running

pytestmark = [pytest.mark.long, pytest.mark.slow, pytest.mark.timeout(900)]

QUICK = {
    "training": {**PARAMS["training"], "images": 320, "checkpoints": 3, "warmup_images": 16, "keep": 3},
    "evaluation": {"samples": 24, "extractor_size": 32, "finalists": 2},
}
PATIENCE = 60_000
"""Milliseconds that a page may take on a busy machine."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A running stack with two versions of blobs, one of them the champion."""
    with running(tmp_path_factory.mktemp("workspace"), PARAMS | QUICK, 120) as space:
        space.two_versions()
        yield space


def open_page(browser: Browser, workspace: Workspace, place: str) -> Page:
    """A page of MLflow's UI."""
    own = workspace.variables
    credentials = {"username": own["MLFLOW_TRACKING_USERNAME"], "password": own["MLFLOW_TRACKING_PASSWORD"]}
    page = browser.new_context(http_credentials=credentials, viewport={"width": 1400, "height": 1100}).new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(f"{own['MLFLOW_TRACKING_URI']}/#/{place}")
    return page


def test_mlflows_ui_shows_version_alias_card_and_images(
    workspace: Workspace, server: MlflowClient, tmp_path: Path
) -> None:
    with chromium() as browser:
        page = open_page(browser, workspace, "models/blobs")
        expect(page.get_by_text("Version 1").first).to_be_visible(timeout=PATIENCE)
        expect(page.get_by_text("champion").first).to_be_visible(timeout=PATIENCE)
        page.screenshot(path=tmp_path / "model.png")
        page = open_page(browser, workspace, "models/blobs/versions/1")
        for heading in ("Gate decision", "How good it is", "Data", "Limits"):
            expect(page.get_by_role("heading", name=heading, exact=True)).to_be_visible(timeout=PATIENCE)
        # MLflow takes the names of images away.
        samples = page.locator("img[src*='evaluation%2Fgrids']")
        samples.scroll_into_view_if_needed()
        page.wait_for_function("image => image.complete", arg=samples.element_handle())
        page.screenshot(path=tmp_path / "version.png", full_page=True)
        assert samples.evaluate("image => image.naturalWidth") > 0


def test_evaluated_checkpoints_are_logged_models_in_the_mlflow_ui(
    workspace: Workspace, server: MlflowClient, tmp_path: Path
) -> None:
    run = server.get_run(server.get_model_version("blobs", "1").run_id)
    logged_models = server.search_logged_models(
        [run.info.experiment_id],
        order_by=[{"field_name": "metrics.eval/kid_efflite0", "ascending": True, "dataset_name": "blobs"}],
    )
    own_models = [model for model in logged_models if model.source_run_id == run.info.run_id]
    tags = {model.name: model.tags["darkroom.evaluated"] for model in own_models if "darkroom.evaluated" in model.tags}
    assert sorted(tags.values()) == ["in full", "in full", "preliminary"]
    with chromium() as browser:
        page = open_page(browser, workspace, f"experiments/{run.info.experiment_id}/models")
        for name in tags:
            expect(page.get_by_text(name).first).to_be_visible(timeout=PATIENCE)
        page.screenshot(path=tmp_path / "evaluated.png")


def test_the_comparison_on_the_run_is_whole_in_a_browser(
    workspace: Workspace, server: MlflowClient, tmp_path: Path
) -> None:
    run_id = server.get_model_version("blobs", "2").run_id
    page_file = server.download_artifacts(run_id, "evaluation/champion_comparison.html", str(tmp_path))
    [*_, entry] = workspace.json("model", "history")["entries"]
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(Path(page_file).as_uri())
        look(page, tmp_path / "champion_comparison.png")
        assert page.locator("h1 .verdict").inner_text().lower() == entry["what"]
        expect(page.get_by_role("heading", name="version 2 against version 1, the champion")).to_be_visible()
        assert page.get_by_role("img", name="and its nearest training image").count() > 0


def test_the_report_on_the_run_is_whole_in_a_browser(
    workspace: Workspace, server: MlflowClient, tmp_path: Path
) -> None:
    run_id = server.get_model_version("blobs", "1").run_id
    report = server.download_artifacts(run_id, "evaluation/report.html", str(tmp_path))
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(Path(report).as_uri())
        look(page, tmp_path / "report.png")
        expect(page.get_by_role("heading", name="Best of 3")).to_be_visible()
        expect(page.get_by_text("not evaluated in full", exact=True)).to_have_count(1)
