"""Power is cut while a command works: the same command ends as if it had not been, and no finished file is torn."""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from diffusion.common.files import PARTIAL, make_folder, sha256_bytes
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.evaluation.config import EvaluationConfig
from diffusion.evaluation.evaluate import evaluate
from diffusion.families.config import ModelConfig
from diffusion.generation.config import make_request
from diffusion.generation.requests import generate_to_folder
from diffusion.process.samplers import sampling_config
from diffusion.training.config import TrainingConfig
from diffusion.training.logging import read_metrics
from diffusion.training.train import train
from flows.local_stack.backup import Backup, Backups, save
from flows.local_stack.stack import SERVICES, LocalStack
from flows.storage.s3 import Store
from tests.builders.ingested import files_of
from tests.builders.shapes import blob
from tests.builders.small_models import write_model
from tests.chaos.power_cut import Loss, Recording, library, record

State = dict[str, object]
SET, RUN, REPORT, MADE = Path("data", "set"), Path("runs", "set"), Path("report"), Path("made")
STACK, BACKUPS = Path(".darkroom"), Path("backups")
SAMPLING = sampling_config(steps=2, compute_batch=18, precision="fp32")
MODEL = ModelConfig(width=16, channel_mult=(1,), blocks=1, attention=(), patch=1)
TRAINING = TrainingConfig(images=192, checkpoints=4, batch_size=16, warmup_images=32, keep=2, cpu_threads=1)
EVALUATION = EvaluationConfig(samples=16, extractor_size=32)
SCRIPT = """
import sys
from pathlib import Path
from tests.chaos import power_drills
getattr(power_drills, sys.argv[1])(Path.cwd(), *map(Path, sys.argv[2:]))
"""


@dataclass(frozen=True)
class Drill:
    """What is recorded, and how it is known that all is well."""

    recording: Recording
    again: Callable[[Path], State]
    """Does the same work in a folder, and says how that ended."""
    durable: tuple[str, ...]
    """Names that are there, whatever is lost, once the program has said that it is done."""

    def run(self, folder: Path, cuts: int, seed: int) -> int:
        """Cut the power ``cuts`` times, each with every kind of loss; returns how many states were gone on from."""
        chance, number = random.Random(seed), 0
        self.recording.start.write_to(folder / "start", Loss.ALL, chance)
        expected = self.again(folder / "start")
        for disk, ended in self.recording.cuts(cuts, chance):
            for loss in Loss:
                target = folder / f"cut-{number}"
                disk.write_to(target, loss, chance)
                torn = disk.torn(target)
                assert not torn, (number, loss, torn)
                assert not ended or [name for name in self.durable if not (target / name).exists()] == [], loss
                outcome = self.again(target)
                differs = {
                    name: (outcome[name], expected[name]) for name in expected if outcome[name] != expected[name]
                }
                assert not differs, (number, loss, differs)
                shutil.rmtree(target)
                number += 1
        return number


def run_ingest(folder: Path, images: Path) -> State:
    """Into data/set below ``folder``, in several chunks."""
    ingest(folder / SET, IngestConfig(source=str(images), size=8, held_out=0.33, shard_bytes=2**16))
    return {"files": files_of(folder / SET), "work": sorted(path.name for path in (folder / "data/.set").iterdir())}


def run_train(folder: Path, dataset: Path) -> State:
    """With a few checkpoints, into runs/set below ``folder``."""
    train(dataset, folder / RUN, MODEL, TRAINING, SAMPLING)
    output = folder / RUN
    measured = {"images_per_second", "data_wait", "peak_memory"}
    return {
        "final": (output / "final.safetensors").read_bytes(),
        # One more is left where the power was cut between the last one and the removal of an older one.
        "checkpoints": sorted(path.name for path in (output / "checkpoints").iterdir())[-2 * TRAINING.keep :],
        "samples": {name: sha256_bytes(data) for name, data in files_of(output / "samples").items()},
        "losses": (output / "losses.csv").read_bytes(),
        "history": [
            {name: value for name, value in row.items() if name not in measured}
            for row in read_metrics(output / "history.csv")
        ],
    }


def run_evaluate(folder: Path, dataset: Path, checkpoints: Path) -> State:
    """Of two checkpoints, into report below ``folder``."""
    result = evaluate(dataset, sorted(checkpoints.iterdir()), EVALUATION, SAMPLING, folder / REPORT)
    about = result.model_dump(mode="json", exclude={"best", "checkpoints"})
    files = {name: sha256_bytes(data) for name, data in _finished(folder / REPORT).items() if name.startswith("grids/")}
    return {"about": about, "scores": [each.metrics() for each in result.checkpoints], "files": files}


def run_sample(folder: Path, weights: Path) -> State:
    """Of a model's file, into made below ``folder``."""
    generate_to_folder(weights, make_request({"task": "sample", "count": 6, "seed": 1}), SAMPLING, folder / MADE)
    return {"files": _finished(folder / MADE)}


