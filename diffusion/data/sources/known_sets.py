"""Well-known data sets: IDX files such as MNIST's, and the sets of torchvision by name."""

import inspect
import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Self
from urllib.error import URLError

from PIL import Image

from diffusion.common.errors import UserError
from diffusion.data.ingest.decode import UnusableEntryError
from diffusion.data.sources.base import MISSING, Access, Entry, Payload
from diffusion.data.sources.conventions import make_printable
from diffusion.data.sources.local_files import (
    changed_file_error,
    decompress,
    read_file,
    stamp,
    stamp_if_exists,
    stamp_of,
)

IDX_SPLITS = {"train": "train", "test": "t10k"}
IDX_FILES = ("MNIST", "FashionMNIST", "KMNIST")
"""Sets of torchvision read by ``Idx``: torchvision loads the pickles of its older versions if it finds some."""
IMAGE_FILES = (
    *("Country211", "DTD", "EuroSAT", "FGVCAircraft", "Flowers102", "Food101"),
    *("Imagenette", "Places365", "RenderedSST2", "StanfordCars", "SUN397"),
)
"""Sets that list files, with labels from text, JSON or MAT files; the images are read as they are."""
ARRAYS = ("SEMEION", "STL10", "SVHN", "USPS")
"""Sets with all images in one text, raw or MAT file, which torchvision holds in memory."""
# Pickles themselves, or kept by ``torch.save``, or with a cache of keys in a pickle.
PICKLED = ("CIFAR10", "CIFAR100", "EMNIST", "ImageNet", "LSUN", "PhotoTour", "QMNIST")


def find_idx(folder: Path) -> str | None:
    """Find the source that reads the IDX files in ``folder``, of training images if there are several; None: none."""
    splits = [split for split, name in IDX_SPLITS.items() if any(folder.glob(f"{name}-images[-.]idx3-ubyte*"))]
    if len(splits) > 1:
        return f"idx:{folder}?split={splits[0]}"
    return f"idx:{folder}" if any(folder.glob("*-images[-.]idx3-ubyte*")) else None


