"""The folder of a run: locked while a process trains in it; another run there is refused, discarded or set aside."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from diffusion.common.errors import UserError
from diffusion.common.files import make_folder, remove_partials, write_bytes
from diffusion.common.model_files import read_header
from diffusion.training.checkpointing import INTERRUPTED, Checkpoints
from diffusion.training.config import EARLIER, earlier_runs
from diffusion.training.ema import SNAPSHOTS
from diffusion.training.logging import METRICS_BUFFER, RESTARTED
from diffusion.training.preflight import PREFLIGHT
from diffusion.training.setup import FORMAT_VERSION, TrainingSetup
from diffusion.training.trackers import TRACKERS
from diffusion.training.warm_start import STATE_FILE

Restart = Literal["never", "if_different", "set_aside"]
"""What happens to a run of another configuration or data set in the folder: an error, it is discarded, or a finished
one is set aside, from where a later training like it takes it back."""
DISCARD_OR_MOVE = "give --restart to throw it away, or set training.output to another folder"
"""Advice where a folder holds another run."""

logger = logging.getLogger(__name__)


def require_same_run(output: Path, setup: TrainingSetup, restart: str, advice: str = DISCARD_OR_MOVE) -> bool:
    """Whether the folder ``output`` holds another run, which may be discarded; raises UserError if it may not."""
    if (differences := _differences(output, setup)) and restart == "never":
        raise UserError(f"{output} holds a run that differs in {', '.join(differences)}: {advice}")
    return bool(differences)


def make_way(output: Path, setup: TrainingSetup, restart: Restart) -> None:
    """Discard another run in the locked folder ``output``, or set it aside, as ``restart`` says.

    A run that was set aside, and is this one, comes back. Raises UserError as ``require_same_run``.
    """
    if require_same_run(output, setup, restart):
        (_set_aside if restart == "set_aside" else _discard)(output)
    earlier = output.parent / EARLIER / output.name / setup.train_key[:16]
    if restart == "set_aside" and earlier in earlier_runs(output) and not output.exists():
        earlier.rename(output)


def discard(output: Path) -> None:
    """Delete the run in folder ``output`` and nothing else in it; raises UserError if it is in use."""
    with lock_folder(output):
        _discard(output)


@contextmanager
def lock_folder(output: Path) -> Iterator[None]:
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
    for name in (METRICS_BUFFER, TRACKERS):
        shutil.rmtree(output / name, ignore_errors=True)
    if output.is_dir():
        write_bytes(output / METRICS_BUFFER / RESTARTED, b"")
    names = ("final.safetensors", "weights.safetensors", STATE_FILE, "history.csv", "losses.csv", PREFLIGHT)
    bases = [path for path in output.glob("*.safetensors") if len(path.stem) == 64]  # what an adapter is based on
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
    previous = (
        read_header(final) if final.is_file() else next((header for _, header in checkpoints.iterate_whole()), None)
    )
    if previous is None:
        return []
    if previous.get("format_version") != FORMAT_VERSION:
        return ["its format"]
    current = setup.header(0, 0)
    if previous["train_key"] == current["train_key"]:
        return []
    has_moved = previous.get("layout_digest") != current.get("layout_digest")
    previous, current = previous["model_header"], current["model_header"]
    differences = ["the data set's content"] if previous["content_digest"] != current["content_digest"] else []
    for part in ("model", "training"):
        names = previous[part] | current[part]
        differences += [f"{part}.{name}" for name in names if current[part].get(name) != previous[part].get(name)]
    if previous.get("encoder") and current["encoder"] and previous["encoder"] != current["encoder"]:
        differences.append(f"the text encoder ({previous['encoder']['name']} {previous['encoder']['digest'][:12]})")
    return differences or [("the data set's shards" if has_moved else "its format")]
