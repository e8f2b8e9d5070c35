"""SIGTERM and Ctrl-C during training: it ends within a step with a checkpoint, and goes on to the same bits."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusion.families.model import Model
from diffusion.training.checkpointing import Checkpoints
from diffusion.training.interruption import interruptible
from diffusion.training.logging import Validation, read_metrics
from diffusion.training.setup import COUNTS
from diffusion.training.trainer import WINDOW
from tests.builders import ROOT
from tests.builders.small_datasets import random_images, write_dataset
from tests.builders.training_runs import CONFIG, Stop, StopAt, run

LONG = CONFIG.model_copy(update={"images": 1280, "checkpoints": 2})
"""Losses are logged each second step."""


@pytest.fixture(autouse=True)
def audible_interrupts() -> Iterator[None]:
    """Ctrl-C is heard, also where a shell started the tests in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "noise"
    write_dataset(folder, random_images(64), per_shard=40)
    return folder


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nothing happens to."""
    output = tmp_path_factory.mktemp("whole") / "run"
    run(dataset, output, LONG)
    return output


class StruckAt(StopAt):
    """A tracker that is sent a signal when ``images`` are logged, which it waits for, or not."""

    def __init__(self, images: int, number: signal.Signals, seconds: float) -> None:
        super().__init__(images)
        self.number, self.seconds = number, seconds

    def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
        if images == self.images:
            os.kill(os.getpid(), self.number)
            time.sleep(self.seconds)


def interrupted(output: Path) -> tuple[int, int]:
    """Images of the checkpoint that was written at a signal, and its number of steps that were not logged."""
    checkpoint = Checkpoints(output / "interrupted").newest()
    assert checkpoint is not None
    return checkpoint[1][COUNTS]["images"], len(checkpoint[1][WINDOW])


def require_same(output: Path, whole: Path) -> None:
    assert (output / "final.safetensors").read_bytes() == (whole / "final.safetensors").read_bytes()
    assert (output / "losses.csv").read_bytes() == (whole / "losses.csv").read_bytes()
    for name in ("loss", "gradient_norm", "images"):
        assert [row[name] for row in read_metrics(output / "history.csv")] == [
            row[name] for row in read_metrics(whole / "history.csv")
        ]
    for name in ("samples", "checkpoints"):
        files = sorted(path.name for path in (output / name).iterdir())
        assert files == sorted(path.name for path in (whole / name).iterdir())
    assert not (output / "interrupted").exists()


@pytest.mark.slow
def test_sigterm_ends_training_with_a_checkpoint_and_the_same_call_goes_on_to_the_same_bits(
    dataset: Path, whole: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    for images, seconds, number, code in [(64, 0, signal.SIGTERM, 143), (160, 0.5, signal.SIGTERM, 143)]:
        with pytest.raises(SystemExit) as exit_info:
            run(dataset, cut, LONG, track=lambda _, at=(images, number, seconds): StruckAt(*at))
        assert exit_info.value.code == code
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        image_count, unlogged_steps = interrupted(cut)
        assert images <= image_count < 640
        assert unlogged_steps == image_count // 16 % 2
    assert len(Checkpoints(cut / "interrupted").paths()) == 1
    with pytest.raises(KeyboardInterrupt):
        run(dataset, cut, LONG, track=lambda _: StruckAt(416, signal.SIGINT, 0))
    run(dataset, cut, LONG)
    require_same(cut, whole)


@pytest.mark.parametrize("at", [640, pytest.param(1280, marks=pytest.mark.slow)])
def test_validation_ended_by_a_signal_is_made_up_for(
    dataset: Path, whole: Path, tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, calls = Validation.evaluate, []

    def struck(
        self: Validation, tensors: dict[str, Tensor], images: int, stop: Callable[[], bool]
    ) -> tuple[Model, dict[str, float]]:
        losses = evaluate(self, tensors, images, stop)
        calls.append(images)
        if images == at and calls.count(at) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            while not stop():
                time.sleep(0.01)
        return losses

    monkeypatch.setattr(Validation, "evaluate", struck)
    with pytest.raises(SystemExit):
        run(dataset, tmp_path / "cut", LONG)
    assert interrupted(tmp_path / "cut") == (at, 0)
    run(dataset, tmp_path / "cut", LONG)
    assert calls.count(at) == 2
    require_same(tmp_path / "cut", whole)


@pytest.mark.slow
@pytest.mark.parametrize("images", [640, 608])
def test_regular_checkpoint_counts_before_a_signal_s_of_equal_age(
    dataset: Path, whole: Path, tmp_path: Path, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Stop):
        run(dataset, tmp_path / "cut", LONG, track=lambda _: StopAt(704))
    regular = Checkpoints(tmp_path / "cut" / "checkpoints").newest()
    assert regular is not None
    assert regular[1][COUNTS]["images"] == 640
    # As a kill leaves it, between the writing of a regular checkpoint and the removal of the other one.
    header = regular[1] | {WINDOW: [], COUNTS: regular[1][COUNTS] | {"images": images}}
    header["model_header"] = header["model_header"] | {"images": images}
    Checkpoints(tmp_path / "cut" / "interrupted").save(regular[0], header)
    evaluate, calls = Validation.evaluate, []
    monkeypatch.setattr(Validation, "evaluate", lambda *each: calls.append(each[2]) or evaluate(*each))
    run(dataset, tmp_path / "cut", LONG)
    assert calls == [1280]
    require_same(tmp_path / "cut", whole)


def test_handler_that_raises_stays_installed_and_ends_the_training(dataset: Path, tmp_path: Path) -> None:
    class Interrupted(BaseException):
        pass

    def tell(*_: object) -> None:
        raise Interrupted

    checks = []

    class Looking(StruckAt):
        def log_metrics(self, metrics: Mapping[str, float], images: int) -> None:
            # Prefect looks in a thread of its own, and kills a process whose handler is another's.
            checks.append(signal.getsignal(signal.SIGTERM) is tell)
            super().log_metrics(metrics, images)

    before = signal.signal(signal.SIGTERM, tell)
    try:
        with pytest.raises(Interrupted):
            run(dataset, tmp_path / "run", LONG, track=lambda _: Looking(96, signal.SIGTERM, 0))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert all(checks)
    assert interrupted(tmp_path / "run")[0] >= 96


@pytest.mark.timeout(60, method="thread")  # as it has the timer
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # callbacks of weak references
def test_signals_at_begin_and_end_neither_hang_nor_get_lost() -> None:
    armed, raised = [], 0

    def strike(*_: object) -> None:
        if armed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, strike)
    try:
        for number in range(1500):
            working, ended = [], []

            def work(_: object, working: list[bool] = working, ended: list[bool] = ended) -> bool:
                working.append(True)
                time.sleep(0.0002)
                ended.append(True)
                return True

            try:
                armed.append(True)
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + number % 100 * 1e-5)
                with interruptible(torch.device("cpu")) as run_work:
                    run_work(work)
                armed.clear()
            except KeyboardInterrupt:
                armed.clear()
                raised += 1
            assert working == ended
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert raised


def test_failure_after_a_signal_is_logged_as_the_cause(caplog: pytest.LogCaptureFixture) -> None:
    def work(stop: Callable[[], bool]) -> bool:
        os.kill(os.getpid(), signal.SIGINT)
        while not stop():
            time.sleep(0.001)
        raise ValueError

    with pytest.raises(KeyboardInterrupt) as interrupt, interruptible(torch.device("cpu")) as run_work:
        run_work(work)
    assert isinstance(interrupt.value.__cause__, ValueError)
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ValueError]


def test_training_outside_of_the_main_thread_leaves_signals_alone(dataset: Path, tmp_path: Path) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(run(dataset, tmp_path / "run")))
    thread.start()
    thread.join()
    assert results[0].images == 320


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.builders.small_datasets import random_images, write_dataset
from tests.builders.training_runs import run, CONFIG
if "validation" in sys.argv:
    from diffusion.training.logging import Validation
    evaluate = Validation.evaluate
    def struck(self, tensors, images, stop):
        if images == 800:
            Path(sys.argv[2]).with_name("validating").touch()
            while not stop():
                time.sleep(0.01)
        return evaluate(self, tensors, images, stop)
    Validation.evaluate = struck
if "hanging" in sys.argv:
    import threading
    import diffusion.training.interruption as interruption
    from diffusion.data.loader import Loader
    from diffusion.training.trainer import Trainer
    make, batch, train = Loader._make, Loader.batch, Trainer.train
    going, gone, files = threading.Event(), threading.Event(), Path(sys.argv[2]).parent
    def hanging(self, position):
        if position == 160:
            going.wait()
        return make(self, position)
    def awaited(self, position, end):
        # Batches are made ahead: until this one is due, training goes on and could end.
        if position == 160:
            (files / "hung").touch()
        return batch(self, position, end)
    def left(*each):
        try:
            return train(*each)
        finally:
            gone.set()
    Loader._make, Loader.batch, Trainer.train, interruption.PATIENCE = hanging, awaited, left, 0.1
    try:
        run(Path(sys.argv[1]), Path(sys.argv[2]), CONFIG.model_copy(update={{"images": 1280, "checkpoints": 2}}))
    except KeyboardInterrupt:
        assert not gone.is_set()
        before = sorted(files.rglob("*"))
        going.set()
        gone.wait()
        assert sorted(files.rglob("*")) == before
        sys.exit(130)
shared = {{"shard": True, "optimizer": "adamw"}} if "shard" in sys.argv else {{}}
run(Path(sys.argv[1]), Path(sys.argv[2]), CONFIG.model_copy(update={{"images": 3200, "checkpoints": 4}} | shared))
"""


