"""Survey of a source before its ingest: counts of images, classes and captions, and sizes in a random sample."""

import csv
import io
import random
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from PIL.ExifTags import Base
from pydantic import Field

from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.escaping import pluralize
from diffusion.common.files import write_atomically
from diffusion.data.ingest.chunks import digest_payload
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.decode import TURNED, UnusableEntryError, ignore_pillow_warnings
from diffusion.data.sources import open_source
from diffusion.data.sources.base import Access, Entry, ObjectStore, Source
from diffusion.data.sources.caption_files import (
    CAPTION_COLUMNS,
    CAPTION_TABLE,
    LABEL_COLUMNS,
    CaptionTally,
    find_column,
)
from diffusion.data.sources.conventions import METADATA_FILES, records
from diffusion.data.sources.local_files import open_text

SAMPLED = 128
"""Images that are opened."""
SIZES = (64, 48, 32, 28, 24, 16, 8)
"""Sizes of stored images that are proposed, in pixels; a CPU trains larger ones for hours."""
MIN_CROPPED = 0.15
"""Share of the pixels that cropping to squares cuts from which keeping the shapes is proposed."""
MIN_IMAGES = 1000
"""Images below which a model mostly copies them."""
USED_TABLES = (*METADATA_FILES, CAPTION_TABLE)
"""Names of tables with captions that ``ingest`` reads in the folder that it is given."""
CHECKED = 100
"""Records of a table that are compared with the files beside it."""


class CaptionsTable(Config):
    """Table beside images that names them, but is not called as ``ingest`` expects."""

    path: Path
    image: str
    """Column with file names."""
    text: str
    """Column with captions."""
    label: str | None
    """Column with class names, if any."""


