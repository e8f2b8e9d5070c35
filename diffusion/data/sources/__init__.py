"""Sources of images, named by URI: a class for each kind, which is imported below.

Other packages add theirs under ``darkroom.sources``.
"""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from diffusion.common.config import classes_in
from diffusion.common.errors import UserError
from diffusion.common.extensions import extension_versions, with_extensions

# isort: off
from diffusion.data.sources.base import Access as Access
from diffusion.data.sources.base import Source as Source
from diffusion.data.sources.conventions import EXTENSIONS as EXTENSIONS
from diffusion.data.sources.conventions import Folder as Folder
from diffusion.data.sources.tars import Tar as Tar
from diffusion.data.sources.zips import Zip as Zip
from diffusion.data.sources.tars import WebDataset as WebDataset
from diffusion.data.sources.parquet import Parquet as Parquet
from diffusion.data.sources.object_store import Objects as Objects
from diffusion.data.sources.hub_dataset import HubDataset as HubDataset
# isort: on

GROUP = "darkroom.sources"
"""Entry points: the scheme, and a subclass of ``Source``."""
SOURCES = {kind.scheme: kind for kind in classes_in(globals(), Source)}  # type: ignore[type-abstract]
"""Sources by scheme; a path without one is a folder, or a file whose name ends in one of a source's ``suffixes``."""
WITH_OPTIONS = re.compile(r"(.*?)\?([a-z_]+=.*)", re.DOTALL)
"""Other question marks are part of a pattern."""


def open_source(uri: str, access: Access) -> Source:
    """Open the source that ``uri`` names; nothing is listed or fetched yet.

    Raises UserError for an invalid or missing source, and for options without effect.
    """
    scheme, place = _resolve(uri)
    source = with_extensions(GROUP, SOURCES)[scheme]
    has_scheme = uri.startswith(f"{scheme}:")
    if not (has_scheme and source.options and (match := WITH_OPTIONS.fullmatch(place))):
        return source(place, access)
    return source(match[1], access, _parse_options(source, scheme, *match.groups()))


def reader_of(uri: str) -> str | None:
    """Return what reads ``uri``, as ``SCHEME: PACKAGE VERSION``; None for Darkroom's own sources."""
    scheme, _ = _resolve(uri)
    package = extension_versions(GROUP).get(scheme)
    return package and f"{scheme}: {package}"


def _resolve(uri: str) -> tuple[str, str]:
    """Return the scheme and the place of ``uri``; raises UserError if no source reads it."""
    sources = with_extensions(GROUP, SOURCES)
    scheme, colon, place = uri.partition(":")
    if colon and scheme in sources:
        return scheme, place
    if uri.startswith(("http://", "https://")):
        raise UserError(
            f"source {uri} is an address on the web, which is not read directly: download it, a "
            "table of many by img2dataset, and give its path"
        )
    path = Path(uri)
    if scheme == "file" and colon:
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise UserError(f"{uri} is not a file of this machine: write file:///PATH, with %3F for ? and %23 for #")
        path = Path(unquote(parts.path))
    if path.is_dir():
        return "folder", str(path)
    matches = (scheme for scheme, source in sources.items() if path.name.lower().endswith(source.suffixes))
    if (match := next(matches, None)) is None:
        if path.suffix.lower() in EXTENSIONS and path.is_file():
            raise UserError(f"source {uri} is one image: give the folder that it is in")
        state = "is not understood" if path.exists() else "does not exist"
        raise UserError(f"source {uri} {state}: give {'; '.join(source.form for source in sources.values())}")
    if not path.is_file():
        raise UserError(f"source {uri} does not exist: check the path")
    return match, str(path)


def _parse_options(source: type[Source], scheme: str, place: str, text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for option in text.split("&"):
        name, equals, value = option.partition("=")
        if not equals or not value or name in options:
            raise UserError(
                f"{option!r} in {place}?{text} is not an option: write each once, as NAME=VALUE, joined by &"
            )
        if name not in source.options:
            raise UserError(f"{scheme}:{place} has no option {name}: there is {', '.join(source.options)}")
        options[name] = unquote(value)
    return options
