"""What captions mean is read once, kept whole or not at all, and goes with the images."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.checkpoints import save_tensors
from diffusion.common.progress import Progress, ignore_progress
from diffusion.data import caption_embeddings
from diffusion.data.caption_embeddings import MINI_LM, Captions, encode_texts, seconds_to_read
from diffusion.data.caption_texts import list_texts
from diffusion.data.dataset import Dataset
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import encodings_folder, ingest
from diffusion.data.versions.takedown import remove
from diffusion.data.versions.takedown_records import Selection
from diffusion.generation.generate import conditions_of
from tests.builders.captioned import FakeEncoder, squares
from tests.builders.shapes import blob


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of twelve images with captions: the last two have one of their own."""
    folder = tmp_path / "source"
    folder.mkdir()
    describe(folder, range(12))
    return folder


def describe(folder: Path, numbers: range) -> None:
    lines = ["file_name,text"]
    for number in numbers:
        blob(number).save(folder / f"{number:02d}.png")
        lines.append(f"{number:02d}.png,{'a blob' if number < 10 else f'blob number {number}'}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


def ingested(source: Path, folder: Path) -> Dataset:
    ingest(folder, IngestConfig(source=str(source), size=8, held_out=0.2))
    return Dataset.open(folder)


def read(dataset: Dataset, pool: ThreadPoolExecutor, progress: Progress = ignore_progress) -> Captions:
    captions, numbers = dataset.different_captions()
    texts = list_texts(captions, None, 0)
    return Captions(*encode_texts(dataset, texts.texts, pool.map, progress), numbers, MINI_LM, texts)


def embedding_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in encodings_folder(folder).glob("*")}


def test_rows_have_embeddings_of_captions_or_zeros(
    tmp_path: Path, pool: ThreadPoolExecutor, fake_encoder: FakeEncoder
) -> None:
    squares(tmp_path / "squares", 30, every=2)
    dataset = Dataset.open(tmp_path / "squares")
    captions = read(dataset, pool)
    rows = list(range(len(dataset)))
    reference = FakeEncoder()
    for row, caption, embedding in zip(rows, dataset.captions(rows), captions.select_rows(rows)["text"], strict=True):
        assert (captions.numbers[row] < 0) == (caption is None)
        assert torch.equal(embedding, torch.zeros(384) if caption is None else reference(caption))
    assert torch.equal(captions.select_rows(rows[::-1])["text"], captions.select_rows(rows)["text"].flip(0))


def test_each_caption_is_embedded_once_for_all_images_and_trainings(
    source: Path, tmp_path: Path, pool: ThreadPoolExecutor, fake_encoder: FakeEncoder
) -> None:
    dataset = ingested(source, tmp_path / "data" / "blobs")
    first = read(dataset, pool)
    assert sorted(fake_encoder.read) == ["a blob", "blob number 10", "blob number 11"]
    files = embedding_files(dataset.folder)
    assert {Path(name).suffix for name in files} == {".safetensors", ".sha256"}
    assert torch.equal(read(dataset, pool).encodings["text"], first.encodings["text"])
    assert len(fake_encoder.read) == 3
    assert embedding_files(dataset.folder) == files
    assert not any("encodings" in path.name for path in dataset.folder.rglob("*"))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
def test_encodings_are_mapped_from_the_cache_instead_of_held_in_memory(
    source: Path, tmp_path: Path, pool: ThreadPoolExecutor, fake_encoder: FakeEncoder
) -> None:
    dataset = ingested(source, tmp_path / "data" / "blobs")
    for _ in range(2):
        encodings, folder = read(dataset, pool).encodings, str(encodings_folder(dataset.folder))
        place = encodings["text"].data_ptr()
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if folder in line]
        ranges = ([int(end, 16) for end in line.split()[0].split("-")] for line in mapped)
        assert any(start <= place < end for start, end in ranges)


def test_cache_is_the_safetensors_file_of_its_tensors(
    source: Path, tmp_path: Path, pool: ThreadPoolExecutor, fake_encoder: FakeEncoder
) -> None:
    dataset = ingested(source, tmp_path / "data" / "blobs")
    encodings_folder(dataset.folder).mkdir()
    (encodings_folder(dataset.folder) / f".killed.{'0' * 32}.partial").write_bytes(b"left")
    texts = dataset.different_captions()[0]
    for known in (texts[1:], texts):  # encoded, then grown at the start
        encodings, _ = encode_texts(dataset, known, pool.map)
        [path] = encodings_folder(dataset.folder).glob("*.safetensors")
        digests = [list(hashlib.sha256(text.encode()).digest()) for text in known]
        tensors = {"texts": torch.tensor(digests, dtype=torch.uint8), "encoded.text": encodings["text"].clone()}
        save_tensors(tmp_path / "expected", tensors, {"encoder": MINI_LM.digest})
        assert path.read_bytes() == (tmp_path / "expected").read_bytes()
    assert len(embedding_files(dataset.folder)) == 2


