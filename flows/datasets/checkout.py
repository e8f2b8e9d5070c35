"""Checkout: make any version of a data set the current one again, verified, without git."""

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.files import write_bytes, write_json
from diffusion.data.ingest.ingest import forget_encodings, remove_strays
from diffusion.data.manifest import Manifest, manifest_bytes, read_manifest, versions, work_folder
from diffusion.data.versions.takedown_records import find_affected_versions, removals
from diffusion.data.versions.versions import choose_version, known_versions, remember
from flows.datasets import dvc
from flows.datasets.catalog import Catalog, Heads
from flows.datasets.dvc import StoredFiles, is_whole, needed_files

Reach = Callable[[], str]
"""Function that joins the S3 server and returns the URL of DVC's remote; raises UserError without a server."""


class CheckoutResult(Config):
    """Result of a checkout: the version that is the current one now."""

    dataset: str
    folder: Path
    digest: str
    content_digest: str
    kept: int
    restored: list[str]


class VersionPin(Config):
    """Older version that was checked out for the next ingest to build on."""

    version: str
    known: list[str]
    """Versions that this machine knew then: images that only they have are left out on purpose."""


def checkout(
    folder: Path,
    prefix: str | None,
    reach: Reach,
    with_removed: bool = False,
    without_shards: bool = False,
    to_build_on: bool = False,
) -> CheckoutResult:
    """Make the version whose digest begins with ``prefix`` the current one of the data set in ``folder``.

    None is the newest version in the bucket.

    Files come from the folder, DVC's cache or the remote, and are verified by SHA-256. All other versions stay known,
    and files that only the folder holds are put into DVC's cache first. Killed and given again, it ends the same.

    ``reach`` is called only if the remote is needed. ``with_removed`` allows images that were taken down since,
    ``without_shards`` skips missing shards, for training that streams them, and with ``to_build_on`` the next ingest
    continues from this version instead of the newest.

    Raises UserError if there is no such version, a file of it cannot be found, or it holds images that were taken down.
    """
    work_folder(folder).mkdir(parents=True, exist_ok=True)
    with FileLock(work_folder(folder) / "lock"):
        place = DatasetLocation(folder, reach)
        version = place.newest() if prefix is None else place.choose(prefix)
        return place.make_current(version, with_removed, without_shards, to_build_on)


def read_pin(folder: Path) -> VersionPin | None:
    """Version that was checked out to build on and that the current one continues; None without one."""
    path = _pin_path(folder)
    if not path.is_file():
        return None
    pin = VersionPin.model_validate_json(path.read_bytes())
    return pin if any(version.digest == pin.version for version in versions(folder)) else None


def unpin(folder: Path) -> None:
    """Let the next ingest continue from the newest version."""
    _pin_path(folder).unlink(missing_ok=True)


def _pin_path(folder: Path) -> Path:
    return work_folder(folder) / "checked_out.json"


