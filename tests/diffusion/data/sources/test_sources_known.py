"""IDX files, and the data sets that torchvision knows by name."""

import bz2
import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from diffusion.common.errors import UserError
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.sources import open_source
from diffusion.data.sources.known_sets import ARRAYS, IDX_FILES, IMAGE_FILES, PICKLED
from tests.builders.reading_sources import access, payloads, png, read_all, write_files


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def mnist(folder: Path, counts: dict[str, int], packed: bool = False) -> dict[str, np.ndarray]:
    """Files as MNIST's; returns the images."""
    random, arrays = np.random.default_rng(0), {}
    for name, count in counts.items():
        arrays[name] = random.integers(0, 256, (count, 9, 11), np.uint8)
        files = {
            f"{name}-images-idx3-ubyte": idx(arrays[name]),
            f"{name}-labels-idx1-ubyte": idx(np.arange(count, dtype=np.uint8) % 10),
        }
        for file, data in files.items():
            write_files(folder, {f"{file}.gz": gzip.compress(data)} if packed else {file: data})
    return arrays


@pytest.mark.parametrize("packed", [False, True])
def test_the_files_of_mnist_are_read_by_split(tmp_path: Path, packed: bool) -> None:
    arrays = mnist(tmp_path / "set", {"train": 12, "t10k": 5}, packed)
    for split, name in (("train", "train"), ("test", "t10k")):
        file = f"{name}-images-idx3-ubyte{'.gz' if packed else ''}"
        items = read_all(f"idx:{tmp_path}/set?split={split}", access(tmp_path / "scratch"))
        assert items == read_all(f"{tmp_path}/set/{file}", access(tmp_path / "scratch"))
        assert [(each.name, each.label) for each in items] == [
            (f"{file}/{number}", str(number % 10)) for number in range(len(arrays[name]))
        ]
        assert np.array_equal(np.stack([np.asarray(each.payload) for each in items]), arrays[name])
        assert {each.payload.mode for each in items if isinstance(each.payload, Image.Image)} == {"L"}
    with pytest.raises(UserError, match=r"choose with \?split=train or test"):
        read_all(f"idx:{tmp_path}/set", access(tmp_path / "scratch"))
    with pytest.raises(UserError, match="split=train would have no effect"):
        read_all(f"idx:{tmp_path}/set/{file}?split=train", access(tmp_path / "scratch"))


def test_mismatched_idx_files_are_an_error_and_labels_are_optional(tmp_path: Path) -> None:
    mnist(tmp_path / "set", {"train": 3})
    labels, images = tmp_path / "set" / "train-labels-idx1-ubyte", tmp_path / "set" / "train-images-idx3-ubyte"
    source_access = access(tmp_path / "scratch")
    for damage, message in (
        (idx(np.zeros(2, np.uint8)), "has 2 labels for 3 images"),
        (idx(np.zeros((3, 1), np.uint8)), "is not an IDX file of 1 dimensions"),
        (labels.read_bytes()[:-1], "has not the length that its header says"),
    ):
        labels.write_bytes(damage)
        with pytest.raises(UserError, match=message):
            read_all(images, source_access)
    labels.unlink()
    assert [each.label for each in read_all(images, source_access)] == [None] * 3
    whole = images.read_bytes()
    for damaged_bytes in (whole[:-1], whole[:7], b"", whole + b"x", b"\0\0\x0d\3" + whole[4:]):
        images.write_bytes(damaged_bytes)
        with pytest.raises(UserError, match=r"train-images-idx3-ubyte (is not an IDX file|has not the length)"):
            read_all(images, source_access)


def test_known_idx_files_are_skipped_and_changed_ones_errors(tmp_path: Path) -> None:
    mnist(tmp_path / "set", {"train": 12})
    uri, source_access = f"idx:{tmp_path}/set", access(tmp_path / "scratch")
    config = IngestConfig(source=uri, size=8, held_out=0.33)
    assert ingest(tmp_path / "data", config).kept == 12
    assert ingest(tmp_path / "data", config).read == 0
    entries = list(open_source(uri, source_access).entries())
    mnist(tmp_path / "set", {"train": 13})
    with pytest.raises(UserError, match="has changed since it was listed"):
        list(open_source(uri, source_access).read(entries))
    grown = ingest(tmp_path / "data", config)
    assert (grown.read, grown.added) == (13, 1)


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_idx_files_are_found_where_torchvision_keeps_them(tmp_path: Path, name: str) -> None:
    mnist(tmp_path / name / "raw", {"train": 12, "t10k": 4})
    for split, train in (("train", True), ("test", False)):
        theirs = getattr(datasets, name)(tmp_path, train=train)
        ours = read_all(f"torchvision:{name}?root={tmp_path}&split={split}", access(tmp_path / "scratch"))
        assert [each.label for each in ours] == [theirs.classes[target] for _, target in theirs]
        assert all(np.array_equal(a.payload, b) for a, (b, _) in zip(ours, theirs, strict=True))
    assert len(read_all(f"torchvision:{name}?root={tmp_path}", access(tmp_path / "scratch"))) == 12


