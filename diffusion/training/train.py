"""Train a model: open the data set and the run's folder, begin or resume, loop, save the final model."""

import logging
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from heapq import merge
from pathlib import Path
from typing import Literal

import torch

from diffusion.checkpoints import PARTS, link_base, save_tensors
from diffusion.common.config import Config
from diffusion.common.device import compute_deterministically, resolve_device
from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.files import write_json
from diffusion.common.fingerprint import Fingerprint
from diffusion.common.model_files import read_header
from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.threads import worker_threads
from diffusion.data.fan_out import Workers
from diffusion.data.shards import ShardStore
from diffusion.families.config import FamilyConfig
from diffusion.process.samplers import SamplingConfig
from diffusion.training.checkpointing import INTERRUPTED, Checkpoints, CheckpointWriter, read_everywhere, save
from diffusion.training.config import TrainingConfig
from diffusion.training.data import fan_out_encodings, open_dataset, seconds_to_encode
from diffusion.training.distributed import SINGLE_PROCESS, process_group
from diffusion.training.interruption import interruptible
from diffusion.training.logging import Tracker, TrainingLog, Validation
from diffusion.training.preflight import (
    PREFLIGHT,
    Preflight,
    make_preflight,
    measure_pace,
    meta_network,
    require_disk,
)
from diffusion.training.run_folder import DISCARD_OR_MOVE, Restart, lock_folder, make_way, require_same_run
from diffusion.training.setup import COUNTS, FINGERPRINT, make_setup
from diffusion.training.trackers import TRACKERS, open_trackers, require_trackers
from diffusion.training.trainer import FEWER_CHECKPOINTS, WINDOW, NotFiniteError, Trainer, thread_count

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
    workers: Workers | None = None,
) -> TrainResult:
    """Train on the data set in folder ``data`` until folder ``output`` holds ``final.safetensors``.

    After a kill the same call resumes from the last checkpoint, to bit-identical weights. At SIGTERM or Ctrl-C, of any
    of the processes, the current step ends and a checkpoint is written, before what the signal raises is raised: for
    SIGTERM SystemExit(143), unless the caller has a handler of its own that raises. Under torchrun each process
    computes a share of every batch, and only the main process writes. ``sampling`` is how sample grids are generated;
    ``track`` is called once the folder is locked, with whether the run starts from scratch, and returns the tracker, if
    any; ``restart`` says what happens to another run in the folder; ``store`` is the source of the shards if
    ``config.stream_bytes`` is set; ``start`` is the registered version in the file ``config.init_from``, if any;
    ``workers`` encode captions and latents; None: threads, one per core.

    Raises UserError if the folder holds a run of another configuration or data set (and ``restart`` is ``never``),
    another process trains in it, the data set is damaged, or configuration and data set do not fit each other.
    """
    require_trackers(config.log_to)
    with _open_run(data, output, model, config, sampling, progress, restart, store, start, workers) as trainer:
        setup, state, final = trainer.setup, trainer.state, output / "final.safetensors"
        if setup.ranks.broadcast(final.is_file()):
            images = read_header(final)["model_header"]["images"]
        else:
            is_new, is_unlogged = _begin_or_resume(trainer, output, sampling)
            tracker = track(is_new) if setup.ranks.is_main else None

            def loop(stop: Callable[[], bool]) -> bool:
                with _open_log(trainer, output, sampling, tracker, progress) as log:
                    return trainer.train(log, stop, is_unlogged)

            try:
                with interruptible(setup.device) as run:
                    run(loop)
            except NotFiniteError as error:
                path = output / f"not_finite{setup.ranks.rank or ''}.safetensors"
                save_tensors(path, error.batch, setup.header(state.images, trainer.total))
                raise DarkroomError(f"{error}, which lies in {path}") from error
            _save_final(trainer, final)
            images = state.images
        content_digest, key = setup.dataset.manifest.content_digest, setup.train_key
        return TrainResult(output=output, final=final, images=images, content_digest=content_digest, train_key=key)


