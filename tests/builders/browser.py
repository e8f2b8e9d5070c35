"""Debian's Chromium, as a reader of pages."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.builders.studio_client import PASSWORD, USER


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; the test is skipped where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no chromium here")
    # Machines that run tests are busy.
    expect.set_options(timeout=30_000)
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=program, args=["--no-sandbox"]) as browser,
    ):
        yield browser


def look(page: Page, shot: Path) -> None:
    """Keep what is seen, and require that all images are there and nothing lies beyond the right edge."""
    page.screenshot(path=shot, full_page=True)
    # Those of hidden tabs are loaded when the tab is opened.
    shown = "[...document.images].filter(image => image.offsetParent)"
    images = page.evaluate(f"{shown}.map(image => [image.alt, image.complete, image.naturalWidth])")
    assert images
    assert [alt for alt, complete, width in images if not (complete and width > 0)] == []
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def log_in(page: Page, address: str) -> None:
    """Log in to the studio at ``address``."""
    page.goto(address)
    page.get_by_label("username").fill(USER)
    page.get_by_label("password").fill(PASSWORD)
    page.get_by_role("button", name="Login").click()