def test_some_of_the_cached_texts_are_found_without_writing(
    source: Path, tmp_path: Path, pool: ThreadPoolExecutor, fake_encoder: FakeEncoder
) -> None:
    dataset = ingested(source, tmp_path / "data" / "blobs")
    texts = dataset.different_captions()[0]
    encode_texts(dataset, texts, pool.map)
    files = embedding_files(dataset.folder)
    encodings, places = encode_texts(dataset, texts[:0:-1], pool.map)
    expected = torch.stack([FakeEncoder()(text) for text in texts[:0:-1]])
    assert torch.equal(encodings["text"][torch.from_numpy(places)], expected)
    assert embedding_files(dataset.folder) == files


def test_estimated_time_counts_only_uncached_captions(
    source: Path, tmp_path: Path, pool: ThreadPoolExecutor, fake_encoder: FakeEncoder
) -> None:
    dataset = ingested(source, tmp_path / "data" / "blobs")
    texts, _ = dataset.different_captions()
    assert 0 < seconds_to_read(dataset, texts, 1) < 60
    assert not encodings_folder(dataset.folder).exists()
    read(dataset, pool)
    assert seconds_to_read(dataset, texts, 1) == 0


@pytest.mark.parametrize("damage", ["changed", "cut short", "without its digest", "gone"])
def test_damaged_caption_embeddings_are_recomputed_identically(
    source: Path, tmp_path: Path, pool: ThreadPoolExecutor, fake_encoder: FakeEncoder, damage: str
) -> None:
    dataset = ingested(source, tmp_path / "data" / "blobs")
    expected, files = read(dataset, pool).encodings["text"].clone(), embedding_files(dataset.folder)
    path = next(encodings_folder(dataset.folder).glob("*.safetensors"))
    match damage:
        case "changed":
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        case "cut short":
            path.write_bytes(path.read_bytes()[:100])
        case "without its digest":
            path.with_suffix(".sha256").unlink()
        case "gone":
            path.unlink()
    assert torch.equal(read(dataset, pool).encodings["text"], expected)
    assert len(fake_encoder.read) == 6
    assert embedding_files(dataset.folder) == files


