"""Train a model: set up a run in its folder, start or resume it, and write the final model."""

import logging
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock, Timeout

from diffusion.checkpoints import PARTS, save_tensors
from diffusion.common.config import Config
from diffusion.common.device import repeatable, resolve_device
from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.files import make_folder, remove_partials, write_bytes, write_json
from diffusion.common.fingerprint import Fingerprint
from diffusion.common.model_files import read_header
from diffusion.common.progress import Progress, silent
from diffusion.common.threads import cores, worker_threads
from diffusion.data.caption_embeddings import embeddings_of, seconds_to_read
from diffusion.data.shards import ShardStore
from diffusion.models.config import FamilyConfig
from diffusion.models.text_encoder import WIDTH
from diffusion.process.samplers import SamplingConfig
from diffusion.training.checkpointing import Checkpoints, CheckpointWriter
from diffusion.training.config import TrainingConfig
from diffusion.training.distributed import SINGLE_PROCESS, process_group
from diffusion.training.ema import SNAPSHOTS
from diffusion.training.logging import METRICS_BUFFER, RESTARTED, Tracker, TrainingLog, Validation
from diffusion.training.preflight import PREFLIGHT, Preflight, make_preflight, measure_pace, require_disk
from diffusion.training.setup import COUNTS, FINGERPRINT, FORMAT_VERSION, TrainingSetup, make_setup, open_dataset
from diffusion.training.trainer import NotFiniteError, Trainer, thread_count

