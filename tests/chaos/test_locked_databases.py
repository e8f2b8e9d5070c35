"""SQLite databases of the servers and of a data set that another program has locked for longer than one waits."""

import time
from contextlib import ExitStack

import pytest

from diffusion.data.ingest.index import LOCK_TIMEOUT
from tests.builders.ingested import files_of
from tests.builders.locked import locked
from tests.chaos.conftest import Undisturbed
from tests.chaos.house import House, Site, expect_exit
from tests.chaos.test_retrain import TRAINING

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SECONDS = 30.0
"""For which a server's database stays locked: several times as long as the servers themselves wait."""


@pytest.mark.drill
@pytest.mark.parametrize("name", ["mlflow", "prefect"])
def test_locked_databases_of_servers_are_waited_for_or_named(
    house: House, site: Site, undisturbed: Undisturbed, name: str
) -> None:
    database = house.stack.folder / name / f"{name}.db"
    if name == "mlflow":  # in Prefect's, one can read meanwhile
        with locked(database):
            assert "locked its database" in expect_exit(site.start(*site.retraining), 1)
    with ExitStack() as stack:
        with site.paused(TRAINING) as process:
            stack.enter_context(locked(database))
        time.sleep(SECONDS)
    expect_exit(process, 0)
    result = site.json(*site.retraining)
    assert result["skipped"]
    assert site.end(result) == undisturbed.end


@pytest.mark.drill
@pytest.mark.parametrize("name", ["index", "captions"])
def test_locked_databases_of_a_data_set_are_named(house: House, site: Site, name: str) -> None:
    captioner = ("--set", "ingest.captioner={command: [echo, a disc], version: one}", "--dataset", site.name)
    both = [("ingest", str(house.images / label), *captioner) for label in ("even", "odd")]
    other = house.site(site.folder.parent / "other" / site.name)
    other.run(*both[0], "--local")
    other.run(*both[1], "--local")
    site.run(*both[0])
    with locked(site.folder / "data" / f".{site.name}" / f"{name}.sqlite"):
        start = time.monotonic()
        assert f"{name}.sqlite" in expect_exit(site.start(*both[1]), 1)
        assert time.monotonic() - start > LOCK_TIMEOUT
    site.run(*both[1])
    assert files_of(site.folder / "data" / site.name) == files_of(other.folder / "data" / site.name)
