"""Masks in files beside images: ``NAME.mask.png``, or ``NAME-masklabel.png`` as OneTrainer calls them."""

import json
import posixpath
import sqlite3

from diffusion.data.sources.base import Access

MASK_ENDS = (".mask", "-masklabel")
"""Ends of the names of masks, before the extension."""
UNUSED = "mask of an image, which ingest.masks=files uses"
ORPHAN, SECOND = "mask without an image", "second mask of an image"
MASK_COLUMN = "mask"
"""Column of tables with masks."""


def stem_of_image(stem: str) -> str | None:
    """Return the name of the image whose mask would be called ``stem``, both without extension; None for others."""
    return next((stem.removesuffix(end) for end in MASK_ENDS if stem.endswith(end)), None)


def separate_masks(database: sqlite3.Connection, access: Access) -> None:
    """Take the masks out of the images in the table ``files`` of a listing; what is not used is tallied."""
    database.execute("CREATE INDEX masks ON files (mask_of, name) WHERE mask_of IS NOT NULL")
    if database.execute("SELECT 1 FROM files WHERE mask_of IS NOT NULL LIMIT 1").fetchone() is None:
        return
    database.execute("CREATE INDEX image_stems ON files (stem) WHERE caption_file IS NULL")
    is_orphan = "NOT EXISTS (SELECT 1 FROM files i WHERE i.stem = files.mask_of AND i.caption_file IS NULL)"
    is_second = "EXISTS (SELECT 1 FROM files i WHERE i.mask_of = files.mask_of AND i.name < files.name)"
    is_used = access.config.masks == "files"
    if not is_used:  # images as all others
        database.execute(f"UPDATE files SET mask_of = NULL WHERE mask_of IS NOT NULL AND {is_orphan}")
    reason = f"CASE WHEN {is_orphan} THEN '{ORPHAN}' WHEN {is_second} THEN '{SECOND}' END" if is_used else f"'{UNUSED}'"
    for name, text in database.execute(f"SELECT name, {reason} FROM files WHERE mask_of IS NOT NULL"):
        if text is not None:
            access.captions.ignore(text, name)
    database.execute("UPDATE files SET folder = NULL WHERE mask_of IS NOT NULL")


def mask_of(database: sqlite3.Connection, image: str, access: Access) -> str | None:
    """Return ``Entry.mask`` of an image of the table ``files``."""
    if access.config.masks != "files":
        return None
    query = "SELECT locator, stamp FROM files WHERE mask_of = ? ORDER BY name, number DESC LIMIT 1"
    row = database.execute(query, (posixpath.splitext(image)[0],)).fetchone()
    return None if row is None else json.dumps(row)