def test_a_set_of_files_is_read_as_the_files_are(tmp_path: Path) -> None:
    files = {f"eurosat/2750/{kind}/{n}.png": png(n + 50 * len(kind)) for kind in ("Forest", "River") for n in range(6)}
    root = write_files(tmp_path / "sets", files)
    items = read_all(f"torchvision:EuroSAT?root={root}", access(tmp_path / "scratch"))
    assert {each.name: each.payload for each in items} == files
    assert [each.label for each in items] == ["Forest"] * 6 + ["River"] * 6
    config = IngestConfig(source=f"torchvision:EuroSAT?root={root}", size=8, held_out=0.33)
    assert ingest(tmp_path / "data", config).kept == 12
    write_files(root, {"eurosat/2750/River/9.png": png(999)})
    grown = ingest(tmp_path / "data", config)
    assert (grown.read, grown.added) == (1, 1)


def test_splits_match_torchvision_and_missing_files_are_quarantined(tmp_path: Path) -> None:
    lists = {"dtd/dtd/labels/val1.txt": b"dots/b.jpg\nbands/a.jpg\ndots/gone.jpg\n"}
    images = {
        "dtd/dtd/images/dots/b.jpg": b"1",
        "dtd/dtd/images/bands/a.jpg": b"2",
        "dtd/dtd/images/dots/c.jpg": b"3",
    }
    root = write_files(tmp_path / "sets", lists | images)
    items = read_all(f"torchvision:DTD?root={root}&split=val", access(tmp_path / "scratch"))
    assert [(each.name, each.label, each.payload) for each in items] == [
        ("dtd/dtd/images/dots/b.jpg", "dots", b"1"),
        ("dtd/dtd/images/bands/a.jpg", "bands", b"2"),
        ("dtd/dtd/images/dots/gone.jpg", "dots", "named in the listing but missing"),
    ]


def test_a_set_of_one_array_is_read_by_number(tmp_path: Path) -> None:
    values = np.random.default_rng(0).uniform(-1, 1, (12, 256))
    lines = [f"{n % 10 + 1} " + " ".join(f"{i + 1}:{v:.4f}" for i, v in enumerate(row)) for n, row in enumerate(values)]
    (tmp_path / "usps.bz2").write_bytes(bz2.compress("\n".join(lines).encode()))
    uri = f"torchvision:USPS?root={tmp_path}"
    items, theirs = read_all(uri, access(tmp_path / "scratch")), datasets.USPS(tmp_path)
    assert [(each.name, each.label) for each in items] == [(f"USPS/{n}", str(n % 10)) for n in range(12)]
    assert all(np.array_equal(each.payload, image) for each, (image, _) in zip(items, theirs, strict=True))
    config = IngestConfig(source=uri, size=8, held_out=0.33)
    assert ingest(tmp_path / "data", config).kept == 12
    assert ingest(tmp_path / "data", config).read == 0


@pytest.mark.parametrize("name", [*IDX_FILES, *IMAGE_FILES, *ARRAYS])
def test_missing_sets_are_errors_and_never_downloaded_unrequested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def no_download(*_: object, **__: object) -> None:
        raise AssertionError("downloads")

    monkeypatch.setattr("urllib.request.urlopen", no_download)
    with pytest.raises(UserError, match=rf"(idx|torchvision):.*{name}.*(check|add)") as error:
        read_all(f"torchvision:{name}?root={tmp_path}/sets", access(tmp_path / "scratch"))
    assert "\n" not in str(error.value)


def test_no_known_set_unpickles_anything(tmp_path: Path) -> None:
    for name in (*IMAGE_FILES, *ARRAYS):
        for class_ in getattr(datasets, name).__mro__:
            if class_.__module__.startswith("torchvision.datasets"):
                source = Path(__import__("sys").modules[class_.__module__].__file__).read_text()
                assert not [word for word in ("pickle", "torch.load", "lmdb") if f"{word}" in source], class_
    assert not {*IMAGE_FILES, *ARRAYS, *IDX_FILES} & set(PICKLED)
    # torchvision itself would hand these to torch.load; ours never looks at them.
    mnist(tmp_path / "MNIST" / "raw", {"train": 3, "t10k": 3})
    write_files(tmp_path / "MNIST" / "processed", {"training.pt": b"no pickle", "test.pt": b"no pickle"})
    assert len(payloads(f"torchvision:MNIST?root={tmp_path}", access(tmp_path / "scratch"))) == 3
    with pytest.raises(UserError, match="would unpickle it: take it away"):
        read_all(f"torchvision:MNIST?root={tmp_path}&download=true", access(tmp_path / "scratch"))
