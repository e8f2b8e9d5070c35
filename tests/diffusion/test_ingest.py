"""Ingest: any tree of pictures in, exact shards and a manifest out."""

import io
import json
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion.data.config import IngestConfig
from diffusion.data.dataset import Dataset
from diffusion.data.ingest import ingest, split_of
from diffusion.data.manifest import read_manifest
from diffusion.data.pictures import Refused, prepare
from diffusion.errors import UserError
from tests.conftest import blob

CONFIG = IngestConfig(size=8, held_out=0.33)


def png(picture: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **options)
    return buffer.getvalue()


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def bomb(side: int) -> bytes:
    """A PNG that declares side×side pixels and holds a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_same_pictures_give_the_same_bytes(pictures: Path, tmp_path: Path) -> None:
    results = [
        ingest(pictures, tmp_path / name / "set", CONFIG, threads=threads) for name, threads in (("a", 1), ("b", 4))
    ]
    assert results[0].content_digest == results[1].content_digest
    assert files_of(tmp_path / "a" / "set") == files_of(tmp_path / "b" / "set")


def test_content_digest_is_free_of_file_names_but_not_of_pixels_or_configuration(
    pictures: Path, tmp_path: Path
) -> None:
    digest = ingest(pictures, tmp_path / "a", CONFIG).content_digest
    (pictures / "odd" / "01.png").rename(pictures / "odd" / "zz.png")
    assert ingest(pictures, tmp_path / "b", CONFIG).content_digest == digest
    other_size = CONFIG.model_copy(update={"size": 9})
    assert ingest(pictures, tmp_path / "c", other_size).content_digest != digest
    blob(999).save(pictures / "odd" / "zz.png")
    assert ingest(pictures, tmp_path / "d", CONFIG).content_digest != digest


def test_standard_webdataset_reads_the_shards(dataset: Path) -> None:
    manifest = read_manifest(dataset)
    urls = [str(dataset / shard.name) for shard in manifest.shards]
    samples = list(wds.WebDataset(urls, shardshuffle=False))
    assert len(samples) == 48
    for sample in samples:
        about = json.loads(sample["json"])
        assert about["label"] in ("even", "odd")
        assert (Image.open(io.BytesIO(sample["png"])).size) == (8, 8)


def test_table_offsets_point_at_the_pngs_and_keys_are_their_pixels_digest(dataset: Path) -> None:
    manifest = read_manifest(dataset)
    rows = pq.read_table(dataset / manifest.samples_table.name).to_pylist()
    for row in rows:
        data = (dataset / manifest.shards[row["shard"]].name).read_bytes()
        picture = Image.open(io.BytesIO(data[row["offset"] : row["offset"] + row["size"]]))
        assert prepare(png(picture), CONFIG).key == row["key"]


def test_shards_close_at_their_size_and_every_picture_is_in_exactly_one(pictures: Path, tmp_path: Path) -> None:
    small = CONFIG.model_copy(update={"shard_bytes": 2**16})
    for number in range(100, 160):
        blob(number).save(pictures / "odd" / f"{number}.png")
    folder = tmp_path / "set"
    ingest(pictures, folder, small)
    manifest = read_manifest(folder)
    assert len(manifest.shards) > 1
    names = []
    for shard in manifest.shards:
        with tarfile.open(folder / shard.name) as tar:
            members = tar.getnames()
            assert len(members) == 2 * shard.count
            names += members
    assert len(names) == len(set(names)) == 2 * 108


def test_bad_pictures_are_quarantined_with_their_reason_and_good_ones_are_kept(tmp_path: Path) -> None:
    root = tmp_path / "mixed"
    root.mkdir()
    jpeg = io.BytesIO()
    blob(1, 64, "RGB").save(jpeg, "JPEG")
    (root / "truncated.jpg").write_bytes(jpeg.getvalue()[: len(jpeg.getvalue()) // 2])
    (root / "text.png").write_text("not a picture")
    (root / "bomb.png").write_bytes(bomb(20_000))
    blob(2, 64, "CMYK").save(root / "cmyk.jpg")
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257).save(root / "sixteen.png")
    blob(3).save(root / "moving.gif", save_all=True, append_images=[blob(4), blob(5)])
    palette = blob(6, 16, "RGB").quantize(8)
    palette.save(root / "palette.png", transparency=0)
    blob(7).save(root / "copy-a.png")
    blob(7).save(root / "copy-b.bmp")

    result = ingest(root, tmp_path / "set", IngestConfig(size=8))

    reasons = {each.source: each.reason for each in result.quarantined}
    assert set(reasons) == {"truncated.jpg", "text.png", "bomb.png"}
    assert "damaged" in reasons["truncated.jpg"]
    assert "not a picture" in reasons["text.png"]
    assert "400000000 pixels" in reasons["bomb.png"]
    assert (result.kept, result.duplicates) == (5, 1)
    table = tmp_path / "set" / read_manifest(tmp_path / "set").quarantine_table.name
    assert {row["source"] for row in pq.read_table(table).to_pylist()} == set(reasons)


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    stored = prepare(png(Image.fromarray(values)), IngestConfig(size=8))
    assert stored.mode == "L"
    expected = np.round(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(np.frombuffer(stored.pixels, np.uint8).reshape(8, 8), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_show_the_background(mode: str) -> None:
    picture = Image.new("RGBA", (8, 8), (10, 20, 30, 0)).convert(mode)
    options = {"transparency": 0} if mode == "P" else {}
    stored = prepare(png(picture, **options), IngestConfig(size=8, background="#ff8000"))
    assert np.frombuffer(stored.pixels, np.uint8).reshape(-1, 3).tolist() == [[255, 128, 0]] * 64


def test_exif_orientation_is_applied() -> None:
    upright = blob(3, 16, "RGB")
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = png(upright.rotate(180), exif=exif)
    assert prepare(turned, IngestConfig(size=16)).key == prepare(png(upright), IngestConfig(size=16)).key


def test_pad_keeps_the_whole_picture_and_crop_fills_the_square() -> None:
    wide = Image.new("L", (32, 16), 200)
    padded = prepare(png(wide), IngestConfig(size=16, fit="pad", background="#000000"))
    cropped = prepare(png(wide), IngestConfig(size=16, fit="crop"))
    rows = np.frombuffer(padded.pixels, np.uint8).reshape(16, 16)
    assert (rows[0] == 0).all()
    assert (rows[8] == 200).all()
    assert (np.frombuffer(cropped.pixels, np.uint8) == 200).all()


@given(
    data=st.binary(max_size=400),
    position=st.floats(0, 1),
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]),
)
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_are_a_picture_or_refused_but_never_crash(data: bytes, position: float, kind: str) -> None:
    buffer = io.BytesIO()
    blob(1, 24, "RGB").save(buffer, kind)
    whole = buffer.getvalue()
    cut = int(position * len(whole))
    damaged = whole[:cut] + data + whole[cut + len(data) :]
    try:
        stored = prepare(damaged, IngestConfig(size=8))
    except Refused as refusal:
        assert str(refusal)  # noqa: PT017 (either way out is right)
    else:
        assert stored.size == (8, 8)


def test_metadata_file_gives_captions_and_labels(tmp_path: Path) -> None:
    root = tmp_path / "captioned"
    (root / "train").mkdir(parents=True)
    blob(1).save(root / "train" / "a.png")
    blob(2).save(root / "train" / "b.png")
    (root / "metadata.jsonl").write_text(
        '{"file_name": "train/a.png", "text": "a heart", "label": "red"}\n{"file_name": "train/gone.png"}\n'
    )
    result = ingest(root, tmp_path / "set", IngestConfig(size=8))
    data = Dataset.open(tmp_path / "set")
    assert (data.captions, data.labels) == (["a heart"], ["red"])
    assert [each.reason for each in result.quarantined] == ["named in the metadata but missing"]


def test_metadata_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    blob(1).save(tmp_path / "secret.png")
    (root / "metadata.csv").write_text("file_name\n../secret.png\n")
    with pytest.raises(UserError, match="leads out of"):
        ingest(root, tmp_path / "out", IngestConfig(size=8))


def test_a_tree_without_a_usable_picture_is_an_error(tmp_path: Path) -> None:
    root = tmp_path / "empty"
    root.mkdir()
    with pytest.raises(UserError, match="no pictures"):
        ingest(root, tmp_path / "set", CONFIG)
    (root / "a.png").write_text("x")
    with pytest.raises(UserError, match="no usable picture"):
        ingest(root, tmp_path / "set", CONFIG)
    with pytest.raises(UserError, match="not a folder"):
        ingest(tmp_path / "nowhere", tmp_path / "set", CONFIG)


def test_too_large_a_share_of_bad_pictures_is_an_error_that_names_the_reasons(pictures: Path, tmp_path: Path) -> None:
    for number in range(60):
        (pictures / "odd" / f"bad{number}.png").write_text("x")
    with pytest.raises(UserError, match=r"60 of 108.*60 × not a picture"):
        ingest(pictures, tmp_path / "set", CONFIG)


def test_failed_ingest_leaves_the_old_version_whole(pictures: Path, dataset: Path, tmp_path: Path) -> None:
    before = read_manifest(dataset)
    empty = tmp_path / "bad"
    empty.mkdir()
    (empty / "a.png").write_text("x")
    with pytest.raises(UserError):
        ingest(empty, dataset, CONFIG)
    assert read_manifest(dataset) == before
    assert len(Dataset.open(dataset).keys) == 48


def test_new_version_replaces_the_old_one_and_removes_its_files(pictures: Path, dataset: Path) -> None:
    shutil.rmtree(pictures / "odd")
    ingest(pictures, dataset, CONFIG)
    data = Dataset.open(dataset)
    assert len(data.keys) == 24
    assert len(list(dataset.glob("shards/*.tar"))) == 1
    assert len(list(dataset.glob("*.parquet"))) == 2


def test_half_a_shard_is_an_error_that_names_it_and_ingest_mends_it(pictures: Path, dataset: Path) -> None:
    shard = next(dataset.glob("shards/*.tar"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=shard.name):
        Dataset.open(dataset)
    ingest(pictures, dataset, CONFIG)
    assert shard.read_bytes() == whole


def test_grey_sets_have_one_channel_and_one_colour_picture_makes_it_three(
    pictures: Path, dataset: Path, tmp_path: Path
) -> None:
    assert Dataset.open(dataset).shape == (1, 8, 8)
    blob(77, 12, "RGB").save(pictures / "odd" / "colour.png")
    ingest(pictures, tmp_path / "colour", CONFIG)
    data = Dataset.open(tmp_path / "colour")
    assert data.shape == (3, 8, 8)
    assert data.pictures([0]).shape == (1, 3, 8, 8)


def test_manifest_statistics_are_those_of_the_training_pictures(dataset: Path) -> None:
    data = Dataset.open(dataset)
    x = data.pictures(data.rows("train")).double() / 127.5 - 1
    assert data.manifest.mean[0] == pytest.approx(x.mean().item())
    assert data.manifest.std[0] == pytest.approx(x.std(correction=0).item())
    assert data.manifest.sigma_data == pytest.approx(data.manifest.std[0])


@given(st.binary(min_size=32, max_size=32), st.floats(0.05, 0.95), st.floats(0, 0.5))
def test_a_picture_never_leaves_the_held_out_split_when_its_share_grows(
    digest: bytes, share: float, more: float
) -> None:
    key = digest.hex()
    if split_of(key, share) == "held_out":
        assert split_of(key, share + more) == "held_out"