def start(dataset: Path, output: Path, processes: int = 1, restarts: int = 0, *more: str) -> "subprocess.Popen[bytes]":
    script = output.parent / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    command = [sys.executable]
    if restarts:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    elif processes > 1:
        command += ["-m", "tests.builders.forked_ranks", str(processes)]
    return subprocess.Popen(
        [*command, str(script), str(dataset), str(output), *more],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stderr=(output.parent / "errors").open("ab"),
        start_new_session=True,
    )


def after_the_first_checkpoint(process: "subprocess.Popen[bytes]", output: Path) -> float:
    """Wait until the training began, and return when."""
    while not list((output / "checkpoints").glob("*.sha256")):
        assert process.poll() is None
        time.sleep(0.01)
    return time.monotonic()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(120)
def test_second_ctrl_c_leaves_a_hanging_training_without_writing(dataset: Path, tmp_path: Path) -> None:
    # In a process of its own, whose main thread may be left behind.
    process = start(dataset, tmp_path / "run", 1, 0, "hanging")
    while not (tmp_path / "hung").exists():
        assert process.poll() is None
        time.sleep(0.01)
    for _ in range(2):
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
    assert process.wait() == 130, (tmp_path / "errors").read_text()


def require_same_weights(output: Path, whole: Path) -> None:
    one, other = (load_file(each / "final.safetensors") for each in (output, whole))
    assert one.keys() == other.keys()
    assert all(value.equal(other[name]) for name, value in one.items())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.long
