"""Captions in files beside images: a class for each convention, listed in ``CAPTION_FILES``, and a tally of them.

What decided: sd-scripts reads ``.caption`` and, as everyone sets it, ``.txt`` (kohya_ss issues 547 and 988); its tools
and ai-toolkit write JSON with ``caption`` and ``tags``; OneTrainer samples one of the lines of a text file.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from diffusion.common.escaping import pluralize
from diffusion.common.parsing import parse_json

MAX_TEXT_BYTES = 2**18
"""Maximum bytes of a file with a caption: parsed JSON may take a hundred times as many."""
MAX_SHOWN = 60
"""Maximum characters of a caption in a line of output."""
MAX_KINDS = 20
"""Maximum number of kinds of ignored files that are counted apart."""
NUMBER = re.compile(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?")
MIN_BOX = 5
"""Words from which a text of numbers is taken for boxes of a detector, as YOLO writes them beside images."""


class Texts(NamedTuple):
    """What a source says about an image."""

    label: str | None
    caption: str | None
    """Several captions, of which training samples one, are several lines."""


class ForeignFileError(ValueError):
    """A file with the name of a caption file, but of another tool; its message says what it is."""


class CaptionFile(ABC):
    """A file with the image's name and an ``extension`` of its own."""

    extension: ClassVar[str]

    @property
    def name(self) -> str:
        """Its name in ``ingest.captions``."""
        return self.extension[1:]

    @property
    def form(self) -> str:
        """Its name in output."""
        return f"NAME{self.extension}"

    def read(self, payload: object) -> Texts:
        """Parse what was read of it, or raise the reason why it was not read, as ``parse`` does."""
        if not isinstance(payload, bytes):
            raise ValueError(str(payload))
        return self.parse(payload)

    @abstractmethod
    def parse(self, data: bytes) -> Texts:
        """Parse it; raises ForeignFileError for what is not a caption, and ValueError for what cannot be read."""


class TextFile(CaptionFile):
    """``NAME.txt``: each line is a caption."""

    extension = ".txt"

    def parse(self, data: bytes) -> Texts:
        """Decode it."""
        text = decode_text(data)
        words = text.replace(",", " ").split()
        if len(words) >= MIN_BOX and all(map(NUMBER.fullmatch, words[:-1])):
            raise ForeignFileError("numbers alone")
        return Texts(None, join_captions(text.splitlines()))


class CaptionTextFile(TextFile):
    """``NAME.caption``, the default of sd-scripts."""

    extension = ".caption"


class JsonFile(CaptionFile):
    """``NAME.json``: ``caption``, ``text`` or ``captions``, a text or a list; ``tags`` follow, as in sd-scripts."""

    extension = ".json"

    def read(self, payload: object) -> Texts:
        """Read it; other tools write such files as well, and of any size."""
        if not isinstance(payload, bytes):
            raise ForeignFileError(str(payload))
        return self.parse(payload)

    def parse(self, data: bytes) -> Texts:
        """Parse it, whatever else is in it."""
        try:
            value = parse_json(decode_text(data))
            record = value if isinstance(value, dict) else {"caption": value}
            texts = next((record[name] for name in ("caption", "text", "captions") if record.get(name)), None)
            caption, tags = to_caption(texts), record.get("tags")
            if isinstance(tags, list):
                tags = ", ".join(text for tag in tags if (text := to_text(tag)))
            tags = to_caption(tags)
            label = to_text(record.get("label"))
        except ValueError as error:
            raise ForeignFileError("no caption in it") from error
        if tags is not None:
            caption = tags if caption is None else join_captions(f"{line}, {tags}" for line in caption.splitlines())
        if caption is None and label is None:
            raise ForeignFileError("no caption in it")
        return Texts(label, caption)


CAPTION_FILES: tuple[CaptionFile, ...] = (TextFile(), CaptionTextFile(), JsonFile())
"""Files beside an image, in the order in which the first with a caption counts."""
CAPTION_TABLE = "captions.csv"
"""Table with captions of images; unlike metadata.csv it does not say which images there are."""
IMAGE_COLUMNS = ("file_name", "filename", "file", "image", "image_path", "path", "name", "key")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "description", "comment", "title")
LABEL_COLUMNS = ("label", "class", "category")


def find_column(columns: Iterable[str], names: tuple[str, ...]) -> str | None:
    """Return the first of ``columns`` that is called as one of ``names``, in any case."""
    return next((column for column in columns if column.strip().lower() in names), None)


