"""Threads, processes and Ray run the same work: in order, a few items ahead, again after errors that may pass."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import pytest

from diffusion.common.errors import DarkroomError, TransientError, UserError
from diffusion.data.fan_out import make_fan_out
from diffusion.data.ingest.config import IngestConfig
from tests.builders import ROOT

Runner = Literal["threads", "processes", "ray"]
RUNNERS = ["threads", "processes", pytest.param("ray", marks=[pytest.mark.slow, pytest.mark.long])]
logger = logging.getLogger("diffusion.tests")


@pytest.fixture(scope="module")
def on_ray() -> Iterator[None]:
    """One Ray for all tests of this file: it takes seconds to start."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, num_gpus=1, object_store_memory=80 * 2**20, include_dashboard=False)
        yield
        ray.shutdown()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(params=RUNNERS)
def run(request: pytest.FixtureRequest) -> Callable[..., Iterator[Any]]:
    if request.param == "ray":
        request.getfixturevalue("on_ray")
    return make_fan_out(IngestConfig(runner=request.param, workers=2))


@dataclass
class Heavy:
    """Work that notes in ``folder`` where it is unpickled."""

    folder: Path

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        (self.folder / uuid4().hex).touch()

    def __call__(self, _: int) -> int:
        return os.getpid()


def fail_at_first(folder: Path, error: Exception, number: int) -> int:
    """Note the attempt; the first one at number 3 fails."""
    attempts = len(list(folder.glob(f"{number}-*")))
    (folder / f"{number}-{attempts}").touch()
    if number == 3 and not attempts:
        raise error
    return number**2


def log_and_return(number: int) -> int:
    logger.warning("image %d is odd", number)
    return os.getpid()


def test_results_come_in_order_after_transient_errors(run: Callable[..., Iterator[int]], tmp_path: Path) -> None:
    error = ConnectionResetError("the first time only")
    assert list(run(partial(fail_at_first, tmp_path, error), range(8))) == [number**2 for number in range(8)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*(f"{number}-0" for number in range(8)), "3-1"])


def test_errors_of_users_are_raised_as_they_are_at_once(run: Callable[..., Iterator[int]], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        list(run(partial(fail_at_first, tmp_path, UserError("no such file: give another")), range(8)))
    assert (type(caught.value), str(caught.value)) == (UserError, "no such file: give another")
    assert not (tmp_path / "3-1").exists()


def test_warnings_of_workers_reach_this_process(
    run: Callable[..., Iterator[int]], caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    processes = set(run(log_and_return, [1, 3]))
    assert (os.getpid() in processes) is (request.node.callspec.params["run"] == "threads")
    assert sorted(record.getMessage() for record in caplog.records) == ["image 1 is odd", "image 3 is odd"]


def test_work_is_sent_once_to_each_process(run: Callable[..., Iterator[int]], tmp_path: Path) -> None:
    processes = set(run(Heavy(tmp_path), range(12))) - {os.getpid()}
    assert len(processes) <= len(list(tmp_path.iterdir())) <= 2 * len(processes)


def test_few_items_start_before_results_are_taken(run: Callable[..., Iterator[int]]) -> None:
    started: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            started.append(number)
            yield number

    results = run(abs, items())
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert len(started) <= 3 + 4


def test_an_error_that_stays_is_raised_after_three_attempts() -> None:
    attempts: list[int] = []

    def fail(number: int) -> None:
        attempts.append(number)
        raise TransientError("still down")

    with pytest.raises(TransientError, match="still down"):
        list(make_fan_out(IngestConfig(workers=1))(fail, [1]))
    assert attempts == [1, 1, 1]


def test_ray_does_not_start_without_items() -> None:
    ray = pytest.importorskip("ray")
    was_started = ray.is_initialized()
    assert list(make_fan_out(IngestConfig(runner="ray"))(abs, [])) == []
    assert ray.is_initialized() is was_started


@pytest.mark.slow
@pytest.mark.usefixtures("on_ray")
def test_items_on_ray_have_a_gpu_each_if_asked() -> None:
    config = IngestConfig(runner="ray", workers=2)
    assert set(make_fan_out(config)(visible_gpus, range(2))) == {""}
    assert list(make_fan_out(config, gpus=1)(visible_gpus, range(2))) == ["0", "0"]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("on_ray")
def test_a_process_with_a_gpu_keeps_its_work_until_it_dies(tmp_path: Path) -> None:
    # A second process never gets a GPU.
    run = make_fan_out(IngestConfig(runner="ray", workers=2), gpus=1)
    assert len(set(run(Heavy(tmp_path), range(6)))) == 1
    assert len(list(tmp_path.iterdir())) == 1
    assert list(run(partial(die_at_first, tmp_path / "died"), range(4))) == [0, 1, 4, 9]
    with pytest.raises(UserError, match="give another"):
        list(run(partial(fail_at_first, tmp_path, UserError("give another")), range(8)))
    with pytest.raises(DarkroomError, match="killed each time"):
        list(run(partial(die_at_first, tmp_path / "missing" / "died"), range(8)))


def die_at_first(path: Path, number: int) -> int:
    """End this process at number 2: once if there is a folder for the note at ``path``, else each time."""
    if number == 2 and not path.exists():
        if path.parent.exists():
            path.touch()
        os._exit(1)
    return number**2


def visible_gpus(_: int) -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "")


SIGNALLED = """
import os, signal, sys, time
from concurrent.futures import ThreadPoolExecutor
from diffusion.data.fan_out import make_fan_out
from diffusion.data.ingest.config import IngestConfig
def work():
    for _ in make_fan_out(IngestConfig(runner="ray", workers=1))(abs, [-1]):
        strike()
def strike():
    os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.1)
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
with ThreadPoolExecutor() as pool:
    work() if sys.argv[1] == "main" else pool.submit(work).result()
strike()
"""


@pytest.mark.slow
@pytest.mark.parametrize("thread", ["main", "another"])
def test_sigterm_is_still_the_callers_while_ray_runs_and_after_it(thread: str) -> None:
    pytest.importorskip("ray")
    command = [sys.executable, "-c", SIGNALLED, thread]
    process = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert process.stdout.split() == ["handled", "handled"]
    assert "SIGTERM received" not in process.stderr


def test_threads_know_the_context_of_the_caller() -> None:
    name: ContextVar[str] = ContextVar("name")
    name.set("a Prefect run")
    assert list(make_fan_out(IngestConfig())(lambda _: name.get(), range(3))) == ["a Prefect run"] * 3
