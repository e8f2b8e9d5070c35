"""What lies on this machine: folders of runs that do not stay, and what was fetched and not used for long."""

from collections.abc import Container, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from diffusion.checkpoints import read_header
from diffusion.errors import UserError
from diffusion.files import PARTIAL
from diffusion.training.train import discard
from flows.retention.config import RetentionConfig
from flows.retention.items import Item, Sweep, age, older

ABANDONED_DAYS = 1.0
"""Files that nobody has added to for longer are being written by nobody."""


class Machine:
    """The working folder, and the weights fetched into ``models``."""

    def __init__(
        self,
        models: Path,
        gone: Container[str],
        weights: Container[str],
        policy: RetentionConfig,
        now: datetime,
    ) -> None:
        self.models = models
        self.gone = gone
        """Train keys of runs that go in MLflow."""
        self.weights = weights
        """SHA-256 of what registered versions hold: a batch under way may be reading them."""
        self.policy = policy
        self.now = now

    def sweep(self) -> Sweep:
        """Run folders, fetched shards, fetched weights, and what killed writers left."""
        items = [*self._runs(), *self._fetched(), *self._partial()]

        def act() -> None:
            for item in items:
                if item.fate != "goes":
                    continue
                path = Path(item.name)
                if item.kind == "run folders":
                    discard(path)
                elif item.kind == "fetched shards":
                    # Whoever fetches shards into the folder counts what lies there under this lock.
                    with FileLock(path.parent / ".lock"):
                        path.unlink(missing_ok=True)
                else:
                    path.unlink(missing_ok=True)

        return Sweep(items, act)

    def _runs(self) -> Iterator[Item]:
        for final in sorted(Path("runs").glob("**/final.safetensors")):
            files = [path for path in final.parent.rglob("*") if path.is_file()]
            used = max(map(_touched, files))
            why = "finished, of runs that stay, or that MLflow does not know"
            try:
                going = read_header(final).get("train_key") in self.gone and older(used, self.policy.run_days, self.now)
            except UserError as error:
                going, why = False, str(error)
            yield Item(
                kind="run folders",
                name=str(final.parent),
                bytes=sum(path.stat().st_size for path in files),
                fate="goes" if going else "stays",
                why=f"{age(used, self.now)}, and its run goes" if going else why,
            )

    def _fetched(self) -> Iterator[Item]:
        days = self.policy.cache_days
        for path in sorted(Path("data", ".shards").glob("*.tar")):
            going = older(_touched(path), days, self.now)
            yield self._file("fetched shards", path, going, "used of late")
        for path in sorted(self.models.glob("*.safetensors")):
            going = path.stem not in self.weights and older(_touched(path), days, self.now)
            yield self._file("fetched weights", path, going, "used of late, or of registered versions")

    def _partial(self) -> Iterator[Item]:
        # Not whole data sets: their ingests sweep them, and pictures by the million may lie beside.
        folders = [
            Path("runs"),
            Path("reports"),
            *Path("data").glob(".*"),
            self.models,
            self.models.parent / "requests",
        ]
        for path in sorted(path for folder in folders for path in folder.rglob(".*.partial")):
            # Those of writers at work come and go.
            with suppress(FileNotFoundError):
                if PARTIAL.fullmatch(path.name) and older(_touched(path), ABANDONED_DAYS, self.now):
                    why = f"{age(_touched(path), self.now)}, and never finished"
                    yield Item(kind="unfinished files", name=str(path), bytes=path.stat().st_size, fate="goes", why=why)

    def _file(self, kind: str, path: Path, going: bool, why: str) -> Item:
        if going:
            why = f"{age(_touched(path), self.now)}, and can be fetched again"
        return Item(kind=kind, name=str(path), bytes=path.stat().st_size, fate="goes" if going else "stays", why=why)


def _touched(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)
