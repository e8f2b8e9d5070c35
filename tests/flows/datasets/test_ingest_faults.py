"""Ingest under kills, a full disk and a lost connection: the same command again, and nothing is lost or there twice."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.builders.command_line import start as start_command
from tests.builders.forked import rounds
from tests.builders.ingested import files_of
from tests.builders.shapes import blob

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PARAMS = {"ingest": {"source": "images", "size": 32, "workers": 2}, "training": {"dataset": "set", "images": 64}}


def start(folder: Path, *settings: str) -> subprocess.Popen[str]:
    arguments = [argument for setting in settings for argument in ("--set", setting)]
    return start_command(folder, "ingest", "--local", *arguments)


def finish(folder: Path, *settings: str, code: int = 0) -> str:
    process = start(folder, *settings)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == code, errors[-3000:]
    return errors


def workspace(folder: Path, source: Path) -> Path:
    folder.mkdir()
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    (folder / "images").symlink_to(source)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Images for several shards, some of them there twice, some of no use."""
    root = tmp_path_factory.mktemp("source")
    for number in range(2400):
        path = root / ("even" if number % 2 == 0 else "odd") / f"{number:04d}.png"
        path.parent.mkdir(exist_ok=True)
        blob(number % 2300, 120, "RGB").save(path, compress_level=1)
    for number in range(40):
        (root / "odd" / f"bad{number}.png").write_text("not an image")
    return root


@pytest.mark.drill
@pytest.mark.parametrize("runner", ["threads", pytest.param("processes", marks=pytest.mark.long)])
def test_ingest_killed_at_random_moments_ends_in_the_bytes_of_an_undisturbed_one(
    source: Path, tmp_path: Path, runner: str, kills: int
) -> None:
    setting = f"ingest.runner={runner}"
    undisturbed = workspace(tmp_path / "undisturbed", source)
    start_time = time.monotonic()
    finish(undisturbed, setting)
    duration = time.monotonic() - start_time
    expected = files_of(undisturbed / "data" / "set")
    moments = random.Random(len(runner))
    for number, strikes in enumerate(rounds(kills)):
        folder = workspace(tmp_path / f"killed{number}", source)
        for _ in range(strikes):
            process = start(folder, setting)
            time.sleep(moments.uniform(0.3, 1.0) * duration)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        finish(folder, setting)
        assert files_of(folder / "data" / "set") == expected
        assert {path.name for path in (folder / "data" / ".set").iterdir()} == {"index.sqlite", "lock"}
        shutil.rmtree(folder)


@pytest.mark.long
@pytest.mark.drill
def test_an_ingest_that_adds_is_killed_and_ends_in_the_same_bytes(source: Path, tmp_path: Path, kills: int) -> None:
    growing = tmp_path / "growing"
    shutil.copytree(source / "even", growing / "even")
    folders = [workspace(tmp_path / name, growing) for name in ("undisturbed", "killed")]
    for folder in folders:
        finish(folder)
    shutil.copytree(source / "odd", growing / "odd")
    start_time = time.monotonic()
    finish(folders[0])
    duration = time.monotonic() - start_time
    moments = random.Random(7)
    for _ in range(kills):
        process = start(folders[1])
        time.sleep(moments.uniform(0.2, 0.9) * duration)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finish(folders[1])
    expected, files = (files_of(folder / "data" / "set") for folder in folders)
    assert files == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for part of the data set; only root can make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no small file system to be had here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.drill
def test_a_full_disk_is_one_line_and_the_same_command_goes_on_when_there_is_room(
    source: Path, tmp_path: Path, small_disk: Path
) -> None:
    undisturbed = workspace(tmp_path / "undisturbed", source)
    finish(undisturbed)
    folder = workspace(small_disk / "work", source)
    errors = finish(folder, code=1).strip().splitlines()
    assert "is full: free some space" in errors[-1]
    assert not any("Traceback" in line for line in errors)
    assert not (folder / "data" / "set" / "manifest.json").exists()
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    finish(folder)
    assert files_of(folder / "data" / "set") == files_of(undisturbed / "data" / "set")