def decode_text(data: bytes) -> str:
    """Decode UTF-8, or UTF-16 that begins with its mark; raises ValueError for anything else, such as an image."""
    is_utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("it is not text in UTF-8") from error
    if re.search("[\x00-\x08\x0e-\x1a\x7f]", text):
        raise ValueError("it has control characters: it is not a text")
    return text


def join_captions(texts: Iterable[str]) -> str | None:
    """Join several captions, a line for each; None if all are empty."""
    return "\n".join(line for text in texts if (line := " ".join(text.split()))) or None


def to_caption(value: object) -> str | None:
    """Convert a caption, or a list of several, to text with a line for each; raises ValueError for anything else."""
    if isinstance(value, list):
        return join_captions(text for item in value if (text := to_text(item)) is not None)
    text = to_text(value)
    return text if text is None or len(text.splitlines()) < 2 else join_captions([" ".join(text.split())])


def complete_caption(caption: str | None, default: str | None, trigger: str | None) -> str | None:
    """Return ``caption``, or else ``default``, with ``trigger`` in each of its lines: for [trigger], or before it."""
    caption = caption or default
    if trigger is None:
        return caption
    lines = [line.replace("[trigger]", trigger) for line in (caption or trigger).split("\n")]
    return "\n".join(line if trigger in line else f"{trigger}, {line}" for line in lines)


def to_text(value: object) -> str | None:
    """Convert a label or caption from JSON or a table to text; empty: None. Raises ValueError for lists and such."""
    if value is None or value == "":
        return None
    if not isinstance(value, str | int | float):
        raise ValueError(f"{str(value)[:60]!r} is neither text nor a number")
    return str(value).encode("utf-8", "backslashreplace").decode()


@dataclass
class CaptionTally:
    """Count of the captions in a listing, and of what lies beside its images and was not understood."""

    images: int = 0
    captions: int = 0
    """Images with a caption."""
    first: tuple[str, str] | None = None
    """Name and caption of the first image with one, by name."""
    first_without: str | None = None
    """Name of the first image without a caption."""
    places: dict[str, int] = field(default_factory=dict)
    """Images with a caption by where it stands, as NAME.txt; empty for columns of a table."""
    ignored: dict[str, int] = field(default_factory=dict)
    """What was not used, and how often."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first file or row of each of these."""
    folders: dict[str, int] = field(default_factory=dict)
    """Folders called as in sd-scripts, such as 10_cat, and their repeats."""

    def add(self, name: str, caption: str | None) -> None:
        """Count an image."""
        self.images += 1
        if caption is None:
            self.first_without = min(name, self.first_without or name)
            return
        self.captions += 1
        if self.first is None or name < self.first[0]:
            self.first = name, caption.partition("\n")[0]

    def count_place(self, place: str) -> None:
        """Count an image whose caption stands in ``place``."""
        self.places[place] = self.places.get(place, 0) + 1

    def ignore(self, what: str, example: str) -> None:
        """Count a file or row that is not used."""
        if len(self.ignored) >= MAX_KINDS and what not in self.ignored:
            what = "other file"
        self.ignored[what] = self.ignored.get(what, 0) + 1
        self.examples.setdefault(what, example)

    def describe(self) -> str | None:
        """Describe the captions in a line; None if there are none."""
        if self.first is None:
            return None
        places = " and ".join(self.places)
        source = f", from {places}" if places else ""
        _, first = self.first
        shown = first if len(first) <= MAX_SHOWN else f"{first[: MAX_SHOWN - 1]}…"
        return f"{self.captions:,} of {pluralize(self.images, 'image')}{source}; first: {shown}"

    @property
    def warning(self) -> str | None:
        """Warning if some images have a caption and others have none."""
        missing = self.images - self.captions
        if not self.captions or not missing:
            return None
        verb = "has" if missing == 1 else "have"
        return f"{missing:,} of {self.images:,} images {verb} no caption, such as {self.first_without}"

    def describe_folders(self) -> str | None:
        """Describe folders called as in sd-scripts in a line; None if there are none."""
        if not self.folders:
            return None
        names = [folder.rpartition("/")[2] for folder in self.folders]
        rest = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
        return f"{', '.join(names[:3])}{rest}: repeats and a word, as in sd-scripts"

    def ignored_lines(self) -> list[str]:
        """Name what was not used, a line for each kind."""
        return [f"{count:,} × {what}, such as {self.examples[what]}" for what, count in self.ignored.items()]