def test_killed_encoding_goes_on_after_its_last_whole_part(
    source: Path, tmp_path: Path, pool: ThreadPoolExecutor, fake_encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe(source, range(20))
    dataset, texts = ingested(source, tmp_path / "data" / "blobs"), [f"blob number {number}" for number in range(20)]
    expected = torch.stack([FakeEncoder()(text) for text in texts])
    monkeypatch.setattr(caption_embeddings, "PART_BYTES", 4 * 384 * 4)

    def killed(what: str, done: int, total: int | None, note: str = "") -> None:
        if done == 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_texts(dataset, texts, map, killed)
    assert len(list(encodings_folder(dataset.folder).glob("*.safetensors"))) == 3
    fake_encoder.read.clear()
    # Meanwhile the set has grown, and lost a caption.
    encodings, places = encode_texts(dataset, ["a new one", *texts[1:]], map)
    assert fake_encoder.read == ["a new one", *texts[12:]]
    assert torch.equal(encodings["text"][torch.from_numpy(places)][1:], expected[1:])
    assert len(embedding_files(dataset.folder)) == 2
    assert encode_texts(dataset, texts[1:], map)[1].tolist() == list(range(1, 20))


def test_takedown_between_parts_leaves_none_of_them(
    source: Path, tmp_path: Path, pool: ThreadPoolExecutor, fake_encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ingested(source, tmp_path / "data" / "blobs")
    texts = [f"blob number {number}" for number in range(20)]
    monkeypatch.setattr(caption_embeddings, "PART_BYTES", 4 * 384 * 4)

    def meanwhile(what: str, done: int, total: int | None, note: str = "") -> None:
        assert done < 10 or not [*encodings_folder(dataset.folder).glob("*.safetensors")]
        if done == 9:
            remove(dataset.folder, Selection(sources=["11.png"]), "consent withdrawn")

    encodings, _ = encode_texts(dataset, texts, map, meanwhile)
    assert torch.equal(encodings["text"], torch.stack([FakeEncoder()(text) for text in texts]))
    assert not embedding_files(dataset.folder)


def test_one_of_several_captions_is_drawn_and_the_first_without_a_draw(
    source: Path, tmp_path: Path, pool: ThreadPoolExecutor, fake_encoder: FakeEncoder
) -> None:
    (source / "metadata.csv").unlink()
    for number in range(8):
        (source / f"{number:02d}.txt").write_text("one\ntwo\n")
    dataset, reference = ingested(source, tmp_path / "data" / "blobs"), FakeEncoder()
    rows = list(range(12))
    has_caption = [caption is not None for caption in dataset.captions(rows)]
    assert (sum(has_caption), {*dataset.captions(rows)}) == (8, {"one", None})
    captions = read(dataset, pool)
    u = np.linspace(0, 1, 12, endpoint=False)
    for draws in (None, u):
        for row, embedding in zip(rows, captions.select_rows(rows, draws)["text"], strict=True):
            text = "two" if draws is not None and u[row] >= 0.5 else "one"
            assert torch.equal(embedding, reference(text) if has_caption[row] else torch.zeros(384))


def test_grown_data_set_encodes_only_new_captions(
    source: Path, tmp_path: Path, pool: ThreadPoolExecutor, fake_encoder: FakeEncoder
) -> None:
    folder = tmp_path / "data" / "blobs"
    read(ingested(source, folder), pool)
    describe(source, range(14))
    grown = ingested(source, folder)
    again = read(grown, pool)
    assert fake_encoder.read[3:] == ["blob number 12", "blob number 13"]
    assert len(list(encodings_folder(folder).glob("*.safetensors"))) == 1
    fresh = read(ingested(source, tmp_path / "data" / "fresh"), pool)
    assert torch.equal(again.encodings["text"], fresh.encodings["text"])


def traces(folder: Path, caption: str, embedding: Tensor) -> list[Path]:
    """Files beside a data set in which its caption can be told."""
    marks = hashlib.sha256(caption.encode()).digest(), embedding.numpy().tobytes()
    beside = encodings_folder(folder).parent
    return [path for path in beside.rglob("*") if path.is_file() and any(mark in path.read_bytes() for mark in marks)]


def test_caption_embedding_is_deleted_with_its_image(
    source: Path, tmp_path: Path, pool: ThreadPoolExecutor, fake_encoder: FakeEncoder
) -> None:
    dataset = ingested(source, tmp_path / "data" / "blobs")
    read(dataset, pool)
    about = "blob number 11", FakeEncoder()("blob number 11")
    assert len(traces(dataset.folder, *about)) == 1
    remove(dataset.folder, Selection(sources=["11.png"]), "consent withdrawn")
    assert not traces(dataset.folder, *about)
    remaining_set = Dataset.open(dataset.folder)
    assert len(read(remaining_set, pool).encodings["text"]) == 2
    assert not traces(dataset.folder, *about)
    assert embedding_files(dataset.folder)
    # A takedown that was cut off after the manifest is finished by the same words.
    encodings_folder(dataset.folder).mkdir(exist_ok=True)
    (encodings_folder(dataset.folder) / "left.safetensors").write_bytes(about[1].numpy().tobytes())
    remove(dataset.folder, Selection(sources=["11.png"]), "consent withdrawn")
    assert not traces(dataset.folder, *about)


def test_takedown_during_encoding_leaves_no_embedding(
    source: Path, tmp_path: Path, pool: ThreadPoolExecutor, fake_encoder: FakeEncoder
) -> None:
    dataset = ingested(source, tmp_path / "data" / "blobs")

    def meanwhile(what: str, done: int, total: int | None, note: str = "") -> None:
        remove(dataset.folder, Selection(sources=["11.png"]), "consent withdrawn")

    assert len(read(dataset, pool, meanwhile).encodings["text"]) == 3
    assert not embedding_files(dataset.folder)


def test_images_like_others_have_their_captions_and_labels(tmp_path: Path) -> None:
    squares(tmp_path / "squares", 12, labelled=True)
    dataset = Dataset.open(tmp_path / "squares")
    conditions = conditions_of(dataset, [5, 2], ["blue", "green", "red"])
    assert [conditions.prompt(index) for index in range(3)] == [*dataset.captions([5, 2]), *dataset.captions([5])]
    assert [conditions.label(index) for index in range(2)] == dataset.labels([5, 2])
    assert conditions_of(dataset, [5, 2], []).labels == ()
