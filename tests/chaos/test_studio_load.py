"""The studio under load: many people at once, and SIGTERM in the middle of it."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from diffusion.common.image_grids import png_bytes
from flows.local_stack.server_process import choose_ports
from tests.builders.shapes import blob
from tests.builders.small_models import write_model
from tests.builders.studio_client import PASSWORD, logged_in
from tests.builders.waiting import wait_until_served
from tests.builders.workspace import Workspace

pytest.importorskip("gradio", reason="the studio needs Gradio: pip install 'darkroom-diffusion[ui]'")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PEOPLE = 40
"""More than events may wait for their turn."""
IMAGES = 16
MAX_GROWTH = 64 * 2**20
"""Bytes of memory that a wave of requests may leave behind after the same wave before it."""
MAX_MEMORY = 256 * 2**20
"""Bytes that the server may take in a wave beyond what it had."""
MAX_SECONDS = 20.0
"""Until it has ended after a SIGTERM, on a busy machine; a wave of requests takes longer."""


class Studio:
    """``darkroom ui`` for a model file, as its visitors reach it."""

    def __init__(self, folder: Path) -> None:
        weights = write_model(folder / "blobs.safetensors", 1, 0, classes={"even": 3, "odd": 1})
        self.address = f"http://127.0.0.1:{choose_ports(1)[0]}"
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        command = [sys.executable, "-c", "from flows.cli import main; main()", "ui", "--model", str(weights)]
        options = ["--no-browser", "--port", self.address.rpartition(":")[2]]
        variables = {"DARKROOM_UI_PASSWORD": PASSWORD, "TMPDIR": str(self.scratch)}
        self.process = subprocess.Popen(
            [*command, *options, "--set", "sampling.sampler=dpmpp_2m", "--set", "sampling.steps=8"],
            cwd=folder,
            env=Workspace(folder).variables | variables,
            text=True,
            stderr=subprocess.PIPE,
        )

    @property
    def memory(self) -> int:
        """Bytes of memory of its own."""
        return psutil.Process(self.process.pid).memory_full_info().uss

    def visitor(self) -> AbstractContextManager[httpx.Client]:
        """A browser that has logged in."""
        return logged_in(self.address, timeout=300)


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    """A studio that serves."""
    new_studio = Studio(tmp_path)
    try:
        wait_until_served(new_studio.address, new_studio.process)
        yield new_studio
    finally:
        new_studio.process.kill()
        new_studio.process.communicate()


def ask(client: httpx.Client, task: str, *values: object) -> Any:
    """What the page gets to show for the request of a form; None if it is told to come again."""
    call = client.post(f"gradio_api/call/{task}", json={"data": values})
    if call.status_code in (httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.TOO_MANY_REQUESTS):
        return None
    events = client.get(f"gradio_api/call/{task}/{call.raise_for_status().json()['event_id']}").raise_for_status().text
    kind, _, data = events.rpartition("event: ")[2].partition("\ndata: ")
    return json.loads(data) if kind == "complete" else None


def visit(studio: Studio, seed: int) -> int:
    """Generate, look at each image, upload one and have it changed; the number of images that came."""
    with studio.visitor() as client:
        result = ask(client, "sample", "odd", IMAGES, seed, 8, "dpmpp_2m", 1)
        images = [] if result is None else [each["image"]["url"] for each in result[0]]
        for url in images:
            image = client.get(f"gradio_api/file={url.partition('file=')[2]}")
            assert image.raise_for_status().content.startswith(b"\x89PNG")
        files = {"files": (f"{seed}.png", png_bytes(blob(seed, 8)), "image/png")}
        upload = client.post("gradio_api/upload", files=files)
        if upload.is_success:
            picture = {"path": upload.json()[0], "meta": {"_type": "gradio.FileData"}}
            changed = ask(client, "img2img", picture, 0.5, "odd", 1, seed, 8, "dpmpp_2m", 1)
            images += [] if changed is None else changed[0]
        return len(images)


@pytest.mark.drill
def test_the_studio_answers_under_load_and_ends_when_terminated(studio: Studio) -> None:
    done, answers = threading.Event(), list[int]()

    def look() -> None:
        with studio.visitor() as client:
            while not done.is_set():
                answers.append(client.get("config", timeout=60).status_code)

    def wave() -> int:
        with ThreadPoolExecutor(PEOPLE) as people:
            return sum(people.map(lambda seed: visit(studio, seed), range(PEOPLE)))

    assert visit(studio, 1000) == IMAGES + 1
    before, memory = studio.memory, list[int]()
    onlooker = threading.Thread(target=look, daemon=True)
    onlooker.start()
    for _ in range(3):
        assert wave() >= 8 * IMAGES  # who finds no place in the queue is told so
        memory.append(studio.memory)
    done.set()
    onlooker.join(300)
    assert len(answers) >= 3
    assert set(answers) == {200}
    assert memory[2] - memory[1] < MAX_GROWTH
    assert max(memory) - before < MAX_MEMORY
    assert visit(studio, 2000) == IMAGES + 1

    with ThreadPoolExecutor(PEOPLE) as people:
        made = len(list(studio.scratch.rglob("*.png")))
        visits = [people.submit(visit, studio, seed) for seed in range(PEOPLE)]
        while len(list(studio.scratch.rglob("*.png"))) == made:
            time.sleep(0.01)
        start = time.monotonic()
        studio.process.terminate()
        _, errors = studio.process.communicate(timeout=300)
        seconds = time.monotonic() - start
        for each in visits:
            each.exception()
    assert seconds < MAX_SECONDS
    assert studio.process.returncode == 0
    assert "Traceback" not in errors
    # Gradio makes empty folders of its own.
    assert not [path for path in studio.scratch.rglob("*") if path.is_file()]
