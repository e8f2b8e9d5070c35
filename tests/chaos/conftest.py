"""The stack that the drills of a process share."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from diffusion.common.files import digest_of
from tests.builders.forked import Forks
from tests.builders.workspace import running
from tests.chaos.house import NIGHT, QUICK, House, Site
from tests.chaos.poison import poison


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A stack, and 120 images among which some are poisoned."""
    folder = tmp_path_factory.mktemp("house")
    with running(folder, QUICK, 120) as space, pytest.MonkeyPatch.context() as patch:
        space.join(patch)
        poison(folder / "images" / "odd", folder / "unpickled")
        new_house = House(space)
        new_house.admit(NIGHT)
        yield new_house


@pytest.fixture(scope="session")
def forks(house: House) -> Iterator[Forks]:
    """Commands on the stack that need not import anything first."""
    new_forks = Forks(house.workspace.variables)
    try:
        yield new_forks
    finally:
        new_forks.close()


@dataclass(frozen=True)
class Undisturbed:
    """A retraining that nothing happened to."""

    site: Site
    done: dict[str, Any]
    """What it said."""
    end: dict[str, Any]
    """How every other is to end."""


@pytest.fixture(scope="session")
def undisturbed(house: House, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The same for all drills."""
    site = house.site(Path(tmp_path_factory.mktemp("undisturbed")))
    result = site.json(*site.retraining)
    return Undisturbed(site, result, site.end(result))


@pytest.fixture
def site(house: House, tmp_path: Path, request: pytest.FixtureRequest) -> Site:
    """A machine of the test's own, with a data set and a model that no other test on the stack has."""
    name = request.node.name.removeprefix("test_")[:32].strip("_").replace("_", "-")
    # Cut off, the names of two tests may be the same, and what the first one did would be done for the second.
    return house.site(tmp_path / f"{name}-{digest_of(request.node.nodeid)[:6]}")
