"""Export of a data set to the Hugging Face Hub: Parquet, which its viewer shows, with card and Croissant."""

import json
import re
import shutil
from pathlib import Path

from diffusion.common.hub import MAX_CARD, Repository, hub_api, retry
from diffusion.common.hub_push import PushResult, check_push, push_files
from diffusion.common.progress import Progress, ignore_progress
from diffusion.data.export.base import ExportDetails, Rows
from diffusion.data.export.croissant import export_identity
from diffusion.data.export.export import CROISSANT, DIGESTS, DatasetExport, describe_export, export_dataset
from diffusion.data.export.parquet_files import ParquetFiles
from diffusion.data.manifest import read_manifest, work_folder


class HubExport(DatasetExport):
    """Result of an export to the Hub."""

    pushed: PushResult


def repository_name(uri: str) -> str:
    """Return OWNER/NAME of ``hf://[datasets/]OWNER/NAME``; raises UserError as ``check_push`` does."""
    is_short = uri.startswith("hf://") and not uri.startswith("hf://datasets/")
    return check_push(f"hf://datasets/{uri.removeprefix('hf://')}" if is_short else uri, "dataset")


def export_to_hub(
    folder: Path,
    uri: str,
    details: ExportDetails | None = None,
    public: bool = False,
    progress: Progress = ignore_progress,
) -> HubExport:
    """Push the current version of the data set in ``folder`` to the repository of a data set, in one commit.

    What is there already is not written again. The files lie on this machine until the commit is there, so that what
    was killed goes on. The repository is created if it does not exist, private unless ``public``.

    Raises UserError as ``check_push`` and ``export_dataset`` do, and DarkroomError if the Hub cannot be reached.
    """
    name, manifest, details = repository_name(uri), read_manifest(folder), details or ExportDetails()
    data_format = ParquetFiles(Rows(folder, manifest))
    identity = export_identity(data_format, details)

    def create() -> None:
        hub_api().create_repo(name, repo_type="dataset", private=not public, exist_ok=True)

    retry(f"data set {name}", create)
    head = Repository.resolve("dataset", name, None)
    place = f"hf://datasets/{name}"
    if (files := _count_exported(head, identity)) is not None:
        pushed = PushResult(repository=place, commit=head.commit, created=False, files=files)
        export = describe_export(data_format, place, files, details, False)
        return HubExport(**dict(export), pushed=pushed)
    exports = work_folder(folder) / "exports"
    output = exports / f"{name.replace('/', '--')}.{identity[-16:]}"
    start = re.escape(name.replace("/", "--"))
    own = re.compile(rf"\.?{start}\.[0-9a-f]{{16}}(\..*)?")
    for other in exports.glob("*"):
        # Of other versions, which killed pushes left.
        if own.fullmatch(other.name) and identity[-16:] not in other.name and other.is_dir():
            shutil.rmtree(other)
    export = export_dataset(folder, data_format.name, output, details, progress)
    paths = sorted(path for path in output.rglob("*") if path.is_file())
    message = f"Export content {export.content_digest[:16]} from Darkroom"
    contents: dict[str, Path | bytes] = {path.relative_to(output).as_posix(): path for path in paths}
    pushed = push_files("dataset", name, contents, message, public)
    shutil.rmtree(output)
    return HubExport(**dict(export) | {"place": place, "created": pushed.created}, pushed=pushed)


def _count_exported(head: Repository, identity: str) -> int | None:
    """Return the files of the export ``identity`` if ``head`` has it whole; None if it does not."""
    files = head.files
    if any(name not in files or files[name].size > MAX_CARD for name in (CROISSANT, DIGESTS)):
        return None
    try:
        if json.loads(head.read(files[CROISSANT])).get("identifier") != identity:
            return None
    except (ValueError, AttributeError):  # somebody else's file, which is replaced
        return None
    lines = head.read(files[DIGESTS]).decode("utf-8", "replace").splitlines()
    for line in lines:
        digest, _, path = line.partition("  ")
        # Small files have other digests there.
        if path not in files or (len(files[path].digest) == 64 and files[path].digest != digest):
            return None
    return len(lines) + 1
