"""What was not synced is lost when the power is cut: ``ingest`` at a few moments, and what a disk may have, by hand.

tests/chaos/test_power_cut.py has other commands and more moments.
"""

import random
from pathlib import Path

import pytest

from tests.chaos.power_cut import Loss, Recording, library, record
from tests.chaos.power_drills import adding_drill

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT_WITHOUT_FSYNC = """
import os
from pathlib import Path
Path("new").mkdir()
Path("new/renamed.partial").write_bytes(b"data")
os.replace("new/renamed.partial", "new/renamed")
Path("synced").write_bytes(b"data")
with open("synced", "r+b") as file:
    os.fsync(file)
    file.write(b"more")
    file.flush()
"""


def files_after(recording: Recording, folder: Path, loss: Loss) -> tuple[dict[str, bytes], list[str]]:
    """The files at the end, and which of them are torn."""
    [(disk, ended)] = recording.cuts(0, random.Random(0))
    assert ended
    disk.write_to(folder / loss.name, loss, random.Random(0))
    paths = [path for path in (folder / loss.name).rglob("*") if path.is_file()]
    files = {path.relative_to(folder / loss.name).as_posix(): path.read_bytes() for path in paths}
    return files, disk.torn(folder / loss.name)


def test_a_program_that_syncs_nothing_loses_names_and_tears_files(tmp_path: Path) -> None:
    """Power cut after a rename that nothing was synced before: the drill finds the file empty under its new name."""
    (tmp_path / "root").mkdir()
    recording = record(library(tmp_path), tmp_path / "root", SCRIPT_WITHOUT_FSYNC)
    assert files_after(recording, tmp_path, Loss.ALL) == ({}, [])
    assert files_after(recording, tmp_path, Loss.DATA) == ({"new/renamed": b"", "synced": b"data"}, ["new/renamed"])
    # Written over: what was synced is as long as what is lost.
    assert files_after(recording, tmp_path, Loss.ZEROS) == (
        {"new/renamed": bytes(4), "synced": b"data"},
        ["new/renamed"],
    )


@pytest.mark.long
@pytest.mark.drill
def test_ingest_after_a_power_cut_gives_identical_bytes(tmp_path: Path) -> None:
    """Power cut while `ingest` adds images: whatever was not synced is lost, no file is torn, the same end."""
    assert adding_drill(tmp_path).run(tmp_path, cuts=3, seed=7) == 16