Restart = Literal["never", "if_different"]
"""When to discard an existing run of another configuration or data set in the folder."""

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
    progress: Progress = silent,
    restart: Restart = "never",
    store: ShardStore | None = None,
) -> TrainResult:
    """Train on the data set in folder ``data`` until folder ``output`` holds ``final.safetensors``.

    After a kill the same call resumes from the last checkpoint, to bit-identical weights. Under torchrun each process
    computes a share of every batch, and only the main process writes. ``sampling`` is how sample grids are generated;
    ``track`` is called once the folder is locked, with whether the run starts from scratch, and returns the tracker, if
    any; ``restart`` says when to discard an existing run in the folder instead of resuming it; ``store`` is the source
    of the shards if ``config.stream_bytes`` is set.

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
        holding = _held(output) if ranks.is_main else nullcontext()
        with holding, repeatable(resolve_device(config.device)), worker_threads(thread_count(config, ranks)) as threads:
            with worker_threads() as readers:
                embed = partial(embeddings_of, pool=readers, progress=progress)
                setup = make_setup(dataset, model, config, sampling, ranks, embed)
            trainer = Trainer(setup, threads)
            if ranks.is_main and _require_same_run(output, setup, restart):
                _discard(output)
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
    is_new = _begin_or_resume(trainer, checkpoints, output, sampling)
    try:
        if setup.ranks.is_main:
            validation, tracker = Validation(setup, trainer.objective, trainer.threads), track(is_new)
            with CheckpointWriter(checkpoints) as writer:
                trainer.train(
                    TrainingLog(validation, output, sampling, writer, tracker, progress, state.images, trainer.total)
                )
        else:
            trainer.train(None)
    except NotFiniteError as error:
        path = output / f"not_finite{setup.ranks.rank or ''}.safetensors"
        save_tensors(path, error.batch, setup.header(state.images, trainer.total))
        raise DarkroomError(f"{error}, which lies in {path}") from error
    tensors = trainer.checkpoint_tensors()
    if setup.ranks.is_main:
        weights = {name: value for name, value in tensors.items() if name.startswith(PARTS)}
        save_tensors(output / "final.safetensors", weights, setup.header(state.images, trainer.total))
    # All processes wait until the model is on disk.
    setup.ranks.barrier()
    return state.images


def preflight(
    data: Path,
    model: FamilyConfig,
    config: TrainingConfig,
    sampling: SamplingConfig,
    store: ShardStore | None = None,
) -> Preflight:
    """Measure in a few seconds what ``train`` would do with the same arguments; writes nothing, and raises as it."""
    device, threads = resolve_device(config.device), thread_count(config, SINGLE_PROCESS)
    with open_dataset(data, config, store) as dataset, repeatable(device), worker_threads(threads) as pool:
        # Zero embeddings cost a step the same, so the captions need not be embedded.
        setup = make_setup(
            dataset, model, config, sampling, SINGLE_PROCESS, lambda _, texts: torch.zeros(len(texts), WIDTH)
        )
        reading = seconds_to_read(dataset, dataset.different_captions()[0], cores()) if setup.captions else 0
        trainer = Trainer(setup, pool)
        with trainer.loader:
            return make_preflight(trainer, measure_pace(setup, pool, sampling), reading)


def check(
    data: Path,
    output: Path,
    model: FamilyConfig,
    config: TrainingConfig,
    sampling: SamplingConfig,
    restart: Literal["never", "if_different", "always"],
) -> None:
    """Raise UserError as ``train`` would before its first step; writes nothing, and embeds no captions."""
    with open_dataset(data, config, None) as dataset, repeatable(resolve_device(config.device)):
        setup = make_setup(
            dataset, model, config, sampling, SINGLE_PROCESS, lambda _, texts: torch.zeros(len(texts), WIDTH)
        )
        _require_same_run(output, setup, restart)


def _require_same_run(output: Path, setup: TrainingSetup, restart: str) -> bool:
    """Whether the folder ``output`` holds another run, which may be discarded; raises UserError if it may not."""
    if (changed := _differences(output, setup)) and restart == "never":
        raise UserError(
            f"{output} holds a run that differs in {', '.join(changed)}: "
            "give --restart to throw it away, or set training.output to another folder"
        )
    return bool(changed)


def discard(output: Path) -> None:
    """Delete the run in folder ``output`` and nothing else in it; raises UserError if it is in use."""
    with _held(output):
        _discard(output)


@contextmanager
def _held(output: Path) -> Iterator[None]:
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
    for path in (*output.glob("not_finite*.safetensors"), *(output / name for name in names)):
        path.unlink(missing_ok=True)
    for folder in (output / "samples", output / SNAPSHOTS, output / "checkpoints"):
        if folder.exists():
            shutil.rmtree(folder)


def _differences(output: Path, setup: TrainingSetup) -> list[str]:
    """Describe the differences between the run in ``output`` and ``setup``; empty for the same run, or none."""
    final, checkpoints = output / "final.safetensors", Checkpoints(output / "checkpoints")
    theirs = read_header(final) if final.is_file() else next((each for _, each in checkpoints.newest_whole()), None)
    if theirs is None:
        return []
    if theirs.get("format_version") != FORMAT_VERSION:
        return ["its format"]
    ours = setup.header(0, 0)
    if theirs["train_key"] == ours["train_key"]:
        return []
    moved = theirs.get("layout_digest") != ours.get("layout_digest")
    theirs, ours = theirs["model_header"], ours["model_header"]
    changed = ["the data set's content"] if theirs["content_digest"] != ours["content_digest"] else []
    for part in ("model", "training"):
        names = theirs[part] | ours[part]
        changed += [f"{part}.{name}" for name in names if ours[part].get(name) != theirs[part].get(name)]
    if theirs.get("encoder") and ours["encoder"] and theirs["encoder"] != ours["encoder"]:
        changed.append(f"the text encoder ({theirs['encoder']['name']} {theirs['encoder']['digest'][:12]})")
    return changed or [("the data set's shards" if moved else "its format")]


def _begin_or_resume(trainer: Trainer, checkpoints: Checkpoints, output: Path, sampling: SamplingConfig) -> bool:
    """Load the newest checkpoint, or write the first one; returns whether the run is new."""
    setup, state, config = trainer.setup, trainer.state, trainer.config
    ranks = setup.ranks
    tensors, header = (ranks.is_main and checkpoints.newest()) or ({}, None)
    if header := ranks.broadcast(header):
        trainer.total = header["total"]
        state.load(ranks.broadcast_tensors(tensors), header[COUNTS])
        trainer.loader.prefetch(state.images, trainer.total)
        if ranks.is_main:
            logger.info("resuming from %d of %d images", state.images, trainer.total)
            if changed := Fingerprint.model_validate(header[FINGERPRINT]).differences(setup.fingerprint):
                logger.warning("the fingerprint has changed (%s): the last bits of the weights will differ", changed)
        return False
    preflight = make_preflight(trainer, None if config.images else measure_pace(setup, trainer.threads, sampling))
    trainer.total = math.ceil(preflight.images / config.batch_size) * config.batch_size
    trainer.loader.prefetch(state.images, trainer.total)
    if ranks.is_main:
        about = dict(preflight.lines())
        logger.info("training on %s; %s, %s", *(about[name] for name in ("images", "network", "length")))
        require_disk(output, preflight.disk_bytes)
        write_json(output / PREFLIGHT, preflight.model_dump(mode="json"))
    first = trainer.checkpoint_tensors()
    if ranks.is_main:
        checkpoints.save(first, trainer.checkpoint_header())
    return True