@dataclass(frozen=True)
class Idx:
    """The images in the file ``images``, named ``FILE/NUMBER``, with the numbers of their classes as labels.

    Labels come from the file beside it that is named as in MNIST (``train-labels-idx1-ubyte`` beside
    ``train-images-idx3-ubyte``), if any. Files may end in ``.gz``.

    Format: http://yann.lecun.com/exdb/mnist (big-endian; two zero bytes, the type 8 for unsigned bytes, the number
    of dimensions, their sizes as 32-bit integers, then the values in C order).
    """

    images: Path
    access: Access
    in_order = True

    @classmethod
    def open(cls, name: str, options: dict[str, str], access: Access) -> Self:
        """Open the file ``name``, or the one for ``split`` (train, test) in the folder ``name``."""
        place, split = Path(name), options.get("split")
        if split not in (None, *IDX_SPLITS):
            raise UserError(f"idx:{place} has no split {split}: give train or test")
        if place.is_file():
            if split:
                raise UserError(f"idx:{place} is one file, so split={split} would have no effect: leave it out")
            return cls(place, access)
        pattern = f"{IDX_SPLITS[split] if split else '*'}-images[-.]idx3-ubyte"
        # Unpacked files take precedence.
        candidates = {path.stem: path for path in place.glob(f"{pattern}.gz")}
        candidates |= {path.name: path for path in place.glob(pattern)}
        if not candidates:
            raise UserError(f"idx:{place} is neither an IDX file nor a folder with {split or ''} ones: check the path")
        if len(candidates) > 1:
            raise UserError(f"idx:{place} holds {' and '.join(sorted(candidates))}: choose with ?split=train or test")
        return cls(next(iter(candidates.values())), access)

    def entries(self) -> Iterator[Entry]:
        """Yield all images in the file's order; raises UserError if it is damaged, or its labels differ in number."""
        file_stamp, name = stamp_of(self.images), make_printable(self.images.name)
        with ExitStack() as stack:
            _, (count, height, width) = self._open(stack, self.images, file_stamp, 3)
            name_of_labels = self.images.name.replace("-images", "-labels").replace("idx3", "idx1").removesuffix(".gz")
            labels = None
            for path in (self.images.with_name(name_of_labels), self.images.with_name(f"{name_of_labels}.gz")):
                if labels is None and path.is_file() and path != self.images:
                    labels, (length,) = self._open(stack, path, stamp_of(path), 1)
                    if length != count:
                        raise UserError(f"{path} has {length} labels for {count} images: give the files of one set")
            for number in range(count):
                label = str(labels.read(1)[0]) if labels else None
                yield Entry(f"{name}/{number}", json.dumps([number, height, width]), file_stamp, label)

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Yield decoded grey images; raises UserError if the file has changed since it was listed."""
        if not entries:
            return
        with ExitStack() as stack:
            try:
                file, _ = self._open(stack, self.images, entries[0].stamp, 3)
            except FileNotFoundError:
                yield from (UnusableEntryError(MISSING) for _ in entries)
                return
            for entry in entries:
                number, height, width = json.loads(entry.locator)
                if width * height > (limit := self.access.config.max_pixels):
                    yield UnusableEntryError(f"{width}×{height} pixels are over the limit of {limit}")
                    continue
                file.seek(16 + number * height * width)
                yield Image.frombytes("L", (width, height), file.read(height * width))

    def _open(self, stack: ExitStack, path: Path, file_stamp: str, dimensions: int) -> tuple[BinaryIO, tuple[int, ...]]:
        """Open an IDX file whose stamp is ``file_stamp``; returns it, positioned behind its header, and its sizes."""
        plain_path = decompress(path, file_stamp, self.access)
        if plain_path == path and stamp(path.stat()) != file_stamp:
            raise changed_file_error(str(path))
        file = stack.enter_context(plain_path.open("rb"))
        magic, *sizes = struct.unpack(f">{dimensions + 1}I", file.read(4 * dimensions + 4).ljust(4 * dimensions + 4))
        if magic != (8 << 8) + dimensions:
            raise UserError(f"{path} is no IDX file of {dimensions} dimensions of unsigned bytes: check the path")
        if plain_path.stat().st_size != 4 * dimensions + 4 + prod(sizes) or 0 in sizes[1:]:
            raise UserError(f"{path} has not the length that its header says: it is damaged or was cut short")
        return file, tuple(sizes)


@dataclass(frozen=True)
class TorchvisionSet:
    """A set that torchvision calls ``name``, where it keeps it in the folder ``root``; labels are its classes' names.

    Its loading code unpickles nothing (checked in torchvision 0.24 and 0.28), nor converts images to RGB.
    """

    name: str
    root: Path
    arguments: dict[str, Any]
    """Arguments of torchvision's class besides ``root``: nothing, ``split`` or ``train``."""
    download: bool
    access: Access
    in_order = True

    @classmethod
    def open(cls, name: str, options: dict[str, str], access: Access) -> Self:
        """Open a set with the options ``root`` (needed), ``split``, ``download``; raises UserError for other sets."""
        where, names, split = f"torchvision:{name}", sorted((*IDX_FILES, *IMAGE_FILES, *ARRAYS)), options.get("split")
        if name in PICKLED:
            raise UserError(f"{where} is kept in pickles, and they could run anything: save it as PNG or Parquet first")
        if name not in names:
            raise UserError(f"{where} is not known; there are {', '.join(names)}: read other sets as a folder")
        if "root" not in options:
            raise UserError(f"{where} lies in no folder: give the one that torchvision keeps it in, as ?root=FOLDER")
        if options.get("download", "true") not in ("true", "false"):
            raise UserError(f"{where} has download={options['download']}: write true or false")
        arguments: dict[str, Any] = {}
        if split:
            parameters = inspect.signature(_torchvision_class(name)).parameters
            if "split" in parameters:
                arguments = {"split": split}
            elif "train" not in parameters:
                raise UserError(f"{where} has no splits: leave split={split} out")
            elif split not in ("train", "test"):
                raise UserError(f"{where} has no split {split}: give train or test")
            else:
                arguments = {"train": split == "train"}
        return cls(name, Path(options["root"]).expanduser(), arguments, options.get("download") == "true", access)

    def entries(self) -> Iterator[Entry]:
        """Yield all images in the set's order; raises UserError if it is not in ``root``, or cannot be downloaded."""
        if self.name in IDX_FILES:
            if self.download:
                folder = self.root / self.name / "processed"
                if folder.exists():
                    raise UserError(f"{folder} is of an old torchvision, and this one would unpickle it: take it away")
                self._open(download=True)
            classes = _torchvision_class(self.name).classes
            for entry in self._idx().entries():
                yield entry._replace(label=_label(int(entry.label), classes) if entry.label else None)
            return
        dataset = self._open(self.download, **({"loader": Path} if self.name in IMAGE_FILES else {}))
        classes = getattr(dataset, "classes", None)
        for number in range(len(dataset)):
            image, target = dataset[number]
            label = _label(target, classes)
            if isinstance(image, Path):
                name = image.relative_to(self.root).as_posix()
                yield Entry(make_printable(name), json.dumps([str(image)]), stamp_if_exists(image), label)
            else:
                # Such a set never changes; torchvision verifies checksums where it has them.
                yield Entry(f"{self.name}/{number}", json.dumps([number]), self.name, label)

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Yield the bytes of the images, or decoded images if a set has no image files."""
        if self.name in IDX_FILES:
            yield from self._idx().read(entries)
        elif self.name in IMAGE_FILES:
            for entry in entries:
                yield read_file(Path(json.loads(entry.locator)[0]), self.access.config.max_bytes)
        else:
            dataset = self._open()
            for entry in entries:
                image: Image.Image = dataset[json.loads(entry.locator)[0]][0]
                yield image

    def _idx(self) -> Idx:
        split = "train" if self.arguments.get("train", True) else "test"
        return Idx.open(f"{self.root}/{self.name}/raw", {"split": split}, self.access)

    def _open(self, download: bool = False, **options: Any) -> Any:
        """Open torchvision's data set, without its default download."""
        where = f"torchvision:{self.name} in {self.root}"
        try:
            return _torchvision_class(self.name)(self.root, download=download, **self.arguments, **options)
        except URLError as error:
            raise UserError(f"{where} cannot be downloaded ({error}): put it there by hand, or try again") from error
        except (RuntimeError, ValueError, FileNotFoundError) as error:
            hint = "check root and split, or add download=true"
            raise UserError(f"{where} cannot be read ({' '.join(str(error).split())}): {hint}") from error


def _label(target: int, classes: Sequence[str | tuple[str, ...]] | None) -> str | None:
    """Return the name of a class, or the first of its names; its number if it has none; None for −1."""
    if target < 0:
        return None
    if classes is None or target >= len(classes):
        return str(target)
    name = classes[target]
    return name if isinstance(name, str) else name[0]


def _torchvision_class(name: str) -> Any:
    # Imported here: it loads torch, which most ingests do not need.
    from torchvision import datasets

    return getattr(datasets, name)
