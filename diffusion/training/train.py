"""Train: the loop of DDPM (arXiv 2006.11239). Draw a picture, a time step and noise; mix; predict; compare."""

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from diffusion.checkpoints import AVERAGED, read_header, save_tensors
from diffusion.config import Config
from diffusion.config_sampling import SamplingConfig
from diffusion.data.captions import Captions, embeddings_of, seconds_to_read
from diffusion.data.dataset import Dataset
from diffusion.data.manifest import Manifest, read_manifest
from diffusion.data.shard_cache import ShardCache, ShardStore
from diffusion.device import repeatable, resolve_device
from diffusion.errors import DarkroomError, UserError
from diffusion.files import make_folder, remove_partials, write_bytes, write_json
from diffusion.fingerprint import Fingerprint
from diffusion.lanes import cores, lanes
from diffusion.models.config import FamilyConfig, ModelConfig
from diffusion.progress import Progress, silent
from diffusion.sampling import require_effect, require_meaning, require_small
from diffusion.text import WIDTH
from diffusion.training.checkpoint import COUNTS, Checkpoints, Writer
from diffusion.training.config import TrainingConfig
from diffusion.training.first_stage import FirstStage, open_first_stage
from diffusion.training.post_hoc import AVERAGES
from diffusion.training.preflight import PREFLIGHT, Preflight, measure, preflight_of, require_disk
from diffusion.training.ranks import ALONE, Ranks, ranks
from diffusion.training.record import GRID_PICTURES, Record
from diffusion.training.run import FINGERPRINT, NotFinite, Run
from diffusion.training.sharding import gathered
from diffusion.training.tracker import ANEW, SPOOL, NoTracker, Tracker
from diffusion.training.turn import lanes_of
from diffusion.training.warm_start import open_start

LOGS_PER_CHECKPOINT = 20
Restart = Literal["never", "if_different"]
"""Whether to throw away a run of another configuration or data set that lies in the folder."""

logger = logging.getLogger(__name__)


class TrainResult(Config):
    """What training left in its folder."""

    output: Path
    final: Path
    images: int
    content_digest: str
    train_key: str
    """Digest of all that decides the weights, but for the fingerprint: configuration, data, seed."""


def train(
    data: Path,
    output: Path,
    model: FamilyConfig,
    config: TrainingConfig,
    sampling: SamplingConfig,
    track: Callable[[bool], Tracker] = NoTracker,
    progress: Progress = silent,
    restart: Restart = "never",
    store: ShardStore | None = None,
) -> TrainResult:
    """Train on the data set in folder ``data`` until folder ``output`` holds ``final.safetensors``.

    The same call after a kill goes on from the last checkpoint to bit-identical weights. Started by torchrun, each
    process computes a share of every batch, and one of them writes. ``restart`` says when to throw away what is there
    instead. ``track`` is called once the folder is this run's alone, with whether the run begins from nothing, for the
    one who keeps its records. ``store`` is where shards come from if ``config.stream_bytes`` is set.

    Raises UserError if the folder holds a run of another configuration or data set (and ``restart`` is ``never``),
    another process trains in it, the data set is damaged, or has no captions and ``model.text`` is set.
    """
    with ranks() as together, _opened(data, config, store) as dataset:
        # Of several processes one writes, and so holds the folder.
        holding = _held(output) if together.leads else nullcontext()
        _require_ranks(config, together)
        with holding, repeatable(resolve_device(config.device)), lanes(lanes_of(config, together)) as pool:
            with lanes() as readers:
                captions = _captions(dataset, model, together, partial(embeddings_of, pool=readers, progress=progress))
            require_meaning(model, sampling)
            require_small(model, sampling)
            first_stage = _first_stage(dataset, model, config, together)
            run = Run.new(dataset, model, config, pool, together, captions, first_stage, open_start(config))
            require_effect(run.classes, model.text, sampling, run.shown(GRID_PICTURES))
            if together.leads and restart == "if_different" and _differences(output, run):
                _discard(output)
            with run.loader:
                return _train(run, output, sampling, track, progress)


def _require_ranks(config: TrainingConfig, ranks: Ranks) -> None:
    if config.shard and ranks.count == 1:
        raise UserError(
            "training.shard shares the network out among processes, and there is one: start several with torchrun, or "
            "leave it out"
        )


@contextmanager
def _opened(data: Path, config: TrainingConfig, store: ShardStore | None) -> Iterator[Dataset]:
    shards = None
    if config.stream_bytes is not None:
        if store is None:
            raise UserError(
                "training.stream_bytes is set, and there is no remote to fetch shards from: "
                "leave it out (null) and get the data set with `dvc pull`"
            )
        _require_room(read_manifest(data), config.stream_bytes, config.window)
        shards = ShardCache(data.parent / ".shards", store, config.stream_bytes)
    with closing(Dataset.open(data, shards, config.cache_bytes)) as dataset:
        if not len(dataset.rows("train")):
            raise UserError(f"data set {data} has no training pictures: ingest more, or lower ingest.held_out")
        yield dataset


