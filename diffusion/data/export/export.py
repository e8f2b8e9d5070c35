"""Export of a data set to a folder: whole or not at all, once, and resumed after a kill at any moment."""

import json
import shlex
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.escaping import escape_markdown
from diffusion.common.files import (
    digest_of,
    make_folder,
    remove_partials,
    sha256_file,
    sync_file,
    sync_folder,
    write_bytes,
    write_json,
)
from diffusion.common.hub_push import card_licence
from diffusion.common.progress import Progress, ignore_progress
from diffusion.data.export import FORMATS
from diffusion.data.export.base import ExportDetails, ExportFormat, Rows
from diffusion.data.export.croissant import describe, describe_as_croissant, describe_licence, export_identity
from diffusion.data.ingest.config import StorageConfig
from diffusion.data.manifest import Manifest, read_manifest, work_folder

CROISSANT, CARD, DIGESTS = "croissant.json", "README.md", "SHA256SUMS"
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
"""Categories of sizes that the Hub knows, by the images that are too many for them."""


class DatasetExport(Config):
    """Result of an export."""

    place: str
    """Its folder, or its repository on the Hub."""
    format: str
    images: int
    splits: dict[str, int]
    files: int
    """Number of files, descriptions included."""
    content_digest: str
    licence: str
    """The licence that its descriptions name, or ``unknown``."""
    created: bool
    """Whether it was written now; otherwise the same was there already."""


def export_dataset(
    folder: Path,
    to: str,
    output: Path,
    details: ExportDetails | None = None,
    progress: Progress = ignore_progress,
) -> DatasetExport:
    """Write the current version of the data set in ``folder`` to ``output``, in the format ``to``.

    Pixels are not changed, so that ingesting the export with the same storage settings gives the same content digest,
    but for images with several captions, which come back as one.
    Beside the images lie a card, ``croissant.json``, and the digests of all files. The same export again changes
    nothing; one that was killed goes on.

    Raises UserError if ``output`` holds something else, and for a data set that is empty or damaged.
    """
    manifest, details, output = read_manifest(folder), details or ExportDetails(), output.absolute()
    if not manifest.kept:
        raise UserError(f"data set {manifest.name} has no images: ingest some first")
    rows = Rows(folder, manifest)
    try:
        data_format = FORMATS[to](rows)
        identity = export_identity(data_format, details)
        locks = work_folder(folder) / "exports"
        for place in (output.parent, locks):
            make_folder(place)
        with FileLock(locks / f"{digest_of(str(output))[:16]}.lock"):
            created = not (output.exists() and _is_same(output, identity))
            if created:
                # By its identity, so that a killed export of other content is not mixed in.
                partial = output.with_name(f".{output.name}.{identity[-16:]}.partial")
                _write(data_format, partial, details, progress)
                _publish(partial, output)
        files = len(_read_digests(output / DIGESTS)) + 1
    finally:
        rows.close()
    return describe_export(data_format, str(output), files, details, created)


def describe_export(
    data_format: ExportFormat, place: str, files: int, details: ExportDetails, created: bool
) -> DatasetExport:
    """Return the result of an export."""
    manifest = data_format.manifest
    return DatasetExport(
        place=place,
        format=data_format.name,
        images=manifest.kept,
        splits={name: manifest.counts[split] for split, name in data_format.splits.items()},
        files=files,
        content_digest=manifest.content_digest,
        licence=describe_licence(manifest, details),
        created=created,
    )


def _write(data_format: ExportFormat, folder: Path, details: ExportDetails, progress: Progress) -> None:
    """Write what is missing in ``folder``, the digests last."""
    make_folder(folder)
    remove_partials(folder)
    done, total = 0, data_format.manifest.kept
    for split in data_format.splits:
        for count in data_format.write(folder, split):
            done += count
            progress("images exported", done, total)
    digests = {name: digest for name, digest in _digests(folder).items() if name not in (CARD, CROISSANT, DIGESTS)}
    today = datetime.now(UTC).date().isoformat()
    write_json(folder / CROISSANT, describe_as_croissant(data_format, details, digests, today))
    write_bytes(folder / CARD, write_card(data_format, details).encode())
    digests |= {name: sha256_file(folder / name) for name in (CARD, CROISSANT)}
    lines = [f"{digest}  {name}\n" for name, digest in sorted(digests.items())]
    write_bytes(folder / DIGESTS, "".join(lines).encode())


