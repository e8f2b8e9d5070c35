"""Train a model: set up a run in its folder, start or resume it, and write the final model."""

import logging
import math
import shutil
import signal
import sys
import threading
import time
from _thread import start_new_thread
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import copy_context
from heapq import merge
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Literal

import torch
from filelock import FileLock, Timeout

from diffusion.checkpoints import PARTS, link_base, save_tensors
from diffusion.common.config import Config
from diffusion.common.device import compute_deterministically, resolve_device
from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.files import make_folder, remove_partials, write_bytes, write_json
from diffusion.common.fingerprint import Fingerprint
from diffusion.common.model_files import read_header
from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.threads import cores, worker_threads
from diffusion.data.caption_embeddings import seconds_to_read
from diffusion.data.shards import ShardStore
from diffusion.models.config import FamilyConfig
from diffusion.process.samplers import SamplingConfig
from diffusion.training.checkpointing import INTERRUPTED, Checkpoints, CheckpointWriter, read_everywhere, save
from diffusion.training.config import EARLIER, TrainingConfig, earlier_runs
from diffusion.training.distributed import SINGLE_PROCESS, process_group
from diffusion.training.ema import SNAPSHOTS
from diffusion.training.logging import METRICS_BUFFER, RESTARTED, Tracker, TrainingLog, Validation
from diffusion.training.preflight import (
    PREFLIGHT,
    Preflight,
    make_preflight,
    measure_pace,
    meta_network,
    require_disk,
    warn_of_memory,
)
from diffusion.training.rank_costs import RankCosts, rank_costs
from diffusion.training.setup import COUNTS, FINGERPRINT, FORMAT_VERSION, TrainingSetup, make_setup, open_dataset
from diffusion.training.trainer import FEWER_CHECKPOINTS, WINDOW, NotFiniteError, Trainer, thread_count

Restart = Literal["never", "if_different", "set_aside"]
"""What happens to a run of another configuration or data set in the folder: an error, it is discarded, or a finished
one is set aside, from where a later training like it takes it back."""

LOOK_SECONDS = 0.5
"""Seconds between looks at signals and at the end of a training."""
PATIENCE = 5.0
"""Seconds after the first signal from which Ctrl-C ends a training at once."""
LEAVING = "stopping after this step: Ctrl-C again, after %d s, leaves without a checkpoint"
DISCARD_OR_MOVE = "give --restart to throw it away, or set training.output to another folder"
"""Advice where a folder holds another run."""

logger = logging.getLogger(__name__)


class TrainResult(Config):
    """Result of a training run."""

    output: Path
    final: Path
    images: int
    content_digest: str
    train_key: str
    """Digest of everything that determines the weights, except the fingerprint: configuration, data, seed."""


def train(
    data: Path,
    output: Path,
    model: FamilyConfig,
    config: TrainingConfig,
    sampling: SamplingConfig,
    track: Callable[[bool], Tracker | None] = lambda _: None,
    progress: Progress = ignore_progress,
    restart: Restart = "never",
    store: ShardStore | None = None,
    start: str | None = None,
) -> TrainResult:
    """Train on the data set in folder ``data`` until folder ``output`` holds ``final.safetensors``.

    After a kill the same call resumes from the last checkpoint, to bit-identical weights. At SIGTERM or Ctrl-C, of any
    of the processes, the current step ends and a checkpoint is written, before what the signal raises is raised: for
    SIGTERM SystemExit(143), unless the caller has a handler of its own that raises. Under torchrun each process
    computes a share of every batch, and only the main process writes. ``sampling`` is how sample grids are generated;
    ``track`` is called once the folder is locked, with whether the run starts from scratch, and returns the tracker, if
    any; ``restart`` says what happens to another run in the folder; ``store`` is the source of the shards if
    ``config.stream_bytes`` is set; ``start`` is the registered version in the file ``config.init_from``, if any.

    Raises UserError if the folder holds a run of another configuration or data set (and ``restart`` is ``never``),
    another process trains in it, the data set is damaged, or configuration and data set do not fit each other.
    """
    with process_group() as ranks, open_dataset(data, config, store) as dataset:
        if config.shard and ranks.count == 1:
            raise UserError(
                "training.shard shares the network out among processes, and there is one: start several with torchrun, "
                "or leave it out"
            )
        # Only the main process writes, so it alone locks the folder.
        lock = _lock(output) if ranks.is_main else nullcontext()
        with (
            lock,
            compute_deterministically(resolve_device(config.device)),
            worker_threads(thread_count(config, ranks)) as threads,
        ):
            with worker_threads() as readers:
                setup = make_setup(dataset, model, config, sampling, ranks, readers, progress, start)
            trainer = Trainer(setup, threads, output)
            if ranks.is_main and _require_same_run(output, setup, restart):
                make_way = _set_aside if restart == "set_aside" else _discard
                make_way(output)
            earlier = output.parent / EARLIER / output.name / setup.train_key[:16]
            if ranks.is_main and restart == "set_aside" and earlier in earlier_runs(output) and not output.exists():
                earlier.rename(output)
            if ranks.is_main and setup.base is not None:
                assert config.init_from is not None
                link_base(Path(config.init_from), output)
            final = output / "final.safetensors"
            with trainer.loader:
                if ranks.broadcast(final.is_file()):
                    images = read_header(final)["model_header"]["images"]
                else:
                    images = _train(trainer, output, sampling, track, progress)
            return TrainResult(
                output=output,
                final=final,
                images=images,
                content_digest=dataset.manifest.content_digest,
                train_key=setup.train_key,
            )


