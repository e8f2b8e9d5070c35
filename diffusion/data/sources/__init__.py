"""Sources of images, named by URI: one module for each kind."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from diffusion.common.errors import UserError
from diffusion.data.sources.base import Access, Bounded, Source

UNDERSTOOD = (
    "a folder; a .tar (.tar.gz, .tar.bz2, .tar.xz) or .zip; wds:SHARDS of WebDataset; a .parquet file or "
    "parquet:FILES; a .csv or .jsonl table of URLs; s3://BUCKET/PREFIX; torchvision:NAME; MNIST's IDX files or idx:PATH"
)
OPTIONS = re.compile(r"(.*?)\?([a-z_]+=.*)", re.DOTALL)
IDX = re.compile(r".*-images[-.]idx3-ubyte(\.gz)?")


def open_source(uri: str, access: Access) -> Source:
    """Open the source that ``uri`` names; nothing is listed or fetched yet. Its texts are bounded in length.

    A path (or ``file://`` URL) is a folder, or a file whose extension determines its kind. ``wds:``, ``parquet:``,
    ``idx:`` and ``torchvision:`` state the kind explicitly, and the last three take options: ``?NAME=VALUE&…``.

    Raises UserError for an invalid or missing source, and for options without effect.
    """
    return Bounded(_open_source(uri, access))


def _open_source(uri: str, access: Access) -> Source:
    scheme, colon, rest = uri.partition(":")
    if uri.startswith("s3://"):
        from diffusion.data.sources.object_store import Objects

        return Objects.open(uri, access)
    if scheme == "wds" and colon:
        from diffusion.data.sources.wds import WebDataset

        return WebDataset(rest, access)
    if scheme in ("parquet", "idx", "torchvision") and colon:
        place, options = _split(rest)
        return _with_options(scheme, place, options, access)
    if scheme == "file" and colon:
        return _at_path(uri, _local(uri), access)
    return _at_path(uri, Path(uri), access)


def _with_options(scheme: str, place: str, options: dict[str, str], access: Access) -> Source:
    if scheme == "parquet":
        from diffusion.data.sources.parquet import Parquet

        return Parquet.open(place, options, access)
    if scheme == "idx":
        from diffusion.data.sources.idx import Idx

        return Idx.open(Path(place), options, access)
    from diffusion.data.sources.torchvision_set import TorchvisionSet

    return TorchvisionSet.open(place, options, access)


def _at_path(uri: str, path: Path, access: Access) -> Source:
    from diffusion.data.sources.local_files import TARS

    name = path.name.lower()
    if path.is_dir():
        from diffusion.data.sources.folder import Folder

        return Folder(path, access)
    if not (name.endswith((*TARS, ".zip", ".parquet", ".csv", ".jsonl")) or IDX.fullmatch(path.name)):
        raise UserError(f"source {uri} is not a folder, nor anything else that is understood: give {UNDERSTOOD}")
    if not path.is_file():
        raise UserError(f"source {uri} does not exist: check the path")
    if name.endswith((*TARS, ".zip")):
        from diffusion.data.sources.archive import Tar, Zip

        return Zip(path, access) if name.endswith(".zip") else Tar(path, access)
    if name.endswith(".parquet"):
        return _with_options("parquet", str(path), {}, access)
    if name.endswith((".csv", ".jsonl")):
        from diffusion.data.sources.urls import Urls

        return Urls(path, access)
    return _with_options("idx", str(path), {}, access)


def _split(text: str) -> tuple[str, dict[str, str]]:
    """Split off the options ``?NAME=VALUE&…``; other question marks are part of a pattern."""
    parts = OPTIONS.fullmatch(text)
    if parts is None:
        return text, {}
    options: dict[str, str] = {}
    for option in parts[2].split("&"):
        name, equals, value = option.partition("=")
        if not equals or not value or name in options:
            raise UserError(f"{option!r} in {text} is no option: write each once, as NAME=VALUE, joined by &")
        options[name] = unquote(value)
    return parts[1], options


def _local(uri: str) -> Path:
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise UserError(f"{uri} is no file of this machine: write file:///PATH, with %3F for ? and %23 for #")
    return Path(unquote(parts.path))
