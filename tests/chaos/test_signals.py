"""Commands that are killed or terminated at random moments, as by a power cut, systemd, Kubernetes, Slurm and Ctrl-C.

Each ends within a bounded time and without a traceback, leaves no process behind, and given again ends as if nothing
had happened.
"""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, Signals
from typing import Any

import pytest
from mlflow.client import MlflowClient
from safetensors.torch import load_file

from diffusion.common.files import sha256_bytes
from tests.builders.forked import Forks, rounds
from tests.builders.pipelines import stable_diffusion
from tests.builders.small_models import write_model
from tests.builders.training_runs import MODEL
from tests.chaos.conftest import Undisturbed
from tests.chaos.house import COUNT, House, Site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

signals = pytest.mark.parametrize("number", [SIGKILL, SIGTERM, SIGINT], ids=lambda number: number.name)


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
    # The end of its name is another for each run of a test, so that none finds what the other did.
    name = tmp_path.name.removeprefix("test_")
    return lambda number, index: house.site(tmp_path / f"{name}-{number.name.lower()}-{index}")


@pytest.mark.drill
@signals
def test_interrupted_steps_resume_to_the_same_result(
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
        for arguments in steps(site):
            for _ in range(strikes):
                moment = moments.uniform(0, seconds[arguments[0]])
                forks.strike(number, moment, site.folder, *arguments)
            forks.finish(site.folder, *arguments)
        result = json.loads(forks.finish(site.folder, *site.retraining, "--json"))
        assert site.end(result) == undisturbed.end


@pytest.mark.drill
@signals
def test_interrupted_retraining_resumes_to_the_same_result(
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


@pytest.mark.drill
@signals
def test_interrupted_distillations_and_sweeps_resume_to_the_same_result(
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


@pytest.mark.drill
@signals
@pytest.mark.parametrize("kind", ["file", "pipeline"])
def test_interrupted_imports_register_one_whole_version(
    forks: Forks, sites: Callable[[Signals, int], Site], number: Signals, kills: int, kind: str
) -> None:
    moments, seconds, ends = random.Random(number), 0.0, list[dict[str, Any]]()
    for index, strikes in enumerate([0, *rounds(kills)]):
        site = sites(number, index)
        if kind == "file":
            seed = 100 * number + index  # weights that are there already are not stored again
            classes = {"even": 80, "odd": 80}
            source = write_model(site.folder / "elsewhere.safetensors", seed, 9, config=MODEL, classes=classes)
        else:
            source = stable_diffusion(site.folder / "painter")
        # A part of a pipeline's header, and so of the digest of its weights.
        command = ("model", "import", source.name, "--name", site.name, "--licence", site.name, "--json")
        for _ in range(strikes):
            forks.strike(number, moments.uniform(0, seconds), site.folder, *command)
        start = time.monotonic()
        result = json.loads(forks.finish(site.folder, *command))
        seconds = seconds or time.monotonic() - start
        assert json.loads(forks.finish(site.folder, *command))["version"] == result["version"]
        ends.append(imported(site))
    assert len(ends) > 1
    assert ends == ends[:1] * len(ends)


def imported(site: Site) -> dict[str, Any]:
    """All that an import left behind, but for ids, times and the weights themselves, which are whole."""
    client = MlflowClient(site.variables["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name(site.name)
    [run] = client.search_runs([experiment.experiment_id])
    [version] = client.search_model_versions(f"name='{site.name}'")
    [model] = client.search_logged_models([experiment.experiment_id])
    objects = site.house.objects(f"mlflow/{experiment.experiment_id}/")
    [weights] = [data for key, data in objects.items() if key.endswith("weights.safetensors")]
    assert sha256_bytes(weights) == version.tags["darkroom.weights_sha256"]
    return {
        "run": (run.info.status, sorted(run.data.tags), sorted(run.data.params)),
        "version": (version.version, sorted(version.tags), len(version.description or "") > 0),
        "objects": sorted(key.replace(run.info.run_id, "RUN").replace(model.model_id, "MODEL") for key in objects),
        "left": sorted(path.name for path in (site.house.stack.folder / "imports" / site.name).rglob("*")),
    }