def _train(
    trainer: Trainer,
    output: Path,
    sampling: SamplingConfig,
    track: Callable[[bool], Tracker | None],
    progress: Progress,
) -> int:
    """Start or resume a run, train it to its end and write its final model; returns the number of images seen."""
    setup, state = trainer.setup, trainer.state
    checkpoints = Checkpoints(output / "checkpoints")
    is_new, is_unlogged = _begin_or_resume(trainer, checkpoints, output, sampling)
    tracker = track(is_new) if setup.ranks.is_main else None

    def work(stop: Callable[[], bool]) -> bool:
        if not setup.ranks.is_main:
            return trainer.train(None, stop, is_unlogged)
        validation = Validation(setup, trainer.objective, trainer.threads)
        with CheckpointWriter(checkpoints) as writer:
            log = TrainingLog(validation, output, sampling, writer, tracker, progress, state.images, trainer.total)
            return trainer.train(log, stop, is_unlogged)

    try:
        _run_until_signal(work, setup.device)
    except NotFiniteError as error:
        path = output / f"not_finite{setup.ranks.rank or ''}.safetensors"
        save_tensors(path, error.batch, setup.header(state.images, trainer.total))
        raise DarkroomError(f"{error}, which lies in {path}") from error
    header = setup.header(state.images, trainer.total)
    weights = trainer.checkpoint_tensors(header, PARTS)
    if setup.ranks.is_main:
        save(output / "final.safetensors", weights, header)
    # All processes wait until the model is on disk.
    setup.ranks.barrier()
    return state.images


def _run_until_signal(work: Callable[[Callable[[], bool]], bool], device: torch.device) -> None:
    """Run ``work`` in a thread, which a signal stops; what the handler of the signal raises is raised at its end.

    ``work`` gets a function that says whether to stop, and returns whether it was not stopped. No exception strikes
    inside of it, where a step might be half done, and the handler of SIGTERM stays the caller's: Prefect reschedules a
    run only as long as it is its own. A KeyboardInterrupt after ``PATIENCE`` seconds leaves ``work`` behind, which may
    hang: it then ends, as at a kill, when it next asks whether to stop.
    """
    if threading.current_thread() is not threading.main_thread():
        if not work(lambda: False):
            sys.exit(128 + signal.SIGTERM)
        return
    # A signal may raise between any two operations. Lists, this queue and the start of a thread are in C, and leave no
    # lock behind, as Event, Future and Thread do.
    interrupts, runs, outcome = list[BaseException](), list[bool](), list[bool | BaseException]()
    exits, seconds, starts = list[BaseException](), list[float](), [start_new_thread]
    ends, context = SimpleQueue[None](), copy_context()

    def stop() -> bool:
        if exits:
            # Another process may train in the folder by now.
            raise exits[0]
        return bool(interrupts)

    def run() -> None:
        runs.append(True)
        if interrupts:
            outcome.append(False)  # else a wait that has seen ``runs`` would not end
            return
        try:
            torch.set_num_threads(1)  # see worker_threads
            if device.type == "cuda":
                torch.cuda.set_device(device)
            outcome.append(context.run(work, stop))
        except BaseException as error:  # noqa: BLE001 (raised below)
            outcome.append(error)
        ends.put(None)

    default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if default:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        while not exits:
            try:
                while not outcome and (runs or not interrupts):
                    if starts:
                        starts.pop()(run, ())
                    # A signal may take the item, come before the thread has begun, which then does nothing, or fall
                    # between Python's last look at signals and the wait, which it then does not end.
                    with suppress(Empty):
                        ends.get(timeout=LOOK_SECONDS)
                break
            except BaseException as error:  # noqa: BLE001 (raised below)
                interrupts += [error]
                seconds += [time.monotonic()]
                if isinstance(error, KeyboardInterrupt):
                    if seconds[-1] - seconds[0] >= PATIENCE:
                        exits += [error]
                    elif len(seconds) == 1:
                        # In a thread, as logging has locks.
                        start_new_thread(logger.info, (LEAVING, PATIENCE))
        if exits:
            raise exits[0]
        failure = next((item for item in outcome if isinstance(item, BaseException)), None)
        if interrupts:
            if failure is not None:
                logger.warning("training failed after a signal, and wrote no checkpoint", exc_info=failure)
            raise interrupts[0] from failure
        if failure is not None:
            raise failure
        if not outcome[0]:
            # A signal stopped another process: this one ends in the same way.
            signal.raise_signal(signal.SIGTERM)
            sys.exit(128 + signal.SIGTERM)
    finally:
        if default:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def preflight(
    data: Path,
    model: FamilyConfig,
    config: TrainingConfig,
    sampling: SamplingConfig,
    store: ShardStore | None = None,
) -> Preflight:
    """Measure in a few seconds what ``train`` would do with the same arguments; writes nothing, and raises as it."""
    device, threads = resolve_device(config.device), thread_count(config, SINGLE_PROCESS)
    with (
        open_dataset(data, config, store) as dataset,
        compute_deterministically(device),
        worker_threads(threads) as pool,
    ):
        # Other embeddings and latents cost a step the same, so they need not be computed.
        setup = make_setup(dataset, model, config, sampling, SINGLE_PROCESS)
        reading = 0.0
        if setup.captions is not None:
            reading = seconds_to_read(dataset, dataset.different_captions()[0], cores(), setup.captions.encoding)
        trainer = Trainer(setup, pool)
        with trainer.loader:
            return make_preflight(trainer, measure_pace(setup, pool, sampling), reading)


