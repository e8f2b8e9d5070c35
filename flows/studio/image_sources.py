"""Images to train on: a folder of this machine that people may choose, or a zip that they upload."""

import posixpath
import re
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from diffusion.common.errors import UserError
from diffusion.common.files import sha256_file, write_atomically
from diffusion.data.sources.conventions import holds_images, is_hidden
from diffusion.data.sources.zips import members
from flows.environment import settings

MAX_ZIP_BYTES = 4 * 2**30
"""Maximum size of an uploaded zip, in bytes."""
MAX_ZIP_MEMBERS = 200_000
"""Maximum number of files in it."""
MAX_UNPACKED_BYTES = 32 * 2**30
"""Maximum size of its files, in bytes: they are read one by one and never unpacked to disk."""
MAX_RATIO = 100
"""Maximum ratio of that to the size of the zip: images hardly compress."""
MAX_LISTED = 200
"""Maximum number of folders that are offered."""
UPLOADS = Path("uploads")
"""Folder of zips that were trained on."""
OWN_FOLDERS = ("data", "runs", "reports", UPLOADS.name)
"""Folders of the workspace that Darkroom writes."""
ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:")


def roots() -> list[Path]:
    """Folders below which images may be chosen: the workspace, and DARKROOM_UI_IMAGES if it is set."""
    more = settings().ui_images
    return [Path.cwd(), *([more.expanduser().resolve()] if more else [])]


def choose_folder(text: str) -> Path:
    """Resolve what a person chose or typed; raises UserError unless it is a visible folder below one of ``roots``.

    Links are resolved first, so that none leads out of them. What lies elsewhere is not told from what does not exist.
    """
    allowed = roots()
    try:
        folder = (allowed[0] / Path(text.strip()).expanduser()).resolve() if text.strip() else None
        is_allowed = folder is not None and folder.is_dir() and any(_is_visible_below(folder, root) for root in allowed)
    except (OSError, ValueError, RuntimeError):  # a name too long, a NUL, an unknown ~user
        folder, is_allowed = None, False
    if folder is None or not is_allowed:
        places = " or ".join(map(str, allowed))
        hint = "" if len(allowed) > 1 else " (DARKROOM_UI_IMAGES adds another place)"
        raise UserError(f"choose a folder with images in {places}{hint}, or upload a zip")
    if not holds_images(folder):
        raise UserError(f"no images in {folder}: choose a folder with JPEG, PNG, WebP, GIF, BMP or TIFF images")
    return folder


def _is_visible_below(folder: Path, root: Path) -> bool:
    workspace = Path.cwd()
    if not folder.is_relative_to(root) or workspace.is_relative_to(folder):
        return False  # the workspace has parameters, models and reports beside images
    if folder.is_relative_to(workspace) and folder.relative_to(workspace).parts[0] in OWN_FOLDERS:
        return False
    return not is_hidden(str(folder.relative_to(root)))


def list_folders() -> list[str]:
    """List folders to choose from: two levels of visible ones that hold images, relative to the workspace if in it."""
    workspace = Path.cwd()

    def below(root: Path) -> Iterator[Path]:
        for pattern in ("*/", "*/*/"):
            yield from sorted(path for path in root.glob(pattern) if _is_visible_below(path.resolve(), root))

    found = (path for root in roots() for path in below(root) if holds_images(path))
    return [
        str(path.relative_to(workspace) if path.is_relative_to(workspace) else path)
        for path in islice(dict.fromkeys(found), MAX_LISTED)
    ]


def check_zip(path: Path) -> None:
    """Raise UserError for a zip that is damaged or too large, or has links or names that lead out of a folder."""
    size = path.stat().st_size
    if size > MAX_ZIP_BYTES:
        raise UserError(f"the zip has over {MAX_ZIP_BYTES >> 30} GiB: put the folder on the server and choose it there")
    unpacked = 0
    for count, (name, problem, place) in enumerate(members(path), start=1):
        unpacked += place.size
        if problem is not None:
            raise UserError(f"{name!a} in the zip is not a plain file ({problem}): pack the images without it")
        if ABSOLUTE.match(name) or ".." in re.split(r"[/\\]", posixpath.normpath(name)):
            raise UserError(f"{name!a} in the zip names a place outside of it: pack the folder from above")
        if count > MAX_ZIP_MEMBERS:
            raise UserError(
                f"the zip has over {MAX_ZIP_MEMBERS:,} files: put the folder on the server, choose it there"
            )
        if unpacked > min(MAX_UNPACKED_BYTES, MAX_RATIO * size):
            limit = f"{MAX_UNPACKED_BYTES >> 30} GiB, or {MAX_RATIO} times its size"
            raise UserError(f"the zip unpacks to more than {limit}: pack fewer images, and images alone")


def keep_zip(path: Path, name: str) -> Path:
    """Copy an uploaded zip to where workers read it, now and in later retrainings, under a name with its digest."""
    target = (UPLOADS / f"{name}-{sha256_file(path)[:12]}.zip").absolute()
    if not target.exists():
        write_atomically(target, lambda partial: shutil.copyfile(path, partial))
    return target
