"""Commands that are killed leave no process behind: those that need no server."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.builders import ROOT
from tests.builders.left_behind import descendants, left_behind, new_process_tag
from tests.builders.shapes import blob

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

DARKROOM = "import sys; sys.argv[0] = 'darkroom'; from flows.cli import main; main()"
PARAMS = {
    "ingest": {"source": "images", "size": 32, "workers": 2, "runner": "processes"},
    "model": {"width": 16, "channel_mult": [1], "blocks": 1, "attention": [], "patch": 1},
    "training": {"dataset": "set", "images": 10_000_000, "batch_size": 16, "warmup_images": 32},
}


def start(folder: Path, mark: dict[str, str], *command: str) -> subprocess.Popen[bytes]:
    variables = os.environ | mark | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output = (folder / "output").open("ab")
    return subprocess.Popen(command, cwd=folder, env=variables, stdout=output, stderr=output, start_new_session=True)


def wait_for(count: int, mark: dict[str, str], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while len(descendants(mark)) < count:
        assert process.poll() is None, log.read_text()[-2000:]
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.02)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with a configuration, and images for a few seconds of work."""
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    (tmp_path / "images").mkdir()
    for number in range(600):
        blob(number, 120, "RGB").save(tmp_path / "images" / f"{number:04d}.png", compress_level=1)
    return tmp_path


@pytest.mark.drill
def test_an_ingest_killed_alone_takes_its_processes_along(folder: Path) -> None:
    """SIGKILL to `ingest --local` alone while its workers work: they, the fork server and the resource tracker end."""
    mark = new_process_tag()
    process = start(folder, mark, sys.executable, "-c", DARKROOM, "ingest", "--local")
    # The command, a resource tracker, a fork server and two workers.
    wait_for(5, mark, process, folder / "output")
    process.kill()
    process.wait()
    assert left_behind(mark) == []


@pytest.mark.drill
def test_ranks_end_when_torchrun_is_killed(dataset: Path, tmp_path: Path) -> None:
    """SIGKILL to torchrun while two processes train: neither of them trains on."""
    work = tmp_path / "work"
    (work / "data").mkdir(parents=True)
    (work / "data" / "set").symlink_to(dataset)
    (work / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    mark = new_process_tag()
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--")
    command = work / "command.py"
    command.write_text(DARKROOM)
    process = start(work, mark, *torchrun, str(command), "train", "--local")
    deadline = time.monotonic() + 120
    while not (work / "runs" / "set" / "history.csv").exists():
        assert process.poll() is None, (work / "output").read_text()[-2000:]
        assert time.monotonic() < deadline, (work / "output").read_text()[-2000:]
        time.sleep(0.05)
    assert len(descendants(mark)) >= 3
    process.kill()
    process.wait()
    assert left_behind(mark) == []
