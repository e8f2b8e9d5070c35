"""``gc``, takedowns, checkouts, backups and restores that are struck at random moments, and given again."""

import json
import random
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals
from typing import Any
from uuid import uuid4

import pytest
from mlflow.client import MlflowClient

from diffusion.common.files import sha256_bytes, sha256_file
from diffusion.data.manifest import read_manifest
from flows.local_stack.backup import Backups
from flows.local_stack.control import RESTORING
from flows.local_stack.server_process import members
from flows.local_stack.stack import SERVICES, LocalStack
from flows.storage.s3 import Object, Store, client
from tests.builders.forked import Forks, rounds
from tests.builders.ingested import files_of
from tests.builders.workspace import running
from tests.chaos.house import QUICK, House, Site, own_stores, stack_alone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STRICT = {
    "data_versions": 1, "data_days": 0, "run_days": 0, "batch_days": 0, "cache_days": 0, "grace_hours": 0,
}  # fmt: skip
GC = ("gc", *(word for name, value in STRICT.items() for word in ("--set", f"retention.{name}={value}")))
TAKEDOWN = ("data", "remove", "odd/00*.png", "--reason", "consent withdrawn", "--purge", "--yes")
CACHED = re.compile(r"[0-9a-f]{30}(\.dir)?")
"""Names in DVC's cache but those of files that were not finished."""
signals = pytest.mark.parametrize("number", [SIGKILL, SIGTERM], ids=lambda number: number.name)


@dataclass(frozen=True)
class Machine:
    """A working folder with a bucket and an MLflow of its own, which can be set back to how they are now."""

    site: Site
    forks: Forks
    store: Store
    bucket: str
    variables: dict[str, str | None]
    saved: Path

    @property
    def folder(self) -> Path:
        return self.site.folder

    def finish(self, *arguments: str) -> str:
        return self.forks.finish(self.folder, *arguments, **self.variables)

    def objects(self) -> dict[str, bytes]:
        return {key: self.store.get(self.bucket, key) for key in self.store.list_keys(self.bucket)}

    def save(self) -> dict[str, bytes]:
        shutil.copytree(self.folder, self.saved, symlinks=True)
        return self.objects()

    def set_back(self, objects: dict[str, bytes]) -> None:
        self.store.delete_many(self.bucket, list(self.store.list_keys(self.bucket)))
        self.store.put_many(
            self.bucket, [Object(key, data, "application/octet-stream") for key, data in objects.items()]
        )
        shutil.rmtree(self.folder)
        shutil.copytree(self.saved, self.folder, symlinks=True)

    def end(self) -> dict[str, Any]:
        """All there is, but for times."""
        # Not by MLflow's client, which would keep the file open that is set back.
        with closing(sqlite3.connect(self.folder / "mlflow.db")) as mlflow:
            stages = dict(mlflow.execute("SELECT run_uuid, lifecycle_stage FROM runs"))
            tags = sorted(mlflow.execute("SELECT run_uuid, key FROM tags"))
            notes = mlflow.execute("SELECT run_uuid, value FROM tags WHERE key = 'mlflow.note.content'").fetchall()
        objects = {
            # Takedowns and their records are named by what they are about, and tell when they were done.
            key: data if key.endswith((".png", ".tar")) or "/md5/" in key else b""
            for key, data in self.objects().items()
            # Marks of who was killed while it pushed, which pass when they are old.
            if not key.startswith("pushing/")
        }
        return {
            "objects": {key: sha256_bytes(data) for key, data in objects.items()},
            "runs": (stages, tags),
            "takedowns noted": sorted((run, note.count("Takedown")) for run, note in notes),
            "shards": {
                name: sha256_bytes(data)
                for name, data in files_of(self.folder / "data").items()
                if name.endswith((".tar", ".parquet"))
            },
            "cache": sorted(
                path.name for path in (self.folder / ".dvc" / "cache").rglob("*") if CACHED.fullmatch(path.name)
            ),
            "runs' folders": sorted(str(path.relative_to(self.folder)) for path in (self.folder / "runs").rglob("*")),
        }


@pytest.fixture(scope="module")
def machine(house: House, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Machine, dict[str, bytes]]:
    """A champion with samples, and a run, a data version and a batch that gc takes away; and the bucket's objects."""
    folder = tmp_path_factory.mktemp("machine")
    site = house.site(folder / "machine")
    bucket = f"test-{uuid4().hex}"
    house.store.ensure_bucket(bucket)
    new_machine = Machine(site, forks, house.store, bucket, own_stores(site.folder, bucket), folder / "saved")
    new_machine.finish(*site.retraining)
    new_machine.finish("sample", "--count", "2", "--seed", "9")
    new_machine.finish("train", "--set", "training.seed=1", "--set", "training.output=runs/second")
    for size in (10, 12):
        new_machine.finish(
            "ingest", str(house.images), "--rebuild", "--dataset", "other", "--set", f"ingest.size={size}"
        )
    return new_machine, new_machine.save()


def ends(
    machine: tuple[Machine, dict[str, bytes]], number: Signals, kills: int, command: tuple[str, ...], times: int
) -> Iterator[dict[str, Any]]:
    """Yield the end of an undisturbed ``command``, then of those at which ``kills`` signals struck.

    Each is given ``times`` times to its end.
    """
    on, objects = machine
    on.set_back(objects)
    start = time.monotonic()
    on.finish(*command)
    seconds = time.monotonic() - start
    for _ in range(times - 1):
        on.finish(*command)
    yield on.end()
    moments = random.Random(number)
    for strikes in rounds(kills):
        on.set_back(objects)
        for _ in range(strikes):
            on.forks.strike(number, moments.uniform(0, seconds), on.folder, *command, **on.variables)
        for _ in range(times):
            on.finish(*command)
        yield on.end()


