"""Machines that share nothing but an S3 server: working folders, each with the real flows but without Prefect."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from botocore.loaders import JSONFileLoader
from dvc.repo import Repo

import flows.ingest
from diffusion.data.ingest.ingest import IngestResult, Rebuild
from diffusion.data.manifest import Manifest, read_manifest, read_records
from diffusion.data.versions.takedown_records import Removal, Selection
from flows import takedown
from flows.config import Params
from flows.datasets.catalog import Catalog, Heads
from flows.datasets.checkout import checkout
from flows.environment import data_source
from flows.storage.s3 import Store
from tests.builders.command_line import servers_forgotten
from tests.builders.shapes import blob

NAME = "blobs"
FOLDER = Path("data") / NAME
BASE = range(8)
"""Numbers of the images of a first version."""


class Plain:
    """A Prefect task or flow as the function that it is."""

    def __init__(self, task: Any) -> None:
        self.function = task.fn

    def __call__(self, *arguments: object, **named: object) -> Any:
        return self.function(*arguments, **named)


class Machine:
    """A working folder on the bucket that the environment names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            folder.mkdir()
            with chdir(folder):
                Repo.init(no_scm=True).close()

    def params(self, **ingest: object) -> Params:
        storage = {"source": "images", "size": 8, "held_out": 0.33, "workers": 1}
        return Params.model_validate({"ingest": storage | ingest, "training": {"dataset": NAME, "images": 1}})

    def ingest(self, *numbers: int, rebuild: Rebuild = "never", to_retrain: bool = False) -> IngestResult:
        """Ingest the folder of images, to which those of ``numbers`` are added first."""
        with chdir(self.folder):
            for number in numbers:
                path = Path("images") / f"{number}.png"
                path.parent.mkdir(exist_ok=True)
                blob(number).save(path)
            state: Any = flows.ingest.ingest.fn(self.params(), rebuild=rebuild, to_retrain=to_retrain)
            result: IngestResult = state.data.result
            return result

    def take_down(self, number: int) -> Removal:
        with chdir(self.folder):
            removal = takedown.remove.fn(self.params(), Selection(sources=[f"{number}.png"]), "consent withdrawn")
            takedown.record.fn(self.params(), removal)
            return removal

    def check_out(self, version: str, **options: bool) -> None:
        """As ``darkroom data checkout`` does."""
        with chdir(self.folder):
            checkout(FOLDER, version, data_source, to_build_on=True, **options)

    @property
    def version(self) -> Manifest:
        return read_manifest(self.folder / FOLDER)

    @property
    def images(self) -> set[int]:
        """Numbers of the images that the data set keeps here."""
        folder = self.folder / FOLDER
        rows = (row for part in self.version.parts for row in read_records(folder, part).to_pylist())
        return {int(Path(row["source"]).stem) for row in rows if row["outcome"] == "kept"}

    @property
    def newest(self) -> str | None:
        """The head of the data set, for all machines."""
        with chdir(self.folder):
            return Heads(Catalog.of(NAME, data_source())).newest()


Machines = Callable[[str], Machine]


@pytest.fixture
def machine(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    """Makes machines on a bucket of the test's own."""
    _without_prefect(monkeypatch)
    return lambda name: Machine(tmp_path / name)


@pytest.fixture(scope="module")
def first_version(s3_server: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A machine's folder with a first version of BASE, and what it left on S3 in ``bucket`` beside it."""
    folder = tmp_path_factory.mktemp("template")
    bucket = f"test-{uuid4().hex}"
    with servers_forgotten(**s3_server, DARKROOM_BUCKET=bucket), pytest.MonkeyPatch.context() as patch:
        _without_prefect(patch)
        store = Store()
        store.ensure_bucket(bucket)
        Machine(folder / "machine").ingest(*BASE)
        for key in store.list_keys(bucket):
            path = folder / "bucket" / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(store.get(bucket, key))
    return folder


@pytest.fixture
def two(machine: Machines, first_version: Path, bucket: str, tmp_path: Path) -> tuple[Machine, Machine]:
    """Two machines with the same first version, of BASE."""
    store, root = Store(), first_version / "bucket"
    for path in root.rglob("*"):
        if path.is_file():
            store.put_once(bucket, path.relative_to(root).as_posix(), path.read_bytes())
    folders = tmp_path / "one", tmp_path / "other"
    for folder in folders:
        # As it was: DVC tells by times whether files changed.
        shutil.copytree(first_version / "machine", folder)
    return Machine(folders[0]), Machine(folders[1])


def _without_prefect(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(flows.ingest, "retryable_task", lambda function: function)
    for name in ("repair", "make_dataset"):
        patch.setattr(flows.ingest, name, Plain(getattr(flows.ingest, name)))
    for name in ("describe", "announce"):
        patch.setattr(flows.ingest, name, lambda *_: Path("page.html"))
    # Every S3 client reads the same megabytes of JSON, which takes longer than what a test does with it.
    load = JSONFileLoader.load_file
    loaded = cache(lambda path: load(JSONFileLoader(), path))
    patch.setattr(JSONFileLoader, "load_file", lambda _, path: loaded(path))


@contextmanager
def before(point: str, action: Callable[[], object]) -> Iterator[None]:
    """Inside, ``action`` happens before the first call of ``point``, which is ``module:function`` or a method."""
    module, _, path = point.partition(":")
    owner: Any = __import__(module, fromlist=["_"])
    *outer, name = path.split(".")
    for each in outer:
        owner = getattr(owner, each)
    original: Callable[..., Any] = getattr(owner, name)

    @wraps(original)
    def waiting(*arguments: Any, **named: Any) -> Any:
        setattr(owner, name, original)
        action()
        return original(*arguments, **named)

    setattr(owner, name, waiting)
    try:
        yield
    finally:
        setattr(owner, name, original)
