"""Sources of images, named by URI: one module for each kind."""

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from diffusion.common.errors import UserError
from diffusion.data.sources.base import Access, Source
from diffusion.data.sources.conventions import EXTENSIONS, Folder
from diffusion.data.sources.hub_dataset import OPTIONS, HubDataset
from diffusion.data.sources.known_sets import Idx, TorchvisionSet
from diffusion.data.sources.local_files import TARS
from diffusion.data.sources.object_store import Objects
from diffusion.data.sources.parquet import Parquet
from diffusion.data.sources.tars import Tar, WebDataset
from diffusion.data.sources.zips import Zip

SUPPORTED = (
    "a folder; a .tar (.tar.gz, .tar.bz2, .tar.xz) or .zip; wds:SHARDS of WebDataset; a .parquet file or "
    "parquet:FILES; a .csv or .jsonl table of URLs; s3://BUCKET/PREFIX; hf://datasets/OWNER/NAME; torchvision:NAME; "
    "MNIST's IDX files or idx:PATH"
)
OPENERS: dict[str, tuple[Callable[[str, dict[str, str], Access], Source], tuple[str, ...]]] = {
    "hf": (HubDataset.open, OPTIONS),
    "parquet": (Parquet, ("image", "label", "caption")),
    "idx": (Idx.open, ("split",)),
    "torchvision": (TorchvisionSet.open, ("root", "split", "download")),
}
"""Schemes that take options, and their names."""
WITH_OPTIONS = re.compile(r"(.*?)\?([a-z_]+=.*)", re.DOTALL)
"""Other question marks are part of a pattern."""
IDX = re.compile(r".*-images[-.]idx3-ubyte(\.gz)?")


def open_source(uri: str, access: Access) -> Source:
    """Open the source that ``uri`` names; nothing is listed or fetched yet.

    A path (or ``file://`` URL) is a folder, or a file whose extension determines its kind. ``wds:``, ``parquet:``,
    ``hf:``, ``idx:`` and ``torchvision:`` state the kind explicitly, and the last four take options: ``?NAME=VALUE&…``.

    Raises UserError for an invalid or missing source, and for options without effect.
    """
    scheme, colon, rest = uri.partition(":")
    if uri.startswith("s3://"):
        return Objects.open(uri, access)
    if scheme == "wds" and colon:
        return WebDataset(rest, access)
    if scheme in OPENERS and colon:
        match = WITH_OPTIONS.fullmatch(rest)
        place, options = (match[1], _options(scheme, *match.groups())) if match else (rest, {})
        return OPENERS[scheme][0](place, options, access)
    if uri.startswith(("http://", "https://")):
        raise UserError(
            f"source {uri} is an address on the web, which is not read directly: download it and give its path, or "
            "give a .csv table with a column url"
        )
    path = Path(uri)
    if scheme == "file" and colon:
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise UserError(f"{uri} is no file of this machine: write file:///PATH, with %3F for ? and %23 for #")
        path = Path(unquote(parts.path))
    name = path.name.lower()
    if path.is_dir():
        return Folder(path, access)
    if not (name.endswith((*TARS, ".zip", ".parquet", ".csv", ".jsonl")) or IDX.fullmatch(path.name)):
        if path.suffix.lower() in EXTENSIONS and path.is_file():
            raise UserError(f"source {uri} is one image: give the folder that it is in")
        state = "is not understood" if path.exists() else "does not exist"
        raise UserError(f"source {uri} {state}: give {SUPPORTED}")
    if not path.is_file():
        raise UserError(f"source {uri} does not exist: check the path")
    if name.endswith(TARS):
        return Tar(path, access)
    if name.endswith(".zip"):
        return Zip(path, access)
    if name.endswith(".parquet"):
        return Parquet(str(path), {}, access)
    if name.endswith((".csv", ".jsonl")):
        # Imported here: HTTP clients are slow to import, and most ingests do not need one.
        from diffusion.data.sources.urls import Urls

        return Urls(path, access)
    return Idx(path, access)


def _options(scheme: str, place: str, text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for option in text.split("&"):
        name, equals, value = option.partition("=")
        if not equals or not value or name in options:
            raise UserError(f"{option!r} in {place}?{text} is no option: write each once, as NAME=VALUE, joined by &")
        if name not in (names := OPENERS[scheme][1]):
            raise UserError(f"{scheme}:{place} has no option {name}: there is {', '.join(names)}")
        options[name] = unquote(value)
    return options