class DatasetLocation:
    """Folder of a data set, whose lock the caller holds, with access to its other versions."""

    def __init__(self, folder: Path, reach: Reach) -> None:
        self.folder, self.reach = folder, reach
        self.stored_files = StoredFiles(folder.name)
        self.source: str | None = None
        self.known: dict[str, Manifest] = {}
        if (folder / "manifest.json").is_file():
            try:
                self.known = known_versions(folder)
            except UserError:  # the manifest of an earlier version is damaged
                current = read_manifest(folder)
                self.known = {current.digest: current}

    def make_current(
        self, version: Manifest, with_removed: bool = False, without_shards: bool = False, to_build_on: bool = False
    ) -> CheckoutResult:
        """Make ``version`` the current one; see ``checkout``."""
        folder = self.folder
        if not with_removed:
            self.refuse_removed(version)
        self.keep_current(version)
        names = self.fetch(version, without_shards)
        if not with_removed:
            self.refuse_removed(version)
        if to_build_on and any(child.parent == version.digest for child in self.known.values()):
            pin = VersionPin(version=version.digest, known=sorted(self.known))
            write_json(_pin_path(folder), pin.model_dump(mode="json"))
        else:
            unpin(folder)
        write_bytes(folder / "manifest.json", manifest_bytes(version))
        remove_others(folder, version)
        if without_shards:
            self.stored_files.keep_listing(version.digest)
        else:
            dvc.record_data(folder, push_to=None)
        fields = {name: getattr(version, name) for name in ("digest", "content_digest", "kept")}
        return CheckoutResult(dataset=folder.name, folder=folder, restored=names, **fields)

    def choose(self, prefix: str) -> Manifest:
        """Find the version that ``prefix`` names, here or else in the catalog."""

        def pick() -> Manifest:
            candidates = {digest: manifest.content_digest for digest, manifest in self.known.items()}
            return self.known[choose_version(prefix, candidates, self.folder.name)]

        try:
            return pick()
        except UserError as unknown:
            try:
                catalog = self.catalog()
            except UserError as error:
                raise (unknown if self.known else error) from error
        self.known = self.known | catalog.versions()
        return pick()

    def newest(self) -> Manifest:
        """Find the newest version in the catalog."""
        catalog = self.catalog()
        if (digest := Heads(catalog).newest()) is None or (version := catalog.version(digest)) is None:
            names = Catalog.names(str(catalog.place), catalog.store)
            hint = f" (there is {', '.join(names[:10])}{' …' if len(names) > 10 else ''})" if names else ""
            raise UserError(
                f"no version of data set {self.folder.name} in the bucket {catalog.place.bucket}{hint}: "
                f"run `darkroom ingest SOURCE --dataset {self.folder.name}`"
            )
        self.known = self.known | {digest: version}
        return version

    def refuse_removed(self, version: Manifest) -> None:
        """Raise UserError if ``version`` holds images that were taken down, as far as its tables are available."""
        if self.source is not None:
            self.catalog().fetch_removals(self.folder)
        for removal in removals(work_folder(self.folder)):
            if find_affected_versions(self.folder, removal, [version], self.stored_files.find).held:
                remove_strays(self.folder)
                raise UserError(
                    f"version {version.digest[:12]} of data set {self.folder.name} holds images that were taken down "
                    f"since ({removal.reason}): check out another one, or give --with-removed to have them back"
                )

    def keep_current(self, version: Manifest) -> None:
        """Save everything that the folder would lose when ``version`` becomes current."""
        if not (self.folder / "manifest.json").is_file():
            return
        for manifest in self.known.values():
            remember(self.folder, manifest)
        files, kept_names = read_manifest(self.folder).files, {entry.name for entry in version.files}
        entries = [entry for entry in files if entry.name not in kept_names and (self.folder / entry.name).is_file()]
        if any(self.stored_files.find(entry) is None for entry in entries):
            dvc.record_data(self.folder, push_to=None)

    def fetch(self, version: Manifest, without_shards: bool) -> list[str]:
        """Restore missing or damaged files of ``version``; returns their names."""
        names = []
        shards = {entry.name for entry in version.shards}
        for name, sha256 in needed_files(self.folder, version):
            path = self.folder / name
            if (without_shards and name in shards) or is_whole(path, sha256):
                continue
            if sha256 in self.known:
                write_bytes(path, manifest_bytes(self.known[sha256]))
            else:
                self.write(version, name, sha256)
            names.append(name)
        return names

    def write(self, version: Manifest, name: str, sha256: str) -> None:
        """Write a file of ``version`` into the folder atomically; raises UserError if it is found nowhere."""
        is_written = self.stored_files.write(version.digest, name, sha256, self.folder / name)
        if not is_written and self.source is None:
            self.catalog()
            is_written = self.stored_files.write(version.digest, name, sha256, self.folder / name)
        if not is_written:
            raise UserError(
                f"{name} of version {version.digest[:12]} is neither in {self.folder}, nor in DVC's cache, nor on its "
                "remote (any more): check out another one, or ingest again from a source that has all of it"
            )

    def catalog(self) -> Catalog:
        """Connect to the catalog; from then on files come from the remote as well."""
        if self.source is None:
            self.source = self.reach()
            version = dvc.data_version(self.folder)
            self.stored_files = StoredFiles(self.folder.name, self.source, version.digest if version else None)
        assert self.stored_files.catalog is not None
        return self.stored_files.catalog


def remove_others(folder: Path, version: Manifest) -> None:
    """Delete files that belong only to other versions."""
    line = {name for name, _ in needed_files(folder, version)}
    for path in (folder / "versions").glob("*.json"):
        if path.relative_to(folder).as_posix() not in line:
            path.unlink()
    forget_encodings(folder)
    remove_strays(folder)
