"""Take the screenshots of the landing page, as small PNGs in ``docs/images``.

    python docs/screenshots.py studio
    python docs/screenshots.py gate demo/reports/digits/champion_comparison.html

``studio`` starts the studio with the model in ``examples/``, and asks it for one prompt.
"""

import argparse
import io
import os
import re
import secrets
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
MAX_BYTES = 150_000
SIZE: ViewportSize = {"width": 1280, "height": 840}


def save(page: Page, name: str) -> None:
    """Write what is seen of ``page`` with as many colours as fit ``MAX_BYTES``."""
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    for colours in (256, 128, 64):
        data = io.BytesIO()
        shot.quantize(colours).save(data, "PNG", optimize=True)
        if data.tell() <= MAX_BYTES:
            break
    (IMAGES / name).write_bytes(data.getvalue())
    print(f"{IMAGES / name}: {data.tell():,} bytes")


def take_studio(browser: Browser) -> None:
    """Log in, generate for a prompt, and save the first tab."""
    password = secrets.token_urlsafe()
    command = [
        sys.executable,
        "-c",
        "from flows.cli import main; main()",
        "ui",
        "--model",
        str(ROOT / "examples" / "things.safetensors"),
    ]
    variables = os.environ | {"DARKROOM_UI_PASSWORD": password, "BROWSER": "true", "PYTHONPATH": str(ROOT)}
    variables |= {"DARKROOM_MAX_REQUEST_SECONDS": "900"}  # on a busy machine
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables
    ) as process:
        try:
            assert process.stdout is not None
            address = next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
            page = browser.new_page(viewport=SIZE)
            page.set_default_timeout(900_000)
            page.goto(address)
            page.get_by_label("username").fill("darkroom")
            page.get_by_label("password").fill(password)
            page.get_by_role("button", name="Login").click()
            page.get_by_label("Prompt", exact=True).locator("visible=true").first.fill("a red car")
            page.get_by_role("button", name="Generate", exact=True).click()
            page.get_by_text("8 images of seed").locator("visible=true").first.wait_for()
            page.wait_for_timeout(3000)
            save(page, "studio.png")
        finally:
            process.terminate()


def take_gate(browser: Browser, report: Path) -> None:
    """Save the first screen of a page on which the gate compares."""
    page = browser.new_page(viewport=SIZE)
    page.goto(report.resolve().as_uri())
    page.wait_for_timeout(1000)
    save(page, "gate.png")


def main() -> None:
    """Take one of the two."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shot", choices=("studio", "gate"))
    parser.add_argument("report", type=Path, nargs="?", help="champion_comparison.html, for gate")
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        options = {"executable_path": "/usr/bin/chromium", "args": ["--no-sandbox"]}
        with closing(playwright.chromium.launch(**options)) as browser:  # type: ignore[arg-type]
            if arguments.shot == "studio":
                take_studio(browser)
            elif arguments.report is None:
                parser.error("name the page: champion_comparison.html of a data set's reports")
            else:
                take_gate(browser, arguments.report)


if __name__ == "__main__":
    main()
