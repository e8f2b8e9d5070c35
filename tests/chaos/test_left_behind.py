"""Commands on a real stack that are killed alone: within seconds none of their processes is left."""

import pytest

from tests.builders.left_behind import descendants, left_behind, new_process_tag
from tests.builders.waiting import wait_for
from tests.chaos.house import Site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SPREAD = ("--set", "ingest.runner=processes", "--set", "sampling_batch.runner=processes")


def killed_alone(site: Site, *command: str, running: int) -> list[str]:
    """What is left of ``command`` after a SIGKILL to its first process, when ``running`` of them are there."""
    mark, variables = new_process_tag(), site.variables
    site.variables = variables | mark
    process = site.start(*command)
    site.variables = variables
    wait_for(lambda: process.poll() is not None or len(descendants(mark)) >= running)
    assert process.poll() is None, process.communicate()[1][-3000:]
    process.kill()
    process.wait()
    processes = left_behind(mark)
    process.communicate()
    return processes


@pytest.mark.drill
def test_an_ingest_killed_alone_leaves_no_process(site: Site) -> None:
    """SIGKILL to `ingest` with a pool of processes under Prefect: all of its processes end within seconds."""
    assert killed_alone(site, "ingest", str(site.house.images), "--dataset", site.name, *SPREAD, running=3) == []


@pytest.mark.drill
def test_a_training_and_a_sampling_killed_alone_leave_no_process(site: Site) -> None:
    """SIGKILL to `retrain` in training and to `sample` with processes and on Ray: all of their processes end."""
    mark = new_process_tag()
    site.variables |= mark
    with site.paused("diffusion.training.checkpointing:Checkpoints.save@3", (*site.retraining, *SPREAD)) as process:
        process.kill()
        process.communicate()
    assert left_behind(mark) == []
    site.json(*site.retraining)
    sample = ("sample", "--model", f"models:/{site.name}@champion", "--count", "4096")
    for runner, running in {"processes": 3, "ray": 6}.items():
        assert killed_alone(site, *sample, "--set", f"sampling_batch.runner={runner}", running=running) == []
