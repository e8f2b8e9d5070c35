"""Images and small data sets that many tests start from."""

import gc
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tenacity import wait_none

from diffusion.common.hub import hub_client
from tests.builders.command_line import CommandLine
from tests.builders.small_datasets import ingest_blobs, write_blobs
from tests.hub import Hub, hub_server

# How long an example takes is a matter of the machine. The same examples everywhere; `make test-long` tries others.
settings.register_profile("darkroom", deadline=None, derandomize=True, database=None)
settings.register_profile("random", deadline=None, derandomize=False, database=None, print_blob=True)
settings.load_profile("darkroom")


KILLS = int(os.environ.get("KILLS", "2"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests an hour where there are more kills than their own limits are for."""
    if KILLS > 2:
        for item in items:
            item.add_marker(pytest.mark.timeout(3600), append=False)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Spare the garbage collector the modules that all tests import: a quarter of the time of collecting tests."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Networks this small gain nothing from a second thread, and lose much to waiting for it on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line in this process would send signals again for all later tests."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)


@pytest.fixture
def kills() -> int:
    """How many kills at random moments a drill tries."""
    return KILLS


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """``darkroom`` in this process."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    return CommandLine(monkeypatch, capsys)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with 2 classes of 24 grey images each, 12×12."""
    return write_blobs(tmp_path / "images")


@pytest.fixture
def dataset(images: Path, tmp_path: Path) -> Path:
    """The data set made of ``images`` at 8×8, about a third of it held out."""
    return ingest_blobs(images, tmp_path / "data" / "blobs")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hugging Face Hub on this machine, which the real client asks; without a token."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hub_client.cache_clear()
    monkeypatch.setattr("diffusion.common.http_client.PAUSE", wait_none())
    with hub_server() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        yield hub