@pytest.mark.drill
@pytest.mark.parametrize(("command", "times"), [(GC, 3), (TAKEDOWN, 1)], ids=["gc", "takedown"])
@signals
def test_interrupted_gc_or_takedown_ends_the_same(
    machine: tuple[Machine, dict[str, bytes]], number: Signals, kills: int, command: tuple[str, ...], times: int
) -> None:
    undisturbed, *others = ends(machine, number, kills, command, times)
    assert others
    for end in others:
        assert end == undisturbed


def ends_in_places(
    forks: Forks, number: Signals, kills: int, place: Callable[[int], tuple[Path, tuple[str, ...]]], **variables: Any
) -> Iterator[str]:
    """Yield what a command prints in each folder that ``place`` gives with it: undisturbed at first, then struck."""
    moments, seconds = random.Random(number), 0.0
    for index, strikes in enumerate([0, *rounds(kills)]):
        folder, command = place(index)
        for _ in range(strikes):
            forks.strike(number, moments.uniform(0, seconds), folder, *command, **variables)
        start = time.monotonic()
        output = forks.finish(folder, *command, **variables)
        seconds = seconds or time.monotonic() - start
        yield output


@pytest.mark.drill
@signals
def test_interrupted_checkout_ends_in_the_same_files(
    machine: tuple[Machine, dict[str, bytes]], house: House, tmp_path: Path, number: Signals, kills: int
) -> None:
    on, objects = machine
    on.set_back(objects)
    expected = files_of(on.folder / "data" / on.site.name)
    command = ("data", "checkout", read_manifest(on.folder / "data" / on.site.name).digest)

    def place(index: int) -> tuple[Path, tuple[str, ...]]:
        return house.site(tmp_path / str(index) / on.site.name).folder, command

    for index, _ in enumerate(ends_in_places(on.forks, number, kills, place, **on.variables)):
        assert files_of(tmp_path / str(index) / on.site.name / "data" / on.site.name) == expected


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """A stack of its own with a run and 300 objects, two of them large."""
    folder = tmp_path_factory.mktemp("stack")
    with running(folder, QUICK, 0) as space, pytest.MonkeyPatch.context() as patch:
        space.join(patch)
        mlflow = MlflowClient()
        mlflow.log_text(mlflow.create_run("0").info.run_id, "kept", "kept.txt")
        local_stack = LocalStack.read(folder / ".darkroom")
        source = random.Random(1)
        sizes = [*[2**10] * 298, 2**25, 2**25]
        objects = [Object(f"kept/{number}", source.randbytes(size), "x/y") for number, size in enumerate(sizes)]
        Store(client(variables=local_stack.variables("s3"))).put_many(local_stack.bucket, objects)
        yield local_stack


def held(stack: LocalStack) -> dict[str, str]:
    """The objects of a stack's bucket, by their SHA-256."""
    store = Store(client(variables=stack.variables("s3")))
    return {key: sha256_bytes(store.get(stack.bucket, key)) for key in store.list_keys(stack.bucket)}


@pytest.mark.drill
@signals
def test_interrupted_backup_is_complete_when_repeated(
    stack: LocalStack, forks: Forks, tmp_path: Path, number: Signals, kills: int
) -> None:
    variables, expected = stack_alone(stack.folder), held(stack)

    def place(index: int) -> tuple[Path, tuple[str, ...]]:
        return tmp_path, ("server", "backup", str(tmp_path / str(index)), "--json")

    for index, output in enumerate(ends_in_places(forks, number, kills, place, **variables)):
        target = tmp_path / str(index)
        backup = Backups(target).read(json.loads(output)["stamp"])
        assert {each.key: each.sha256 for each in backup.objects} == expected
        for sha256 in (*expected.values(), *backup.databases.values()):
            assert sha256_file(Backups(target).path(sha256)) == sha256
        assert not (target / "objects" / ".partial").exists()
        shutil.rmtree(target)


def _is_restored(folder: Path) -> bool:
    """Whether a restore ended before the signal came: it has made a stack, which no other one overwrites."""
    return LocalStack.read(folder) is not None and not (folder / RESTORING).exists()


@pytest.mark.drill
@signals
def test_interrupted_restore_recovers_the_whole_backup(
    stack: LocalStack, forks: Forks, tmp_path: Path, number: Signals, kills: int
) -> None:
    expected, target = held(stack), str(tmp_path / "backups")
    forks.finish(tmp_path, "server", "backup", target, **stack_alone(stack.folder))
    moments, seconds = random.Random(number), 0.0
    for index, strikes in enumerate([0, *rounds(kills)]):
        folder = tmp_path / f"restored{index}"
        variables = stack_alone(folder)
        try:
            for _ in range(strikes):
                if not _is_restored(folder):
                    forks.strike(
                        number, moments.uniform(0, seconds), tmp_path, "server", "restore", target, **variables
                    )
            start = time.monotonic()
            if not _is_restored(folder):
                forks.finish(tmp_path, "server", "restore", target, **variables)
            seconds = seconds or time.monotonic() - start
            restored = LocalStack.read(folder)
            assert held(restored) == expected
            with pytest.MonkeyPatch.context() as patch:
                for name, value in restored.variables("mlflow").items():
                    patch.setenv(name, value)
                [run] = MlflowClient(restored.url("mlflow")).search_runs(["0"])
                assert [item.path for item in MlflowClient().list_artifacts(run.info.run_id)] == ["kept.txt"]
        finally:
            for process in members(folder, *SERVICES):
                process.kill()