def _require_room(manifest: Manifest, stream_bytes: int, window: int | None) -> None:
    sizes = sorted((shard.bytes for shard in manifest.shards), reverse=True)
    needed = sum(sizes if window is None else sizes[: 2 * window])
    if needed <= stream_bytes:
        return
    fitting = sum(int(total) <= stream_bytes for total in np.cumsum(sizes)) // 2
    less = f", or set training.window to {fitting}" + (" or less" if fitting > 1 else "") if fitting else ""
    what = f"all {len(sizes)} shards" if window is None else f"two windows of training.window = {window} shards"
    raise UserError(
        f"{what} of data set {manifest.name} have up to {needed} bytes and the cache holds {stream_bytes}: "
        f"raise training.stream_bytes to {needed}{less}"
    )


def _captions(
    dataset: Dataset, model: FamilyConfig, ranks: Ranks, read: Callable[[Dataset, list[str]], Tensor]
) -> Captions | None:
    """The captions of ``dataset`` if the model is told them, as one of several processes ``read`` them for all."""
    if not model.text:
        return None
    texts, numbers = dataset.different_captions()
    if not texts:
        raise UserError(
            f"data set {dataset.folder} has no captions, and model.text tells the network of them: ingest it with a "
            "column text beside file_name (metadata.csv), or leave model.text out"
        )
    embeddings = ranks.shared({"embeddings": read(dataset, texts)} if ranks.leads else {})
    return Captions(embeddings["embeddings"], numbers)


def _first_stage(dataset: Dataset, model: FamilyConfig, config: TrainingConfig, ranks: Ranks) -> FirstStage | None:
    """The autoencoder of ``model`` if it has one; what one of several processes measures of it, all take over."""
    if not isinstance(model, ModelConfig) or model.autoencoder is None:
        return None
    stage = open_first_stage(model.autoencoder, dataset, config.window)
    for name, moment in ranks.shared(dict(stage.latents.named_buffers())).items():
        stage.latents.get_buffer(name).copy_(moment)
    return stage


def discard(output: Path) -> None:
    """Throw away the run in folder ``output``, and nothing else that may lie there; UserError if it is in use."""
    with _held(output):
        _discard(output)


@contextmanager
def _held(output: Path) -> Iterator[None]:
    """The run's folder for this process alone; raises UserError if another has it."""
    make_folder(output.parent)
    lock = FileLock(output.parent / f".{output.name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(
            f"another process trains in {output}: wait for it, or set training.output to another folder"
        ) from error
    try:
        # Whoever was killed while it wrote a checkpoint left a file as large as one.
        remove_partials(output)
        yield
    finally:
        lock.release()


def _train(
    run: Run, output: Path, sampling: SamplingConfig, track: Callable[[bool], Tracker], progress: Progress
) -> TrainResult:
    checkpoints = Checkpoints(output / "checkpoints")
    final = output / "final.safetensors"
    key = run.header()["train_key"]
    if run.ranks.agreed(final.is_file()):
        _require_same_run(output, run)
        run.state.images = read_header(final)["model_header"]["images"]
    else:
        anew = _begin_or_resume(run, checkpoints, output, sampling) == "begun"
        if run.ranks.leads:
            tracker = track(anew)
            with Writer(checkpoints) as writer, _giving_up(run, output):
                _loop(run, Record(run, output, sampling, writer, tracker, progress))
        else:
            with _giving_up(run, output):
                _loop(run, None)
        weights = {AVERAGED + name: gathered(value) for name, value in run.state.averages[0].state_dict().items()}
        if run.ranks.leads:
            save_tensors(final, weights | run.state.frozen, run.header())
        # Nobody is done before the model is on disk.
        run.ranks.wait()
    return TrainResult(
        output=output,
        final=final,
        images=run.state.images,
        content_digest=run.dataset.manifest.content_digest,
        train_key=key,
    )


def _discard(output: Path) -> None:
    # What a tracker keeps goes first, so that it takes nothing of this run for the next one's; checkpoints go last:
    # what is left after a kill is still a run that can go on.
    shutil.rmtree(output / SPOOL, ignore_errors=True)
    if output.is_dir():
        write_bytes(output / SPOOL / ANEW, b"")
    for pattern in (
        "final.safetensors",
        "weights.safetensors",
        "not_finite*.safetensors",
        "history.csv",
        "losses.csv",
        PREFLIGHT,
    ):
        for path in output.glob(pattern):
            path.unlink()
    for folder in (output / "samples", output / AVERAGES, output / "checkpoints"):
        if folder.exists():
            shutil.rmtree(folder)


def _differences(output: Path, run: Run) -> list[str]:
    """In what the run that lies in ``output`` differs from ``run``: nothing if it is the same, or none lies there."""
    final = output / "final.safetensors"
    if final.is_file():
        theirs = read_header(final)
    else:
        newest = next(Checkpoints(output / "checkpoints").newest_whole(), None)
        if newest is None:
            return []
        _, theirs = newest
    ours = run.header()
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