def estimate_ranks(
    data: Path,
    model: FamilyConfig,
    config: TrainingConfig,
    sampling: SamplingConfig,
    world_size: int,
    store: ShardStore | None = None,
) -> RankCosts:
    """Compute memory and messages of each of ``world_size`` processes that ``train`` with the same arguments.

    Measures and writes nothing. Raises UserError as ``train``, and as ``rank_costs``.
    """
    with open_dataset(data, config, store) as dataset:
        return rank_costs(make_setup(dataset, model, config, sampling, SINGLE_PROCESS), world_size)


def check(
    data: Path,
    output: Path,
    model: FamilyConfig,
    config: TrainingConfig,
    sampling: SamplingConfig,
    restart: Restart | Literal["always"],
    advice: str = DISCARD_OR_MOVE,
) -> None:
    """Raise UserError as ``train`` would before its first step; writes nothing, and embeds no captions.

    ``advice``: what the message says to do with another run in the folder ``output``.
    """
    with open_dataset(data, config, None) as dataset, compute_deterministically(resolve_device(config.device)):
        setup = make_setup(dataset, model, config, sampling, SINGLE_PROCESS)
        meta_network(setup)
        _require_same_run(output, setup, restart, advice)


def _require_same_run(output: Path, setup: TrainingSetup, restart: str, advice: str = DISCARD_OR_MOVE) -> bool:
    """Whether the folder ``output`` holds another run, which may be discarded; raises UserError if it may not."""
    if (differences := _differences(output, setup)) and restart == "never":
        raise UserError(f"{output} holds a run that differs in {', '.join(differences)}: {advice}")
    return bool(differences)


def discard(output: Path) -> None:
    """Delete the run in folder ``output`` and nothing else in it; raises UserError if it is in use."""
    with _lock(output):
        _discard(output)


@contextmanager
def _lock(output: Path) -> Iterator[None]:
    """Lock the run's folder for this process; raises UserError if another process uses it."""
    make_folder(output.parent)
    try:
        lock = FileLock(output.parent / f".{output.name}.lock").acquire(blocking=False)
    except Timeout as error:
        raise UserError(
            f"another process trains in {output}: wait for it, or set training.output to another folder"
        ) from error
    with lock:
        # A process killed during a write left a file as large as a checkpoint.
        remove_partials(output)
        yield


def _discard(output: Path) -> None:
    # The tracker's files go first, so that it does not attribute them to the next run; checkpoints go last, so that an
    # interrupted deletion leaves a run that can be resumed.
    shutil.rmtree(output / METRICS_BUFFER, ignore_errors=True)
    if output.is_dir():
        write_bytes(output / METRICS_BUFFER / RESTARTED, b"")
    names = ("final.safetensors", "weights.safetensors", "history.csv", "losses.csv", PREFLIGHT)
    bases = [path for path in output.glob("*.safetensors") if len(path.stem) == 64]  # what a LoRA is based on
    for path in (*output.glob("not_finite*.safetensors"), *bases, *(output / name for name in names)):
        path.unlink(missing_ok=True)
    for folder in (output / "samples", output / SNAPSHOTS, output / INTERRUPTED, output / "checkpoints"):
        if folder.exists():
            shutil.rmtree(folder)


