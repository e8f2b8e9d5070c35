"""Data sets of torchvision, by name."""

import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self
from urllib.error import URLError

from PIL import Image

from diffusion.common.errors import UserError
from diffusion.data.sources.base import Access, Entry, Payload
from diffusion.data.sources.conventions import sane
from diffusion.data.sources.idx import Idx
from diffusion.data.sources.local_files import read_file, stamp_if_there

OPTIONS = ("root", "split", "download")
IDX_FILES = ("MNIST", "FashionMNIST", "KMNIST")
"""Sets read by ``Idx``: torchvision loads the pickles of its older versions if it finds some."""
IMAGE_FILES = (
    *("Country211", "DTD", "EuroSAT", "FGVCAircraft", "Flowers102", "Food101"),
    *("Imagenette", "Places365", "RenderedSST2", "StanfordCars", "SUN397"),
)
"""Sets that list files, with labels from text, JSON or MAT files; the images are read as they are."""
ARRAYS = ("SEMEION", "STL10", "SVHN", "USPS")
"""Sets with all images in one text, raw or MAT file, which torchvision holds in memory."""
PICKLED = ("CIFAR10", "CIFAR100", "EMNIST", "ImageNet", "LSUN", "PhotoTour", "QMNIST")


@dataclass(frozen=True)
class TorchvisionSet:
    """A set that torchvision calls ``name``, where it keeps it in the folder ``root``; labels are its classes' names.

    Supported are only sets whose loading code unpickles nothing (checked in torchvision 0.24 and 0.28). CIFAR10 and
    CIFAR100 are pickles themselves; EMNIST, ImageNet, PhotoTour and QMNIST are, or were, kept by ``torch.save``; LSUN
    caches its keys in a pickle. Sets whose images torchvision converts (to RGB, without their profile) are not
    supported either: read these as a folder.
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
        """The set ``name`` with the options ``root`` (needed), ``split``, and ``download=true``.

        Raises UserError for other sets and options. Nothing is fetched unless ``download`` says so.
        """
        where = f"torchvision:{name}"
        if name in PICKLED:
            raise UserError(f"{where} is kept in pickles, and they could run anything: save it as PNG or Parquet first")
        if name not in (*IDX_FILES, *IMAGE_FILES, *ARRAYS):
            known = ", ".join(sorted((*IDX_FILES, *IMAGE_FILES, *ARRAYS)))
            raise UserError(f"{where} is not known; there are {known}: read other sets as a folder")
        if unknown := sorted(set(options) - set(OPTIONS)):
            raise UserError(f"{where} has no option {unknown[0]}: there are {', '.join(OPTIONS)}")
        if "root" not in options:
            raise UserError(f"{where} lies in no folder: give the one that torchvision keeps it in, as ?root=FOLDER")
        if options.get("download", "true") not in ("true", "false"):
            raise UserError(f"{where} has download={options['download']}: write true or false")
        arguments = _arguments(name, options.get("split"), where)
        return cls(name, Path(options["root"]).expanduser(), arguments, options.get("download") == "true", access)

    def entries(self) -> Iterator[Entry]:
        """Yield all images in the set's order; raises UserError if it is not in ``root``, or cannot be downloaded."""
        if self.name in IDX_FILES:
            if self.download:
                self._refuse_pickles()
                self._opened(download=True)
            classes = _torchvision_class(self.name).classes
            for entry in self._idx().entries():
                yield replace(entry, label=_label(int(entry.label), classes) if entry.label else None)
            return
        files = {"loader": Path} if self.name in IMAGE_FILES else {}
        dataset = self._opened(**files, download=self.download)
        classes = getattr(dataset, "classes", None)
        for number in range(len(dataset)):
            image, target = dataset[number]
            label = _label(target, classes)
            if isinstance(image, Path):
                name = image.relative_to(self.root).as_posix()
                yield Entry(sane(name), json.dumps([str(image)]), stamp_if_there(image), label)
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
            dataset = self._opened()
            for entry in entries:
                image: Image.Image = dataset[json.loads(entry.locator)[0]][0]
                yield image

    def _idx(self) -> Idx:
        split = "train" if self.arguments.get("train", True) else "test"
        return Idx.open(self.root / self.name / "raw", {"split": split}, self.access)

    def _refuse_pickles(self) -> None:
        old = self.root / self.name / "processed"
        if old.exists():
            raise UserError(f"{old} is of an old torchvision, and this one would unpickle it: take it away")

    def _opened(self, download: bool = False, **more: Any) -> Any:
        """Open torchvision's data set, without its default download."""
        where = f"torchvision:{self.name} in {self.root}"
        try:
            return _torchvision_class(self.name)(self.root, download=download, **self.arguments, **more)
        except URLError as error:
            raise UserError(f"{where} cannot be downloaded ({error}): put it there by hand, or try again") from error
        except (RuntimeError, ValueError, FileNotFoundError) as error:
            hint = "check root and split, or add download=true"
            raise UserError(f"{where} cannot be read ({' '.join(str(error).split())}): {hint}") from error


def _arguments(name: str, split: str | None, where: str) -> dict[str, Any]:
    """Convert ``split`` to torchvision's arguments for the set ``name``."""
    if split is None:
        return {}
    takes = inspect.signature(_torchvision_class(name)).parameters
    if "split" in takes:
        return {"split": split}
    if "train" not in takes:
        raise UserError(f"{where} has no splits: leave split={split} out")
    if split not in ("train", "test"):
        raise UserError(f"{where} has no split {split}: give train or test")
    return {"train": split == "train"}


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
