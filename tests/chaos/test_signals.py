"""Commands that are terminated at random moments, as by systemd, Kubernetes, Slurm and Ctrl-C.

Each ends within a bounded time and without a traceback, leaves no process behind, and given again ends as if nothing
had happened.
"""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals

import pytest
from safetensors.torch import load_file

from diffusion.common.files import sha256_bytes
from tests.builders.forked import Forks, rounds
from tests.chaos.conftest import Undisturbed
from tests.chaos.house import COUNT, House, Site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def steps(site: Site) -> list[tuple[str, ...]]:
    """What ``retrain`` consists of."""
    return [
        ("ingest", str(site.house.images)),
        ("train",),
        ("evaluate",),
        ("promote",),
        ("sample", "--count", str(COUNT)),
    ]


@pytest.fixture(scope="module")
def seconds(house: House, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """How long each command takes that nothing happens to."""
    site, durations = house.site(tmp_path_factory.mktemp("measured") / "measured"), {}
    for arguments in steps(site):
        start = time.monotonic()
        forks.finish(site.folder, *arguments)
        durations[arguments[0]] = time.monotonic() - start
    return durations | {"retrain": sum(durations.values())}


@pytest.fixture
def sites(house: House, tmp_path: Path) -> Callable[[Signals, int], Site]:
    """Machines that nobody has used."""
    # Of two runs of one test on one stack, too, none finds what the other did.
    return lambda number, index: house.site(tmp_path / f"{tmp_path.name[:24]}-{number.name.lower()}-{index}")


@pytest.mark.drill(
    "each step is terminated",
    "SIGTERM, or SIGINT, at random moments of ingest, train, evaluate, promote and sample",
    "ends in time, with its signal's code, without traceback or children; the same command: the same end",
)
@pytest.mark.parametrize("number", [SIGTERM, SIGINT], ids=lambda number: number.name)
def test_terminated_steps_resume_to_the_same_result(
    forks: Forks,
    sites: Callable[[Signals, int], Site],
    seconds: dict[str, float],
    undisturbed: Undisturbed,
    number: Signals,
    kills: int,
    record_property: Callable[[str, object], None],
) -> None:
    moments = random.Random(number)
    record_property("kills", kills * len(seconds))
    for index, strikes in enumerate(rounds(kills)):
        site = sites(number, index)
        for arguments in steps(site):
            for _ in range(strikes):
                moment = moments.uniform(0, seconds[arguments[0]])
                forks.strike(number, moment, site.folder, *arguments)
            forks.finish(site.folder, *arguments)
        result = json.loads(forks.finish(site.folder, *site.retraining, "--json"))
        assert site.end(result) == undisturbed.end


@pytest.mark.drill(
    "`retrain` is terminated",
    "SIGTERM, or SIGINT, at random moments",
    "ends in time, with its signal's code, without traceback or children; the same command: the same end",
)
@pytest.mark.parametrize("number", [SIGTERM, SIGINT], ids=lambda number: number.name)
def test_terminated_retraining_resumes_to_the_same_result(
    forks: Forks,
    sites: Callable[[Signals, int], Site],
    seconds: dict[str, float],
    undisturbed: Undisturbed,
    number: Signals,
    kills: int,
) -> None:
    moments = random.Random(number)
    for index, strikes in enumerate(rounds(kills)):
        site = sites(number, index)
        for _ in range(strikes):
            forks.strike(number, moments.uniform(0, seconds["retrain"] / 2), site.folder, *site.retraining)
        result = json.loads(forks.finish(site.folder, *site.retraining, "--json"))
        assert site.end(result) == undisturbed.end
        assert json.loads(forks.finish(site.folder, *site.retraining, "--json"))["skipped"]


@pytest.mark.drill(
    "`distill` and `sweep` are terminated",
    "SIGTERM, or SIGINT, at random moments",
    "ends in time, with its signal's code, without traceback or children; the same command: the same end",
)
@pytest.mark.parametrize("number", [SIGTERM, SIGINT], ids=lambda number: number.name)
def test_terminated_distillations_and_sweeps_resume_to_the_same_result(
    forks: Forks, sites: Callable[[Signals, int], Site], number: Signals, kills: int
) -> None:
    moments = random.Random(number)
    undisturbed_site, durations = sites(number, 0), dict[str, float]()
    forks.finish(undisturbed_site.folder, *undisturbed_site.retraining)
    for command in derivations(undisturbed_site):
        start = time.monotonic()
        forks.finish(undisturbed_site.folder, *command, codes=DECISION_CODES)
        durations[command[0]] = time.monotonic() - start
    for index, strikes in enumerate(rounds(kills), start=1):
        site = sites(number, index)
        forks.finish(site.folder, *site.retraining)
        for command in derivations(site):
            for _ in range(strikes):
                moment = moments.uniform(0, durations[command[0]])
                forks.strike(number, moment, site.folder, *command, codes=DECISION_CODES)
            forks.finish(site.folder, *command, codes=DECISION_CODES)
        assert student_and_ranking(site, forks) == student_and_ranking(undisturbed_site, forks)


DECISION_CODES = (0, 3)
"""Codes of a command that ends by itself: the gate promotes the student, or it does not."""


def derivations(site: Site) -> list[tuple[str, ...]]:
    """Commands that train from what ``retrain`` made."""
    teacher = f"distillation.teacher=models:/{site.name}/1"
    return [
        ("distill", "--set", teacher, "--set", "distillation.images=320", "--json"),
        ("sweep", "--over", "training.seed=3,4", "--json"),
    ]


def student_and_ranking(site: Site, forks: Forks) -> tuple[dict[str, str], list[tuple[str, float]]]:
    """The tensors of the student, by digest, and what the combinations of the sweep scored."""
    tensors = load_file(site.folder / "runs" / f"{site.name}-student" / "final.safetensors")
    _, sweep = derivations(site)
    ranking = json.loads(forks.finish(site.folder, *sweep))["ranking"]
    return (
        {name: sha256_bytes(each.numpy().tobytes()) for name, each in tensors.items()},
        [(model["name"], model["value"]) for model in ranking["models"]],
    )