def _finished(folder: Path) -> dict[str, bytes]:
    """The files in ``folder`` but for what a writer left who was stopped: who does not hold a folder leaves these."""
    return {name: data for name, data in files_of(folder).items() if not PARTIAL.fullmatch(Path(name).name)}


def ingest_drill(folder: Path) -> Drill:
    """Of `ingest`, which begins a data set."""
    write_images(folder / "images", range(120))
    return _drill(folder, "run_ingest", run_ingest, (folder / "images",), (f"{SET}/manifest.json",))


def adding_drill(folder: Path) -> Drill:
    """Of `ingest`, which adds to a data set."""
    write_images(folder / "images", range(60))
    run_ingest(folder / "root", folder / "images")
    write_images(folder / "images", range(60, 120))
    return _drill(folder, "run_ingest", run_ingest, (folder / "images",), (f"{SET}/manifest.json",))


def train_drill(folder: Path) -> Drill:
    """Of `train`."""
    write_images(folder / "images", range(60))
    run_ingest(folder, folder / "images")
    return _drill(folder, "run_train", run_train, (folder / SET,), (f"{RUN}/final.safetensors", f"{RUN}/history.csv"))


def evaluate_drill(folder: Path) -> Drill:
    """Of `evaluate`, which keeps what took long."""
    write_images(folder / "images", range(60))
    run_ingest(folder, folder / "images")
    for images in (100, 200):
        write_model(folder / "checkpoints" / f"{images}.safetensors", images, images)
    durable = tuple(f"{REPORT}/{name}" for name in ("evaluation.json", "metrics.json", "report.html"))
    return _drill(folder, "run_evaluate", run_evaluate, (folder / SET, folder / "checkpoints"), durable)


def sample_drill(folder: Path) -> Drill:
    """Of `sample` of a model's file."""
    weights = write_model(folder / "weights.safetensors", 1, 0)
    return _drill(folder, "run_sample", run_sample, (weights,), (f"{MADE}/request.json", f"{MADE}/00000005.png"))


def write_images(folder: Path, numbers: range) -> None:
    """One for each of ``numbers``, in two classes."""
    for number in numbers:
        path = folder / ("even" if number % 2 == 0 else "odd") / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        blob(number).save(path)


def _drill(
    folder: Path, name: str, work: Callable[..., State], given: tuple[Path, ...], durable: tuple[str, ...]
) -> Drill:
    root = folder / "root"
    root.mkdir(exist_ok=True)
    recording = record(library(folder), root, SCRIPT, name, *map(str, given))
    # As in the program that was recorded.
    torch.set_num_threads(1)
    return Drill(recording, lambda target: work(target, *given), durable)


def run_stack(folder: Path) -> State:
    """What `up` writes of a stack, into .darkroom below ``folder``, as each of its servers gets a port."""
    stack = LocalStack.open(folder / STACK, "bucket")
    for number, service in enumerate(SERVICES, 1):
        stack = stack.update_state(
            servers=("s3", "mlflow", "prefect"), ports=stack.state.ports | {service: 10000 + number}
        )
    local_stack = LocalStack.read(folder / STACK)
    return {
        "state": local_stack.state.model_dump(),
        "passwords": local_stack.credentials == stack.credentials,
    }


def stack_drill(folder: Path) -> Drill:
    """Of the files of `up`."""
    return _drill(folder, "run_stack", run_stack, (), (f"{STACK}/credentials.json", f"{STACK}/stack.json"))


def run_backup(folder: Path, bucket: Path) -> State:
    """Of all objects of the bucket called like ``bucket``, and of a database, into backups below ``folder``."""
    backups, store = Backups(folder / BACKUPS), Store()
    make_folder(folder / BACKUPS, 0o700)
    saved = save(store, bucket.name, list(store.list_objects(bucket.name)), backups)
    (folder / "mlflow.db").write_bytes(b"database" * 1000)
    databases = {"mlflow/mlflow.db": backups.keep(partial(shutil.copyfile, folder / "mlflow.db"))}
    time_of_backup = datetime(2026, 1, 1, tzinfo=UTC)
    backups.write(Backup(made=time_of_backup, bucket=bucket.name, versions={}, databases=databases, objects=saved))
    backup = backups.read()
    bytes_of = {each.key: sha256_bytes(backups.verified_path(each.sha256).read_bytes()) for each in backup.objects}
    return {
        "objects": bytes_of,
        "databases": [sha256_bytes(backups.verified_path(each).read_bytes()) for each in databases.values()],
    }


def backup_drill(folder: Path, bucket: str) -> Drill:
    """Of `backup`, of a bucket on the server that the environment names."""
    return _drill(folder, "run_backup", run_backup, (folder / bucket,), (f"{BACKUPS}/backups/20260101T000000Z.json",))
