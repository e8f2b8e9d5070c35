"""Well-known data sets: IDX files such as MNIST's, and the sets of torchvision by name."""

import inspect
import struct
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
from PIL import Image

from diffusion.common.errors import UserError
from diffusion.data.ingest.decode import UnusableEntryError
from diffusion.data.sources.base import MISSING, Access, Entry, Payload, Source
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


class Idx(Source):
    """The images in a file named ``….images-idx3-ubyte``, with the numbers of their classes as labels: ``FILE/NUMBER``.

    The place is the file, or a folder that has the one for ``split`` (train, test). Labels come from the file beside it
    that is named as in MNIST (``train-labels-idx1-ubyte`` beside ``train-images-idx3-ubyte``), if any. Files may end in
    ``.gz``.

    Format: http://yann.lecun.com/exdb/mnist (big-endian; two zero bytes, the type 8 for unsigned bytes, the number
    of dimensions, their sizes as 32-bit integers, then the values in C order).
    """

    scheme = "idx"
    form = "MNIST's IDX files or idx:PATH"
    suffixes = tuple(f"-images{sign}idx3-ubyte{packed}" for sign in "-." for packed in ("", ".gz"))
    options = ("split",)
    in_order = True

    def __init__(self, place: str, access: Access, values: Mapping[str, str] = {}) -> None:
        """Choose the file; raises UserError if there are none or several."""
        super().__init__(place, access, values)
        self.images, split = self.path, values.get("split")
        if split not in (None, *IDX_SPLITS):
            raise UserError(f"idx:{place} has no split {split}: give train or test")
        if self.images.is_file():
            if split:
                raise UserError(f"idx:{place} is one file, so split={split} would have no effect: leave it out")
            return
        pattern = f"{IDX_SPLITS[split] if split else '*'}-images[-.]idx3-ubyte"
        # Unpacked files take precedence.
        candidates = {path.stem: path for path in self.path.glob(f"{pattern}.gz")}
        candidates |= {path.name: path for path in self.path.glob(pattern)}
        if not candidates:
            raise UserError(f"idx:{place} is neither an IDX file nor a folder with {split or ''} ones: check the path")
        if len(candidates) > 1:
            raise UserError(f"idx:{place} holds {' and '.join(sorted(candidates))}: choose with ?split=train or test")
        (self.images,) = candidates.values()

    def entries(self) -> Iterator[Entry]:
        """Yield all images in the file's order; raises UserError if it is damaged, or its labels differ in number."""
        file_stamp, name = stamp_of(self.images), make_printable(self.images.name)
        count = len(self._map(self.images, file_stamp, 3))
        label_name = self.images.name.replace("-images", "-labels").replace("idx3", "idx1").removesuffix(".gz")
        paths = (self.images.with_name(label_name), self.images.with_name(f"{label_name}.gz"))
        labels = None
        if path := next((path for path in paths if path.is_file() and path != self.images), None):
            labels = self._map(path, stamp_of(path), 1)
            if len(labels) != count:
                raise UserError(f"{path} has {len(labels)} labels for {count} images: give the files of one set")
        for number in range(count):
            yield Entry(f"{name}/{number}", str(number), file_stamp, None if labels is None else str(labels[number]))

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Yield decoded grey images; raises UserError if the file has changed since it was listed."""
        try:
            images = self._map(self.images, entries[0].stamp, 3) if entries else np.empty((0, 0, 0))
        except FileNotFoundError:
            yield from (UnusableEntryError(MISSING) for _ in entries)
            return
        _, height, width = images.shape
        for entry in entries:
            if width * height > (limit := self.access.config.max_pixels):
                yield UnusableEntryError(f"{width}×{height} pixels are over the limit of {limit}")
            else:
                yield Image.fromarray(images[int(entry.locator)])

    def _map(self, path: Path, file_stamp: str, dimensions: int) -> np.ndarray:
        """Map the values of an IDX file whose stamp is ``file_stamp``."""
        plain_path, header = decompress(path, file_stamp, self.access), 4 * dimensions + 4
        if plain_path == path and stamp(path.stat()) != file_stamp:
            raise changed_file_error(str(path))
        with plain_path.open("rb") as file:
            magic, *shape = struct.unpack(f">{dimensions + 1}I", file.read(header).ljust(header))
        if magic != (8 << 8) + dimensions:
            raise UserError(f"{path} is not an IDX file of {dimensions} dimensions of unsigned bytes: check the path")
        if plain_path.stat().st_size != header + prod(shape) or 0 in shape[1:]:
            raise UserError(f"{path} has not the length that its header says: it is damaged or was cut short")
        return np.memmap(plain_path, np.uint8, "r", header, tuple(shape))


class TorchvisionSet(Source):
    """The images of a set by the name that torchvision calls it; labels are its classes' names.

    Its options are ``root``, the folder in which torchvision keeps it (needed), ``split`` and ``download``. Its loading
    code unpickles nothing (checked in torchvision 0.24 and 0.28), nor converts images to RGB.
    """

    scheme = "torchvision"
    form = "torchvision:NAME"
    options = ("root", "split", "download")
    in_order = True

    def __init__(self, place: str, access: Access, values: Mapping[str, str] = {}) -> None:
        """Check name and options; raises UserError for other sets."""
        super().__init__(place, access, values)
        where, names, split = f"torchvision:{place}", sorted((*IDX_FILES, *IMAGE_FILES, *ARRAYS)), values.get("split")
        if place in PICKLED:
            raise UserError(f"{where} is kept in pickles, and they could run anything: save it as PNG or Parquet first")
        if place not in names:
            raise UserError(f"{where} is not known; there are {', '.join(names)}: read other sets as a folder")
        if "root" not in values:
            raise UserError(f"{where} lies in no folder: give the one that torchvision keeps it in, as ?root=FOLDER")
        if values.get("download", "true") not in ("true", "false"):
            raise UserError(f"{where} has download={values['download']}: write true or false")
        self.root, self.download = Path(values["root"]).expanduser(), values.get("download") == "true"
        self.arguments: dict[str, Any] = {}
        """Arguments of torchvision's class besides ``root``: nothing, ``split`` or ``train``."""
        if split:
            parameters = inspect.signature(_torchvision_class(place)).parameters
            if "split" in parameters:
                self.arguments = {"split": split}
            elif "train" not in parameters:
                raise UserError(f"{where} has no splits: leave split={split} out")
            elif split not in ("train", "test"):
                raise UserError(f"{where} has no split {split}: give train or test")
            else:
                self.arguments = {"train": split == "train"}

    def entries(self) -> Iterator[Entry]:
        """Yield all images in the set's order; raises UserError if it is not in ``root``, or cannot be downloaded."""
        if self.place in IDX_FILES:
            if self.download:
                folder = self.root / self.place / "processed"
                if folder.exists():
                    raise UserError(f"{folder} is of an old torchvision, and this one would unpickle it: take it away")
                self._open(download=True)
            classes = _torchvision_class(self.place).classes
            for entry in self._idx().entries():
                yield entry._replace(label=_label(int(entry.label), classes) if entry.label else None)
            return
        dataset = self._open(self.download, **({"loader": Path} if self.place in IMAGE_FILES else {}))
        classes = getattr(dataset, "classes", None)
        for number in range(len(dataset)):
            image, target = dataset[number]
            label = _label(target, classes)
            if isinstance(image, Path):
                name = image.relative_to(self.root).as_posix()
                yield Entry(make_printable(name), str(image), stamp_if_exists(image), label)
            else:
                # Such a set never changes; torchvision verifies checksums where it has them.
                yield Entry(f"{self.place}/{number}", str(number), self.place, label)

    def read(self, entries: Sequence[Entry]) -> Iterator[Payload]:
        """Yield the bytes of the images, or decoded images if a set has no image files."""
        if self.place in IDX_FILES:
            yield from self._idx().read(entries)
        elif self.place in IMAGE_FILES:
            for entry in entries:
                yield read_file(Path(entry.locator), self.access.config.max_bytes)
        else:
            dataset = self._open()
            for entry in entries:
                image: Image.Image = dataset[int(entry.locator)][0]
                yield image

    def _idx(self) -> Idx:
        split = "train" if self.arguments.get("train", True) else "test"
        return Idx(f"{self.root}/{self.place}/raw", self.access, {"split": split})

    def _open(self, download: bool = False, **options: Any) -> Any:
        """Open torchvision's data set, without its default download."""
        where = f"torchvision:{self.place} in {self.root}"
        try:
            return _torchvision_class(self.place)(self.root, download=download, **self.arguments, **options)
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
