"""Shards straight from DVC's remote, for training that keeps only some of them on this machine."""

from functools import cached_property
from pathlib import Path
from threading import Lock

from diffusion.data.manifest import FileEntry, read_manifest
from diffusion.errors import UserError
from flows.catalogue import Catalogue
from flows.dvc_files import Listing, Remote
from flows.lineage import data_version
from flows.s3_errors import Missing


class RemoteShards:
    """Implements ``diffusion.data.shard_cache.ShardStore`` for the data set in ``folder``, pushed to ``source``.

    What its version consists of is asked for once, when the first shard is.
    """

    def __init__(self, folder: Path, source: str) -> None:
        self.folder = folder
        self.source = source
        self.remote = Remote.at(source)
        self._lock = Lock()

    def fetch(self, entry: FileEntry, path: Path) -> None:
        """Write a shard over what is at ``path``; raises UserError if the remote does not have it."""
        with self._lock:
            listing = self._listing
        try:
            self.remote.fetch(listing[entry.name], path)
        except (KeyError, Missing) as error:
            raise UserError(
                f"shard {entry.name} of data set {self.folder.name} is not on {self.source}: run `darkroom ingest` "
                "where the data set is whole, which pushes it"
            ) from error

    @cached_property
    def _listing(self) -> Listing:
        name = self.folder.name
        digest = read_manifest(self.folder).digest
        recorded = Catalogue.of(name, self.source, self.remote.store).pointer(digest)
        if recorded is None and (version := data_version(self.folder)) is not None:
            recorded = version.digest
        if recorded is None:
            raise UserError(f"version {digest[:12]} of data set {name} was never pushed: run `darkroom ingest` first")
        try:
            return self.remote.listing(recorded)
        except Missing as error:
            raise UserError(
                f"version {digest[:12]} of data set {name} is not on {self.source} (any more): run `darkroom ingest`, "
                "or check out another one with `darkroom data checkout`"
            ) from error