@contextmanager
def _open_run(
    data: Path,
    output: Path,
    model: FamilyConfig,
    config: TrainingConfig,
    sampling: SamplingConfig,
    progress: Progress,
    restart: Restart,
    store: ShardStore | None,
    start: str | None,
    workers: Workers | None,
) -> Iterator[Trainer]:
    """Join the other processes, open the data set and lock the folder, which has no other run in it then."""
    with process_group() as ranks, open_dataset(data, config, store) as dataset:
        if config.shard and ranks.count == 1:
            raise UserError(
                "training.shard shares the network out among processes, and there is one: start several with torchrun, "
                "or leave it out"
            )
        # Only the main process writes, so it alone locks the folder.
        with (
            lock_folder(output) if ranks.is_main else nullcontext(),
            compute_deterministically(resolve_device(config.device)),
            worker_threads(thread_count(config, ranks)) as threads,
        ):
            fan_out = fan_out_encodings(workers, config.device)
            setup = make_setup(dataset, model, config, sampling, ranks, fan_out, progress, start)
            trainer = Trainer(setup, threads, output)
            if ranks.is_main:
                make_way(output, setup, restart)
                if setup.base is not None and config.init_from is not None:
                    link_base(Path(config.init_from), output)
            with trainer.loader:
                yield trainer


@contextmanager
def _open_log(
    trainer: Trainer, output: Path, sampling: SamplingConfig, tracker: Tracker | None, progress: Progress
) -> Iterator[TrainingLog | None]:
    """Open the log of the main process, whose checkpoints are written in a thread; others have none."""
    if not trainer.setup.ranks.is_main:
        yield None
        return
    validation = Validation(trainer.setup, trainer.objective, trainer.threads, trainer.state.network)
    images, total, names = trainer.state.images, trainer.total, trainer.config.log_to
    fields = trainer.setup.header(images, total)["model_header"]
    with (
        open_trackers(names, output, images, fields["training"] | {"model": fields["model"]}) as trackers,
        CheckpointWriter(Checkpoints(output / "checkpoints")) as writer,
    ):
        all_trackers = [*([tracker] if tracker else []), *trackers]
        yield TrainingLog(validation, output, sampling, writer, all_trackers, progress, images, total)


def _save_final(trainer: Trainer, final: Path) -> None:
    """Write the final model; all processes wait until it is on disk."""
    header = trainer.setup.header(trainer.state.images, trainer.total)
    weights = trainer.checkpoint_tensors(header, PARTS)
    if trainer.setup.ranks.is_main:
        save(final, weights, header)
    trainer.setup.ranks.barrier()


def _begin_or_resume(trainer: Trainer, output: Path, sampling: SamplingConfig) -> tuple[bool, bool]:
    """Load the newest checkpoint, or write the first one.

    Returns whether the run is new, and whether the checkpoint was written at a signal.
    """
    setup, state, config = trainer.setup, trainer.state, trainer.config
    ranks, checkpoints = setup.ranks, Checkpoints(output / "checkpoints")
    sources = (checkpoints, Checkpoints(output / INTERRUPTED))
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
        require_disk(output, preflight.disk_bytes)
        shutil.rmtree(output / TRACKERS, ignore_errors=True)  # of another run whose checkpoints were deleted
        write_json(output / PREFLIGHT, preflight.model_dump(mode="json"))
    header = trainer.checkpoint_header()
    tensors = trainer.checkpoint_tensors(header)
    if ranks.is_main:
        checkpoints.save(tensors, header)
    return True, False


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
        # Other encodings and latents cost a step the same, so they need not be computed.
        setup = make_setup(dataset, model, config, sampling, SINGLE_PROCESS)
        reading = seconds_to_encode(dataset, setup.captions)
        trainer = Trainer(setup, pool)
        with trainer.loader:
            return make_preflight(trainer, measure_pace(setup, pool, sampling), reading)


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
    require_trackers(config.log_to)
    with open_dataset(data, config, None) as dataset, compute_deterministically(resolve_device(config.device)):
        setup = make_setup(dataset, model, config, sampling, SINGLE_PROCESS)
        meta_network(setup)
        require_same_run(output, setup, restart, advice)
