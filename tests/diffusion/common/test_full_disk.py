"""The disk fills up while ``train``, ``evaluate`` and ``sample`` write; ``ingest`` is in test_ingest_faults.py."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.builders import ROOT
from tests.builders.ingested import files_of
from tests.builders.small_models import write_model

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]

PARAMS = {
    "model": {"width": 16, "channel_mult": [1], "blocks": 1, "attention": [], "patch": 1},
    "training": {"dataset": "blobs", "images": 320, "checkpoints": 4, "batch_size": 16, "warmup_images": 16, "keep": 2},
    "sampling": {"steps": 2, "compute_batch": 8, "precision": "fp32"},
    "evaluation": {"samples": 16, "extractor_size": 32},
}
COMMAND = """
import sys
from pathlib import Path
from tests.chaos.paused import arm
point, *arguments = sys.argv[1:]
if point:
    arm(point, Path.cwd())
sys.argv = ["darkroom", *arguments]
from flows.cli import main
main()
"""
SAMPLE = ("sample", "--model", "weights.safetensors", "--count", "8", "--out", "made")
DRILLS = [
    (("train", "--local"), "diffusion.training.checkpointing:Checkpoints.save@3", "runs/blobs"),
    (("evaluate", "--local"), "diffusion.evaluation.cache:save_tensors", "reports/blobs"),
    (("evaluate", "--local"), "diffusion.evaluation.evaluate:write_json", "reports/blobs"),
    (
        ("sample", "--model", "weights.safetensors", "--count", "8", "--out", "made"),
        "diffusion.generation.requests:write_bytes@3",
        "made",
    ),
]
GROWING = {"losses.csv", "request.json"}
"""Files that grow under their names; a request's lists its images when all of them are there."""
MEASURED = {"history.csv", "preflight.json", "records.jsonl"}
"""Files with times in them, or that grow under their names."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 32 MB; only root can make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no small file system to be had here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def start(folder: Path, point: str, *command: str) -> subprocess.Popen[str]:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, point, *command],
        cwd=folder,
        env=variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors[-3000:]
    return errors


def workspace(folder: Path, dataset: Path, command: tuple[str, ...]) -> Path:
    """A working folder in which ``command`` can be given."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "blobs").symlink_to(dataset)
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    write_model(folder / "weights.safetensors", 1, 0)
    if "evaluate" in command:
        finish(start(folder, "", "train", "--local"))
    return folder


def finished(folder: Path) -> dict[str, bytes]:
    """The files in ``folder`` that are under their final names, but for those with times in them."""
    files = files_of(folder).items()
    return {name: data for name, data in files if not (Path(name).name.startswith(".") or Path(name).name in MEASURED)}


@pytest.mark.drill
@pytest.mark.parametrize(("command", "point", "output"), DRILLS, ids=[drill[1] for drill in DRILLS])
def test_full_disk_is_one_line_and_work_resumes(
    command: tuple[str, ...], point: str, output: str, dataset: Path, tmp_path: Path, small_disk: Path
) -> None:
    """A disk that is full while a command writes: one line, exit 1, no half file. With room again: the same end."""
    undisturbed = workspace(tmp_path / "undisturbed", dataset, command)
    folder = workspace(small_disk / "work", dataset, command)
    finish(start(undisturbed, "", *command))
    expected = finished(undisturbed / output)
    process, deadline = start(folder, point, *command), time.monotonic() + 120
    while not (folder / "here").exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with (folder / "filler").open("wb") as filler:
        # Two pages are left, for the mark by which it goes on.
        os.posix_fallocate(filler.fileno(), 0, shutil.disk_usage(small_disk).free - 8192)
    (folder / "go").touch()
    errors = finish(process, 1)
    [line] = [line for line in errors.splitlines() if line.startswith("darkroom: ")]
    assert "is full: free some space and give the same command again" in line
    assert "Traceback" not in errors
    for name, data in finished(folder / output).items():
        if name in expected and name not in GROWING:
            assert data == expected[name], f"{name} is not whole"
    (folder / "filler").unlink()
    finish(start(folder, "", *command))
    assert finished(folder / output) == expected


VERBS = [
    ("ingest", "images", "--local", "--dataset", "more", "--set", "ingest.size=16"),
    ("evaluate", "--local"),
    SAMPLE,
    ("edit", "interpolate", "7", "--model", "weights.safetensors", "--out", "between"),
    ("model", "export", "--to", "diffusers", "--model", "weights.safetensors", "--out", "exported"),
    ("data", "log", "--json"),
    ("config", "schema"),
    ("up",),
]


@pytest.mark.parametrize("command", VERBS, ids=" ".join)
def test_a_disk_without_room_is_one_line_of_any_command(
    command: tuple[str, ...], images: Path, dataset: Path, small_disk: Path
) -> None:
    """Standard output and temporary files are on the full disk as well."""
    folder = workspace(small_disk / "work", dataset, ("evaluate",) if "evaluate" in command else ())
    shutil.copytree(images, folder / "images")
    with (folder / "filler").open("wb") as filler, (folder / "answer").open("wb") as answer:
        os.posix_fallocate(filler.fileno(), 0, shutil.disk_usage(small_disk).free)
        variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
        process = subprocess.run(
            [sys.executable, "-c", COMMAND, "", *command],
            cwd=folder,
            env=variables,
            text=True,
            stdout=answer,
            stderr=subprocess.PIPE,
            check=False,
        )
    if command == ("up",):
        finish(start(folder, "", "down"))
    assert process.returncode == 1, process.stderr[-3000:]
    [line] = [line for line in process.stderr.splitlines() if line.startswith("darkroom: ")]
    assert "a disk is full: free some space" in line
    assert "Error" not in process.stderr
    assert "Errno" not in process.stderr
