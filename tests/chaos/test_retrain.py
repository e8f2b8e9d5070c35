"""``retrain`` while its process, its disk, its clock and the servers beside it fail: the same command, the same end.

Kills and signals at random moments are in test_signals.py.
"""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from diffusion.common.files import write_bytes
from tests.builders.waiting import wait_for
from tests.chaos.conftest import Undisturbed
from tests.chaos.house import House, Site, expect_exit, fill

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TRAINING = "diffusion.training.checkpointing:Checkpoints.save@3"
"""In the middle of it."""
SAMPLING = "flows.sampling.generate_batch:_put_files@1"
"""Before the first images are there."""
STEPS = (
    "diffusion.api.engine:ingest",  # ingest: nothing is there
    "flows.datasets.catalog:Catalog.publish",  # pushed, and in no catalog
    "diffusion.api.engine:train",  # train: no run is there
    TRAINING,
    "flows.tracking.runs:RunTracker.finish",  # trained, and the run goes on
    "diffusion.api.engine:evaluate",  # evaluate
    "flows.evaluate:log_evaluation",  # evaluated, and MLflow knows nothing
    "flows.promote:export",  # promote
    "flows.promote:compare_with_champion",  # a version, and no verdict
    "flows.promote:project",  # in the ledger, and nowhere else
    "flows.sampling.generate_batch:begin",  # sample
    SAMPLING,
    "flows.sampling.generate_batch:finish",  # all are, and no manifest
    "flows.retrain:RetrainRequest.write_note",  # all is done, and nothing says so
)
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


@pytest.mark.drill
def test_retraining_killed_in_every_step_ends_the_same(site: Site, undisturbed: Undisturbed) -> None:
    for point in STEPS:
        site.killed_at(point)
    result = site.json(*site.retraining)
    assert not result["skipped"]
    assert site.end(result) == undisturbed.end
    assert site.json(*site.retraining)["skipped"]


@pytest.mark.drill
@pytest.mark.parametrize("point", [TRAINING, SAMPLING], ids=["training", "sampling"])
def test_prefects_server_may_be_restarted_meanwhile(
    house: House, site: Site, undisturbed: Undisturbed, point: str
) -> None:
    with site.paused(point) as process:
        house.kill("prefect")
    # The training or sampling is done by now, and nobody was told.
    time.sleep(5)
    house.start("prefect")
    expect_exit(process, 0)
    result = site.json(*site.retraining)
    assert result["skipped"]
    assert site.end(result) == undisturbed.end


@pytest.mark.drill
def test_mlflow_may_be_away_while_it_trains(house: House, site: Site, undisturbed: Undisturbed) -> None:
    with site.paused(TRAINING) as process:
        house.kill("mlflow")
    wait_for(lambda: site.final.exists() or process.poll() is not None)
    house.start("mlflow")
    expect_exit(process, 0)
    assert site.end(site.json(*site.retraining)) == undisturbed.end


@pytest.mark.drill
def test_concurrent_retrainings_train_once_under_the_limit(house: House, site: Site, undisturbed: Undisturbed) -> None:
    url, secret = (house.workspace.variables[f"PREFECT_API_{name}"] for name in ("URL", "AUTH_STRING"))
    user, _, password = secret.partition(":")
    # As `darkroom deploy` makes it.
    limit = {"name": f"retrain-{site.name}", "limit": 1}
    httpx.post(f"{url}/v2/concurrency_limits/", json=limit, auth=(user, password)).raise_for_status()
    with site.paused(TRAINING) as first:
        second = site.start(*site.retraining, "--json")
        time.sleep(5)
    expect_exit(first, 0)
    expect_exit(second, 0)
    result = site.json(*site.retraining)
    assert result["skipped"]
    assert site.end(result) == undisturbed.end


@pytest.mark.drill
def test_second_concurrent_retraining_fails_without_a_deployment(site: Site, undisturbed: Undisturbed) -> None:
    with site.paused(TRAINING) as first:
        assert "another process trains in" in site.run(*site.retraining, code=2)
    expect_exit(first, 0)
    assert site.end(site.json(*site.retraining)) == undisturbed.end


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 64 MB; only root can make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no small file system to be had here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.drill
@pytest.mark.parametrize("point", [TRAINING, "diffusion.api.engine:evaluate", "flows.sampling.generate_batch:begin"])
def test_full_disk_gives_a_one_line_error_and_retraining_resumes(
    house: House, small_disk: Path, undisturbed: Undisturbed, point: str
) -> None:
    site = house.site(small_disk / f"full-{STEPS.index(point)}")
    with site.paused(point) as process:
        fill(small_disk, site.folder / "filler")
    assert "is full: free some space and give the same command again" in expect_exit(process, 1)
    (site.folder / "filler").unlink()
    assert site.end(site.json(*site.retraining)) == undisturbed.end


@pytest.fixture
def clock(site: Site) -> Path:
    """A file that says by how many seconds the clock of what ``site`` starts is ahead, ten minutes at first.

    Written whole, as it is read at every look at the clock. Never behind: libfaketime takes a sleep until a monotonic
    time for one until a time of the day, and oversleeps.
    """
    if FAKETIME is None:
        pytest.skip("libfaketime is not installed: apt-get install faketime")
    file = site.folder / "clock"
    write_bytes(file, b"+600")
    site.variables |= {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1",
        # Nothing sets the monotonic clock, and none but it is to be waited by.
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    return file


@pytest.mark.drill
def test_clock_jumps_are_tolerated_and_a_wrong_clock_is_named(
    site: Site, undisturbed: Undisturbed, clock: Path
) -> None:
    with site.paused(TRAINING) as process:
        write_bytes(clock, b"+0")
    expect_exit(process, 0)
    write_bytes(clock, b"+86400")
    assert "clock" in site.run(*site.retraining, code=2)
    write_bytes(clock, b"+300")
    assert site.end(site.json(*site.retraining)) == undisturbed.end