def _publish(partial: Path, output: Path) -> None:
    for path in partial.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            sync_file(path)
    if output.is_dir():  # empty
        output.rmdir()
    partial.rename(output)
    sync_folder(output.parent)


def _is_same(output: Path, identity: str) -> bool:
    """Whether ``output`` is this export, whole; False if it is an empty folder. Raises UserError for anything else."""
    if not output.is_dir():
        raise UserError(f"{output} is a file: give another folder")
    if not any(output.iterdir()):
        return False
    try:
        found = json.loads((output / CROISSANT).read_bytes())["identifier"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{output} is there, and is not an export of a data set: give another folder") from error
    if found != identity:
        raise UserError(f"{output} is an export of other content, or with other options: give another folder")
    expected = _read_digests(output / DIGESTS)
    actual = {name: digest for name, digest in _digests(output).items() if name != DIGESTS}
    if differences := sorted({name for name, _ in expected.items() ^ actual.items()}):
        raise UserError(f"{output} is there and differs ({differences[0]}): give another folder, or remove it")
    return True


def _read_digests(path: Path) -> dict[str, str]:
    try:
        return {name: digest for digest, _, name in (line.partition("  ") for line in path.read_text().splitlines())}
    except OSError as error:
        raise UserError(f"{path} is missing: remove the folder, and export again") from error


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of all files, by path."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(paths)}


def write_card(data_format: ExportFormat, details: ExportDetails) -> str:
    """Write the card of an export in the form of the Hub: front matter with files and licence, and what it holds."""
    manifest = data_format.manifest
    title, licence = details.title or manifest.name, describe_licence(manifest, details)
    front_matter: dict[str, Any] = {
        **card_licence(licence),
        "pretty_name": title,
        "size_categories": [next((name for size, name in SIZES if manifest.kept < size), "n>10M")],
        "task_categories": ["text-to-image" if data_format.rows.has_captions else "unconditional-image-generation"],
        "tags": ["darkroom", "croissant"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": path} for name, path in data_format.patterns().items()],
            }
        ],
    }
    rows = {"images": describe(manifest), "licence": licence, **_history(manifest)}
    table = "\n".join(f"| {name} | {escape_markdown(str(value))} |" for name, value in rows.items())
    return f"""---
{yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True).strip()}
---

# {escape_markdown(title)}

| | |
|---|---|
{table}

The file `croissant.json` describes the fields; what is not recorded there is for the publisher to fill in. Its content
digest comes again if Darkroom ingests this export with the same storage settings:

```sh
darkroom ingest {data_format.scheme}FOLDER{_ingest_options(manifest)}
```
"""


def _ingest_options(manifest: Manifest) -> str:
    """Return the options of ``ingest`` that store images in the same way, with their masks."""
    defaults = dict(StorageConfig())
    values = {name: value for name, value in manifest.storage if value != defaults[name] or name == "size"}
    values |= {"masks": "files"} if manifest.masks else {}
    # In YAML a colour without quotes is a comment.
    texts = {
        name: f"[{', '.join(value)}]" if isinstance(value, tuple) else json.dumps(value)
        for name, value in values.items()
    }
    return "".join(f" --set {shlex.quote(f'ingest.{name}={text}')}" for name, text in texts.items())


def _history(manifest: Manifest) -> Mapping[str, str]:
    outcomes: Counter[str] = Counter()
    for part in manifest.parts:
        outcomes.update(part.outcomes)
    facts = {
        "classes": ", ".join(f"{name} ({count:,})" for name, count in list(manifest.class_histogram.items())[:50]),
        "sources": ", ".join(manifest.sources),
        "captions by": ", ".join(f"{name} ({count:,})" for name, count in manifest.captioners.items()),
        "left out": ", ".join(f"{count:,} {name}" for name, count in sorted(outcomes.items()) if name != "kept"),
    }
    return {name: text for name, text in facts.items() if text}