def _set_aside(output: Path) -> None:
    """Move the finished run in folder ``output`` to where ``earlier_runs`` finds it; discard an unfinished one."""
    final, earlier = output / "final.safetensors", output.parent / EARLIER / output.name
    if not final.is_file():
        _discard(output)
        return
    target = earlier / str(read_header(final).get("train_key"))[:16]
    make_folder(earlier)
    if target.exists():  # the same training
        shutil.rmtree(target)
    output.rename(target)
    logger.warning("%s held another finished training, which lies in %s now", output, target)


def _differences(output: Path, setup: TrainingSetup) -> list[str]:
    """Describe the differences between the run in ``output`` and ``setup``; empty for the same run, or none."""
    final, checkpoints = output / "final.safetensors", Checkpoints(output / "checkpoints")
    theirs = (
        read_header(final) if final.is_file() else next((header for _, header in checkpoints.iterate_whole()), None)
    )
    if theirs is None:
        return []
    if theirs.get("format_version") != FORMAT_VERSION:
        return ["its format"]
    ours = setup.header(0, 0)
    if theirs["train_key"] == ours["train_key"]:
        return []
    has_moved = theirs.get("layout_digest") != ours.get("layout_digest")
    theirs, ours = theirs["model_header"], ours["model_header"]
    differences = ["the data set's content"] if theirs["content_digest"] != ours["content_digest"] else []
    for part in ("model", "training"):
        names = theirs[part] | ours[part]
        differences += [f"{part}.{name}" for name in names if ours[part].get(name) != theirs[part].get(name)]
    if theirs.get("encoder") and ours["encoder"] and theirs["encoder"] != ours["encoder"]:
        differences.append(f"the text encoder ({theirs['encoder']['name']} {theirs['encoder']['digest'][:12]})")
    return differences or [("the data set's shards" if has_moved else "its format")]


def _begin_or_resume(
    trainer: Trainer, checkpoints: Checkpoints, output: Path, sampling: SamplingConfig
) -> tuple[bool, bool]:
    """Load the newest checkpoint, or write the first one.

    Returns whether the run is new, and whether the checkpoint was written at a signal.
    """
    setup, state, config = trainer.setup, trainer.state, trainer.config
    ranks, sources = setup.ranks, (checkpoints, Checkpoints(output / INTERRUPTED))
    # A kill may leave both of the same number of images: the regular one, which is first, is also logged.
    newest = merge(*(source.iterate_whole() for source in sources), key=lambda pair: int(pair[0].stem), reverse=True)
    path, header = (ranks.is_main and next(newest, None)) or (None, None)
    if header := ranks.broadcast(header):
        trainer.total = header["total"]
        trainer.checkpoints = min(config.checkpoints, header.get(FEWER_CHECKPOINTS, config.checkpoints))
        state.load(read_everywhere(path, ranks), header[COUNTS])
        trainer.window = [torch.tensor(values, device=setup.device) for values in header.get(WINDOW, [])]
        trainer.loader.prefetch(state.images, trainer.total)
        if ranks.is_main:
            if WINDOW not in header:
                shutil.rmtree(output / INTERRUPTED, ignore_errors=True)
            logger.info("resuming from %d of %d images", state.images, trainer.total)
            if changes := Fingerprint.model_validate(header[FINGERPRINT]).differences(setup.fingerprint):
                logger.warning("the fingerprint has changed (%s): the last bits of the weights will differ", changes)
        return False, WINDOW in header
    pace = None if config.images else measure_pace(setup, trainer.threads, sampling, output)
    preflight = make_preflight(trainer, pace)
    trainer.total = math.ceil(preflight.images / config.images_per_step) * config.images_per_step
    trainer.checkpoints = preflight.checkpoints
    trainer.loader.prefetch(state.images, trainer.total)
    if ranks.is_main:
        if preflight.fewer_checkpoints:
            logger.warning("training.minutes = %g: %s", config.minutes, preflight.fewer_checkpoints)
        summary = dict(preflight.lines())
        logger.info("training on %s; %s, %s", *(summary[name] for name in ("images", "network", "length")))
        warn_of_memory(preflight, setup.device)
        require_disk(output, preflight.disk_bytes)
        write_json(output / PREFLIGHT, preflight.model_dump(mode="json"))
    header = trainer.checkpoint_header()
    tensors = trainer.checkpoint_tensors(header)
    if ranks.is_main:
        checkpoints.save(tensors, header)
    return True, False