class Survey(Config):
    """What a source holds."""

    source: str
    images: int
    sampled: int
    unreadable: int
    """Images of the sample that cannot be opened."""
    duplicates: int
    """Images of the sample whose file equals another one of it."""
    shorter_sides: tuple[int, int, int] | None
    """Shortest, median and longest shorter side of the sampled images, in pixels; None if none could be opened."""
    sizes: list[tuple[int, int]] = Field([], exclude=True)
    """Width and height of the sampled images, in pixels."""
    square: bool
    """Whether all sampled images are square."""
    cropped: float
    """Mean share of the pixels of the sampled images that cropping to squares would cut, 0 to 1."""
    channels: int
    """3 if a sampled image shows colours, otherwise 1."""
    classes: dict[str, int]
    """Images by label."""
    captions: int
    """Images with a caption."""
    captions_found: CaptionTally
    """Where they stand, and what beside the images was not understood."""
    passed_over: dict[str, int]
    """Number of ignored files without an image's extension, by extension."""
    captions_table: CaptionsTable | None
    """Table that probably holds captions, which the source does not use."""

    def has_images_below(self, size: int) -> bool:
        """Whether some sampled image has fewer pixels than ``size`` on its shorter side."""
        return self.shorter_sides is not None and self.shorter_sides[0] < size

    @property
    def proposed_name(self) -> str:
        """Name for the data set, after the folder or file."""
        has_options = self.source.startswith("hf:")
        place = re.split("[@?]", self.source)[0] if has_options else str(Path(self.source).resolve())
        return re.sub(r"[^a-z0-9]+", "-", Path(place).name.partition(".")[0].lower()).strip("-")[:100] or "images"

    @property
    def proposed_fit(self) -> Literal["crop", "bucket"]:
        """What to do with images that are not square."""
        return "bucket" if self.cropped >= MIN_CROPPED else "crop"

    @property
    def proposed_size(self) -> int:
        """Height and width of stored images that suit these, in pixels, if some could be opened."""
        assert self.shorter_sides is not None
        shortest, median, longest = self.shorter_sides
        if shortest == longest and self.square and 8 <= shortest <= SIZES[0] and shortest % 4 == 0:
            return shortest
        # A few small images are quarantined rather than making all others small.
        return next((size for size in SIZES if size <= max(shortest, median // 2)), SIZES[-1])

    def lines(self) -> list[str]:
        """Describe the source in a few lines."""
        if self.shorter_sides is None:
            sizes = "none of them can be read"
        else:
            first, median, last = self.shorter_sides
            sides = f"{first} pixels" if first == last else f"{first} to {last} pixels, median {median}"
            sizes = (
                f"{'square' if self.square else 'shorter side'}, {sides}, {'colour' if self.channels == 3 else 'grey'}"
            )
        top_classes = self.classes if len(self.classes) <= 8 else dict(Counter(self.classes).most_common(8))
        names = ", ".join(f"{name} {count:,}" for name, count in top_classes.items())
        rest = f" and {len(self.classes) - len(top_classes):,} more" if len(top_classes) < len(self.classes) else ""
        lines = [f"images     {self.images:,} in {self.source}: {sizes}"]
        if self.cropped >= 0.01:
            ratios = sorted(width / height for width, height in self.sizes)
            lines.append(
                f"shapes     {ratios[0]:.2g} to {ratios[-1]:.2g} times as wide as high, median "
                f"{ratios[len(ratios) // 2]:.2g}: cropping to squares would cut {self.cropped:.0%} of the pixels"
            )
        if self.unreadable and self.shorter_sides is not None:
            lines.append(f"unreadable {self.unreadable:,} of {self.sampled:,} sampled images")
        if self.duplicates:
            lines.append(f"duplicates {self.duplicates:,} of {self.sampled:,} sampled images: one of each is kept")
        lines.append(f"classes    {len(self.classes):,}: {names}{rest}" if self.classes else "classes    none")
        found = self.captions_found
        lines.append(f"captions   {found.describe() or 'none'}")
        lines += [f"warning    {found.warning}"] if found.warning else []
        if self.captions_table is not None:
            lines.append(f"           {describe_table(self.captions_table)}")
        lines += [f"folders    {folders}"] if (folders := found.describe_folders()) else []
        lines += [f"ignored    {line}" for line in found.ignored_lines()]
        lines += [f"ignored    {describe_passed_over(self.passed_over)}"] if self.passed_over else []
        if self.images < MIN_IMAGES:
            lines.append(f"note       {pluralize(self.images, 'image')}: so few that a model will mostly copy them")
        return lines


def describe_passed_over(counts: Mapping[str, int]) -> str:
    """Describe files that are neither images nor captions of one, by extension."""
    shown = [f"{count:,} {extension or 'without extension'}" for extension, count in counts.items()][:5]
    return f"neither images nor their captions: {', '.join(shown)}{' …' if len(counts) > len(shown) else ''}"


def survey(config: IngestConfig, scratch: Path, objects: ObjectStore | None = None) -> Survey:
    """List ``config.source`` and open a random sample of its images; raises UserError as ``ingest`` does."""
    access = Access(config, scratch, objects)
    source = open_source(config.source, access)
    count, classes, sample = _list(source)
    captions = access.captions.captions
    folder = Path(config.source)
    table = find_captions(folder) or _find_beside(folder) if not captions and folder.is_dir() else None
    if not count:
        raise UserError(f"no images in {config.source}: give a source of JPEG, PNG, WebP, GIF, BMP or TIFF images")
    sizes, is_coloured, digests = list[tuple[int, int]](), False, Counter[str]()
    ignore_pillow_warnings()
    for payload in source.read(sample):
        if isinstance(payload, UnusableEntryError):
            continue
        try:
            with payload if isinstance(payload, Image.Image) else Image.open(io.BytesIO(payload)) as image:
                is_turned = image.getexif().get(Base.Orientation, 1) in TURNED
                sizes.append(image.size[::-1] if is_turned else image.size)
                digests[digest_payload(payload)] += 1
                if image.width * image.height > config.max_pixels:
                    continue
                if not is_coloured:
                    image.thumbnail((64, 64))
                    is_coloured = bool(np.ptp(np.asarray(image.convert("RGB")), axis=-1).max() > 0)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # as Pillow's decoders do
            continue
    sides = sorted(map(min, sizes))
    return Survey(
        source=config.source,
        images=count,
        sampled=len(sample),
        unreadable=len(sample) - len(sizes),
        duplicates=digests.total() - len(digests),
        shorter_sides=(sides[0], sides[len(sides) // 2], sides[-1]) if sides else None,
        sizes=sizes,
        square=all(width == height for width, height in sizes),
        cropped=sum(1 - min(size) / max(size) for size in sizes) / max(len(sizes), 1),
        channels=3 if is_coloured else 1,
        classes=dict(sorted(classes.items())),
        captions=captions,
        captions_found=access.captions,
        passed_over=dict(access.passed_over.most_common()),
        captions_table=table,
    )


def _list(source: Source) -> tuple[int, Counter[str], list[Entry]]:
    """List a source: the number of its images, by class, and a random sample of them in their order."""
    sample: list[tuple[int, Entry]] = []
    classes, count, generator = Counter[str](), 0, random.Random(0)
    for count, entry in enumerate(source.entries(), start=1):
        if entry.problem is None:
            source.access.captions.add(entry.source, entry.caption)
        if entry.label is not None:
            classes[entry.label] += 1
        # Reservoir sampling: each entry is in the sample with the same probability.
        if len(sample) < SAMPLED:
            sample.append((count, entry))
        elif (place := generator.randrange(count)) < SAMPLED:
            sample[place] = count, entry
    return count, classes, [entry for _, entry in sorted(sample)]


def find_captions(folder: Path) -> CaptionsTable | None:
    """Find a table in ``folder`` that names its images, with a column of captions, and is not used by ``ingest``."""
    if any((folder / name).exists() for name in METADATA_FILES):
        return None
    tables = (*folder.glob("*.csv"), *folder.glob("*.jsonl"))
    found = (_inspect(path) for path in sorted(tables) if path.name != CAPTION_TABLE)
    return next((table for table in found if table is not None), None)


def _find_beside(folder: Path) -> CaptionsTable | None:
    """Find a table that ``ingest`` reads beside ``folder``, and that names images in it."""
    paths = [path for name in USED_TABLES if (path := folder.resolve().parent / name).is_file()]
    return next((table for path in paths if (table := _inspect(path, f"{folder.resolve().name}/"))), None)


def _inspect(path: Path, prefix: str = "") -> CaptionsTable | None:
    """Find the columns of a table with captions of images that lie beside it, their names beginning with ``prefix``."""
    try:
        with open_text(path, path.parent) as lines:
            rows = [row for row, _ in zip(records(lines, str(path)), range(CHECKED), strict=False)]
    except UserError:
        return None
    columns = list(rows[0]) if rows else []
    image = next((name for name in columns if _names_images(path.parent, rows, name, prefix)), None)
    text = find_column((name for name in columns if name != image), CAPTION_COLUMNS)
    if image is None or text is None:
        return None
    return CaptionsTable(path=path, image=image, text=text, label=find_column(columns, LABEL_COLUMNS))


def _names_images(folder: Path, rows: list[dict[str, object]], column: str, prefix: str) -> bool:
    names = [name for row in rows if isinstance(name := row.get(column), str) and name and "\0" not in name]
    file_count = sum((folder / name).is_file() for name in names if len(name) < 256 and name.startswith(prefix))
    return file_count > 0 and 2 * file_count >= len(rows)


def describe_table(table: CaptionsTable) -> str:
    """Describe what ``table`` probably is, and how to use it."""
    if table.path.name in USED_TABLES:
        return f"{table.path} has captions of these images: give its folder, `darkroom init {table.path.parent}`"
    return (
        f"{table.path.name} probably has their captions ({table.image} = file_name, {table.text} = text), but only "
        f"metadata.csv and captions.csv are read: `darkroom init {table.path.parent} --write-metadata` writes it"
    )


def write_metadata(table: CaptionsTable) -> Path:
    """Write ``metadata.csv`` beside ``table``, with the columns that ``ingest`` reads; returns its path."""
    columns: Mapping[str, str | None] = {"file_name": table.image, "text": table.text, "label": table.label}
    source_columns = {name: column for name, column in columns.items() if column is not None}
    path = table.path.with_name(METADATA_FILES[0])

    def write(partial: Path) -> None:
        with open_text(table.path, table.path.parent) as lines, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(source_columns))
            writer.writeheader()
            for row in records(lines, str(table.path)):
                writer.writerow({name: row.get(column) for name, column in source_columns.items()})

    write_atomically(path, write)
    return path