@pytest.mark.drill
def test_training_that_is_preempted_at_random_moments_ends_the_same(dataset: Path, tmp_path: Path, kills: int) -> None:
    process = start(dataset, tmp_path / "whole")
    start_time = after_the_first_checkpoint(process, tmp_path / "whole")
    assert process.wait() == 0
    seconds, moments = time.monotonic() - start_time, random.Random(0)
    for number in range(kills):
        process = start(dataset, tmp_path / "cut")
        after_the_first_checkpoint(process, tmp_path / "cut")
        # An earlier training has got as far.
        time.sleep(moments.uniform(0, 2 / kills) * seconds)
        for strike in [(signal.SIGTERM, signal.SIGKILL), (signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM,)][
            number % 3
        ]:
            process.send_signal(strike)
            time.sleep(moments.uniform(0, 0.2))
        # 0 where it was done before, -15 while it imported.
        assert process.wait(60) in (0, 143, -signal.SIGTERM, -signal.SIGKILL)
    assert start(dataset, tmp_path / "cut").wait() == 0
    require_same(tmp_path / "cut", tmp_path / "whole")
    assert "Traceback" not in (tmp_path / "errors").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.long
@pytest.mark.drill
@pytest.mark.parametrize("more", [pytest.param((), id="whole"), pytest.param(("shard",), id="shared")])
def test_ranks_of_which_one_is_preempted_stop_at_one_step_and_go_on_to_the_same_weights(
    dataset: Path, tmp_path: Path, kills: int, more: tuple[str, ...]
) -> None:
    process = start(dataset, tmp_path / "whole", 2, 0, *more)
    start_time = after_the_first_checkpoint(process, tmp_path / "whole")
    assert process.wait() == 0
    seconds, moments = time.monotonic() - start_time, random.Random(0)
    for number in range(kills):
        process = start(dataset, tmp_path / f"cut-{number}", 2, 3, *more)
        after_the_first_checkpoint(process, tmp_path / f"cut-{number}")
        ranks = [each for each in psutil.Process(process.pid).children() if "script.py" in " ".join(each.cmdline())]
        time.sleep(moments.uniform(0, 0.5) * seconds)
        if number % 2:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) != 0
            assert interrupted(tmp_path / f"cut-{number}")[0] > 0
            process = start(dataset, tmp_path / f"cut-{number}", 2, 0, *more)
        else:
            # torchrun starts both again.
            moments.choice(ranks).terminate()
            # Until the next regular one.
            while not list((tmp_path / f"cut-{number}" / "interrupted").glob("*.sha256")):
                assert process.poll() is None
                time.sleep(0.01)
        assert process.wait(300) == 0
        require_same_weights(tmp_path / f"cut-{number}", tmp_path / "whole")


@pytest.mark.long
@pytest.mark.slow
def test_rank_preempted_while_another_validates_gets_its_checkpoint(dataset: Path, tmp_path: Path) -> None:
    process = start(dataset, tmp_path / "run", 2, 0, "validation")
    while not (tmp_path / "validating").exists():
        assert process.poll() is None
        time.sleep(0.01)
    _, second = sorted(psutil.Process(process.pid).children(), key=lambda rank: rank.pid)
    second.terminate()
    assert process.wait(60) != 0
    assert interrupted(tmp_path / "run") == (800, 0)