def _require_same_run(output: Path, run: Run) -> None:
    if changed := _differences(output, run):
        raise UserError(
            f"{output} holds a run that differs in {', '.join(changed)}: "
            "give --restart to throw it away, or set training.output to another folder"
        )


def _begin_or_resume(
    run: Run, checkpoints: Checkpoints, output: Path, sampling: SamplingConfig
) -> Literal["begun", "resumed"]:
    if run.ranks.leads:
        _require_same_run(output, run)
    tensors, header = (run.ranks.leads and checkpoints.newest()) or ({}, None)
    if header := run.ranks.agreed(header):
        run.total = header["total"]
        run.state.load(run.ranks.shared(tensors), header[COUNTS])
        run.loader.ahead(run.state.images, run.total)
        if run.ranks.leads:
            logger.info("going on from %d of %d images", run.state.images, run.total)
            _name_differences(Fingerprint.model_validate(header[FINGERPRINT]), run.fingerprint())
        return "resumed"
    pace = None if run.config.images else measure(run, sampling)
    about = preflight_of(run, pace)
    run.total = math.ceil(about.images / run.config.batch_size) * run.config.batch_size
    run.loader.ahead(run.state.images, run.total)
    if run.ranks.leads:
        for name, words in about.lines():
            logger.info("%-8s  %s", name, words)
        require_disk(output, about.disk_bytes)
        write_json(output / PREFLIGHT, about.model_dump(mode="json"))
    first = run.gathered()
    if run.ranks.leads:
        with Writer(checkpoints) as writer:
            writer.save(first.state, run.checkpoint_header(), run.config.keep)
    return "begun"


def _name_differences(before: Fingerprint, now: Fingerprint) -> None:
    if differences := before.differences(now):
        logger.warning("what computes has changed (%s): the last digits of the weights will differ", differences)


def preflight(
    data: Path,
    model: FamilyConfig,
    config: TrainingConfig,
    sampling: SamplingConfig,
    store: ShardStore | None = None,
) -> Preflight:
    """What ``train`` would do with the same arguments, measured here in a few seconds; writes nothing.

    Raises UserError as ``train`` does.
    """
    device = repeatable(resolve_device(config.device))
    with _opened(data, config, store) as dataset, device, lanes(lanes_of(config, ALONE)) as pool:
        # Captions without meaning cost a step the same, and need not be read.
        captions = _captions(dataset, model, ALONE, lambda _, texts: torch.zeros(len(texts), WIDTH))
        require_meaning(model, sampling)
        require_small(model, sampling)
        first_stage = _first_stage(dataset, model, config, ALONE)
        run = Run.new(dataset, model, config, pool, ALONE, captions, first_stage, open_start(config))
        require_effect(run.classes, model.text, sampling, run.shown(GRID_PICTURES))
        reading = seconds_to_read(dataset, dataset.different_captions()[0], cores()) if captions else 0
        return preflight_of(run, measure(run, sampling), reading)


def _loop(run: Run, record: Record | None) -> None:
    """Step by step to the end; only one of several processes has a ``record`` to keep."""
    config, state = run.config, run.state
    steps = run.total // config.batch_size
    log_every = max(1, steps // (config.checkpoints * LOGS_PER_CHECKPOINT)) * config.batch_size
    save_every = math.ceil(run.total / config.checkpoints / log_every) * log_every
    taken: list[Tensor] = []
    began, since, waited = state.images, time.perf_counter(), run.loader.waited
    while state.images < run.total:
        taken.append(torch.stack(run.step()))
        at_end = state.images == run.total
        if state.images % log_every == 0 or at_end:
            # The first thing in all these steps that waits for the device.
            steps_taken = torch.stack(taken).cpu()
            loss, norm = steps_taken[steps_taken.isfinite().all(1)].mean(0).tolist()
            run.settle()
            seconds = time.perf_counter() - since
            figures = {
                "loss": loss,
                "gradient_norm": norm,
                "learning_rate": state.optimizer.param_groups[0]["lr"],
                "images_per_second": (state.images - began) / seconds,
                "data_wait": (run.loader.waited - waited) / seconds,
                "skipped": state.skipped,
            }
            if record:
                record.figures(figures)
            taken, began, since, waited = [], state.images, time.perf_counter(), run.loader.waited
        if state.images % save_every == 0 or at_end:
            state_of_all = run.gathered()
            if record:
                record.stock(state_of_all, save_every)
            since = time.perf_counter()


@contextmanager
def _giving_up(run: Run, output: Path) -> Iterator[None]:
    """If ``run`` gives up inside, what it was last shown is kept in ``output``."""
    try:
        yield
    except NotFinite as error:
        path = output / f"not_finite{run.ranks.rank or ''}.safetensors"
        save_tensors(path, error.batch, run.header())
        raise DarkroomError(f"{error}, which lies in {path}") from error
