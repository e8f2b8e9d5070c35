"""Takedown: images leave a data set, and nothing else changes."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from diffusion.common.errors import UserError
from diffusion.data.dataset import Dataset
from diffusion.data.ingest.captions import CaptionCache
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.manifest import Manifest, read_manifest, versions, work_folder, write_manifest
from diffusion.data.versions.takedown import choose_images, remove, remove_known, require_removable
from diffusion.data.versions.takedown_records import Removal, Selection, find_affected_versions, removals, write_removal
from tests.builders import ROOT
from tests.builders.ingested import files_of, records
from tests.builders.shapes import blob


def config(source: Path, **fields: object) -> IngestConfig:
    return IngestConfig.model_validate({"source": str(source), "size": 8, "held_out": 0.33, "workers": 1} | fields)


def many(root: Path, numbers: range = range(600)) -> Path:
    """Images for two shards, the first ones under ``a/``, the others under ``b/``."""
    for number in numbers:
        path = root / ("a" if number < 500 else "b") / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        blob(number).save(path)
    return root


def key_of(folder: Path, source: str) -> str:
    return next(str(row["key"]) for row in records(folder) if row["source"] == source)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two parts, not to be changed."""
    root = tmp_path_factory.mktemp("large")
    ingest(root / "data" / "set", config(many(root / "images")))
    return root


@pytest.fixture
def data(large: Path, tmp_path: Path) -> Path:
    """A copy of ``large``."""
    shutil.copytree(large / "data", tmp_path / "data")
    return tmp_path / "data" / "set"


def test_takedown_rewrites_only_affected_shards(data: Path) -> None:
    before = read_manifest(data)
    assert len(before.parts) > 1
    stood = files_of(data)
    removal = remove(data, Selection(sources=["a/0007.png", "a/0003.png"]), "asked to")
    after = read_manifest(data)
    assert after.digest == removal.version
    assert (removal.images, removal.parts, removal.already) == (2, [before.parts[0].number], False)
    assert after.parts[1:] == before.parts[1:]
    assert (after.parent, after.change) == (before.digest, "removal: asked to")
    now = files_of(data)
    assert set(stood) - set(now) == {before.parts[0].records.name, before.parts[0].shard and before.parts[0].shard.name}
    assert all(now[name] == data for name, data in stood.items() if name in now and name != "manifest.json")
    assert [each.kept for each in versions(data)] == [598, 600]


def test_takedown_equals_a_data_set_without_the_images(large: Path, data: Path, tmp_path: Path) -> None:
    remove(data, Selection(sources=["*/000?.png", "b/05[1-9]?.png"]), "asked to")
    shutil.copytree(large / "images", tmp_path / "less")
    for number in (*range(10), *range(510, 600)):
        (tmp_path / "less" / ("a" if number < 500 else "b") / f"{number:04d}.png").unlink()
    never = tmp_path / "never" / "set"
    ingest(never, config(tmp_path / "less"))
    ours, theirs = read_manifest(data), read_manifest(never)
    assert ours.content_digest == theirs.content_digest
    assert (ours.counts, ours.class_histogram) == (theirs.counts, theirs.class_histogram)
    assert (ours.mean, ours.std) == (pytest.approx(theirs.mean), pytest.approx(theirs.std))
    mine, other = Dataset.open(data), Dataset.open(never)
    rows = range(len(other))
    assert mine.keys(rows) == other.keys(rows)
    assert np.array_equal(mine.images(rows), other.images(rows))
    urls = [str(data / shard.name) for shard in ours.shards]
    assert {sample["__key__"] for sample in wds.WebDataset(urls, shardshuffle=False)} == set(other.keys(rows))


def test_takedown_leaves_only_the_digests_of_an_image(data: Path) -> None:
    key = key_of(data, "b/0555.png")
    (png,) = (s["png"] for s in samples(data) if s["__key__"] == key)
    remove(data, Selection(prefixes=[key[:12]]), "asked to")
    files = files_of(data)
    assert not any(png in content for content in files.values())
    (row,) = (row for row in records(data) if row["outcome"] == "removed")
    assert {name for name, value in row.items() if value} == {"outcome", "reason", "key", "source_sha256"}
    assert not any(row["source"] == "b/0555.png" for row in records(data))


def samples(folder: Path) -> list[dict[str, bytes]]:
    urls = [str(folder / shard.name) for shard in read_manifest(folder).shards]
    return list(wds.WebDataset(urls, shardshuffle=False))


def test_removed_image_is_not_ingested_again_under_any_name(images: Path, dataset: Path) -> None:
    content = remove(dataset, Selection(sources=["odd/01.png"]), "asked to").content_digest
    again = ingest(dataset, config(images))
    assert (again.added, again.content_digest) == (0, content)
    shutil.copy(images / "odd" / "01.png", images / "even" / "other.png")
    Image.open(images / "odd" / "01.png").save(images / "even" / "same.bmp")
    again = ingest(dataset, config(images))
    assert (again.added, again.removed, again.content_digest) == (0, 2, content)
    shutil.rmtree(work_folder(dataset))
    assert ingest(dataset, config(images)).content_digest == content
    assert ingest(dataset, config(images), rebuild="always").content_digest == content


def test_a_removed_image_in_other_bytes_is_in_no_shard(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "set"
    ingest(folder, config(images))
    [source] = [row["source"] for row in records(folder)][:1]
    key = key_of(folder, source)
    remove(folder, Selection(prefixes=[key]), "asked")
    again = tmp_path / "again"
    again.mkdir()
    with Image.open(images / source) as image:
        image.save(again / "copy.png", compress_level=1)
    blob(9999).save(again / "new.png")
    assert ingest(folder, config(again)).removed == 1
    assert key not in [sample["__key__"] for sample in samples(folder)]


def test_removal_covers_all_names_of_an_image(images: Path, tmp_path: Path) -> None:
    shutil.copy(images / "odd" / "01.png", images / "even" / "copy.png")
    ingest(tmp_path / "data" / "set", config(images))
    folder = tmp_path / "data" / "set"
    removal = remove(folder, Selection(sources=["odd/01.png"]), "asked to")
    assert (removal.images, removal.duplicates) == (1, 1)
    assert not {"odd/01.png", "even/copy.png"} & {row["source"] for row in records(folder)}


def test_a_label_narrows_the_selection(images: Path, dataset: Path) -> None:
    removal = remove(dataset, Selection(sources=["*"], label="odd"), "asked to")
    assert removal.images == 24
    assert read_manifest(dataset).labels == ["even"]


def test_quarantined_entry_can_be_removed_without_changing_images(images: Path, tmp_path: Path) -> None:
    (images / "odd" / "bad.png").write_text("private words")
    folder = tmp_path / "data" / "set"
    content = ingest(folder, config(images)).content_digest
    removal = remove(folder, Selection(sources=["odd/bad.png"]), "asked to")
    assert (removal.images, removal.refused, removal.content_digest) == (0, 1, content)
    assert "bad.png" not in {Path(str(row["source"])).name for row in records(folder)}
    assert find_affected_versions(folder, removal, versions(folder)).held == []


def test_repeated_removal_changes_nothing_and_returns_the_same(dataset: Path) -> None:
    selection = Selection(sources=["odd/0?.png"])
    first = remove(dataset, selection, "asked to")
    files = files_of(dataset)
    again = remove(dataset, selection, "asked to")
    assert again == first.model_copy(update={"already": True})
    assert files_of(dataset) == files
    by_key = remove(dataset, Selection(prefixes=first.image_keys[:1]), "another reason")
    assert (by_key.already, by_key.image_keys) == (True, first.image_keys[:1])
    assert files_of(dataset) == files


def test_repeated_removals_take_new_images_and_stay_known(images: Path, dataset: Path) -> None:
    selection = Selection(sources=["odd/*1.png"])
    first = remove(dataset, selection, "asked to")
    blob(901).save(images / "odd" / "91.png")
    ingest(dataset, config(images))
    second = remove(dataset, selection, "asked to")
    assert (second.images, second.already) == (1, False)
    assert {each.name for each in removals(work_folder(dataset))} == {first.name, second.name}
    assert remove(dataset, selection, "asked to").name == second.name


def test_remaining_near_duplicates_are_named(tmp_path: Path) -> None:
    source = tmp_path / "images"
    source.mkdir()
    for number in range(6):
        blob(number, 64).save(source / f"{number}.png")
    blob(0, 64).save(source / "0.jpg", quality=90)
    folder = tmp_path / "data" / "set"
    ingest(folder, config(source, size=32, near_duplicates=8))
    removal = remove(folder, Selection(sources=["0.png"]), "asked to")
    assert removal.near_copies == [key_of(folder, "0.jpg")]


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        (Selection(), "nothing is selected"),
        (Selection(sources=["nowhere/*"]), "no image of nowhere"),
        (Selection(prefixes=["0" * 64]), "no image of 000"),
        (Selection(prefixes=["abc"]), "8 to 64 hex digits"),
        (Selection(sources=["*"]), "would remove all 48"),
    ],
)
def test_invalid_selection_is_an_error_and_changes_nothing(dataset: Path, selection: Selection, words: str) -> None:
    files = files_of(dataset)
    with pytest.raises(UserError, match=words):
        remove(dataset, selection, "asked to")
    assert files_of(dataset) == files


def test_multi_line_removal_reason_is_an_error(dataset: Path) -> None:
    for reason in ("", " ", "two\nlines", "x" * 501):
        with pytest.raises(UserError, match="one line"):
            remove(dataset, Selection(sources=["odd/01.png"]), reason)


@pytest.mark.parametrize("pattern", ["cat*", "*"])
def test_removal_that_would_fail_is_found_before_it(dataset: Path, pattern: str) -> None:
    remove(dataset, Selection(sources=["odd/01.png"]), "asked to")
    files = files_of(dataset)
    with pytest.raises(UserError):
        require_removable(dataset, Selection(sources=[pattern]), "asked to")
    # Repeated, it would only report what it did.
    require_removable(dataset, Selection(sources=["odd/01.png"]), "asked to")
    require_removable(dataset, Selection(sources=["odd/03.png"]), "asked to")
    assert files_of(dataset) == files


def test_choose_lists_the_selected_images_and_changes_nothing(dataset: Path) -> None:
    files = files_of(dataset)
    selection, names = choose_images(dataset, Selection(sources=["odd/0?.png"]))
    assert selection.images == 5
    assert names == [f"odd/{number:02d}.png" for number in range(1, 10, 2)]
    assert files_of(dataset) == files


def test_holders_are_the_versions_that_kept_the_images(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "set"
    shutil.move(images / "odd", tmp_path / "odd")
    manifests: list[Manifest] = []

    def version(**fields: object) -> str:
        ingest(folder, config(images, **fields), rebuild="if_different")
        manifests.append(read_manifest(folder))
        return manifests[-1].digest

    without = version()
    shutil.move(tmp_path / "odd", images / "odd")
    grown = version()
    blob(900).save(images / "even" / "90.png")
    more = version()
    larger = version(size=9)
    remote = tmp_path / "stored"
    shutil.copytree(folder, remote)
    blob(901).save(images / "even" / "91.png")
    back = version()
    removal = remove(folder, Selection(sources=["odd/01.png"]), "asked to")
    blob(902).save(images / "even" / "92.png")
    after = version()

    affected = find_affected_versions(folder, removal, manifests)
    assert affected.held == [back]
    assert set(affected.unknown) == {without, grown, more, larger}
    tables = {path.name: path for path in (*remote.rglob("*.parquet"), *folder.rglob("*.parquet"))}
    affected = find_affected_versions(folder, removal, manifests, lambda entry: tables.get(Path(entry.name).name))
    assert set(affected.held) == {larger, back}
    assert after not in {*affected.held, *affected.unknown}


START = """
import sys
from pathlib import Path
from diffusion.data.versions.takedown_records import Selection
from diffusion.data.versions.takedown import remove
print("ready", flush=True)
remove(Path(sys.argv[1]), Selection(sources=["a/00*.png", "b/*5.png"]), "asked to")
"""


@pytest.mark.drill
@pytest.mark.slow
@pytest.mark.long
def test_a_removal_killed_at_random_moments_ends_in_the_bytes_of_an_undisturbed_one(
    large: Path, tmp_path: Path, kills: int
) -> None:
    def start(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", START, str(tmp_path / name / "set")]
        return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, cwd=ROOT)

    def await_ready(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"

    shutil.copytree(large / "data", tmp_path / "undisturbed")
    process = start("undisturbed")
    await_ready(process)
    start_time = time.monotonic()
    assert process.wait() == 0
    duration = time.monotonic() - start_time
    expected = files_of(tmp_path / "undisturbed" / "set")
    moments = random.Random(5)
    for number in range(kills):
        shutil.copytree(large / "data", tmp_path / f"killed{number}")
        process = start(f"killed{number}")
        await_ready(process)
        time.sleep(moments.uniform(0, duration))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert start(f"killed{number}").wait() == 0
        assert files_of(tmp_path / f"killed{number}" / "set") == expected


def test_removed_images_stay_out_of_an_older_version(images: Path, dataset: Path) -> None:
    old = files_of(dataset)
    blob(100).save(images / "odd" / "100.png")
    blob(101).save(images / "odd" / "101.png")
    ingest(dataset, config(images))
    content = remove(dataset, Selection(sources=["odd/100.png"]), "asked to").content_digest
    shutil.rmtree(dataset)
    for name, data in old.items():
        (dataset / name).parent.mkdir(parents=True, exist_ok=True)
        (dataset / name).write_bytes(data)
    again = ingest(dataset, config(images))
    assert (again.added, again.removed, again.content_digest) == (1, 0, content)


def cached_caption(folder: Path, key: str) -> str | None:
    with closing(CaptionCache(folder)) as cache:
        return cache.get(key, "some captioner")


@pytest.fixture
def captioned(dataset: Path) -> tuple[Path, Removal]:
    """A data set with a cached caption of an image that another machine took down."""
    key = key_of(dataset, "odd/01.png")
    with closing(CaptionCache(dataset)) as cache:
        cache.put(key, "some captioner", "someone's name")
    other = dataset.parent / "other" / dataset.name
    shutil.copytree(dataset, other)
    removal = remove(other, Selection(sources=["odd/01.png"]), "consent withdrawn")
    write_removal(work_folder(dataset), removal)
    return dataset, removal


def test_captions_are_forgotten_where_the_image_is_gone_already(
    captioned: tuple[Path, Removal],
) -> None:
    dataset, removal = captioned
    there = dataset.parent / "other" / dataset.name
    shutil.copytree(there, dataset, dirs_exist_ok=True)
    assert remove_known(dataset) == []
    assert cached_caption(dataset, removal.image_keys[0]) is None
    assert {path for path in files_of(dataset) if path.startswith(("shards", "records"))} == {
        entry.name for entry in read_manifest(dataset).files
    }


def test_removals_killed_after_the_manifest_leave_nothing_behind(
    captioned: tuple[Path, Removal], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, removal = captioned

    def killed(folder: Path, manifest: Manifest) -> None:
        write_manifest(folder, manifest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("diffusion.data.versions.takedown.write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_known(dataset)
    assert remove_known(dataset) == []
    assert cached_caption(dataset, removal.image_keys[0]) is None
    assert {path for path in files_of(dataset) if path.startswith(("shards", "records"))} == {
        entry.name for entry in read_manifest(dataset).files
    }


def test_removed_images_stay_out_of_a_rebuilt_data_set(images: Path, dataset: Path) -> None:
    content = remove(dataset, Selection(sources=["odd/01.png"]), "asked to").content_digest
    again = ingest(dataset, config(images), rebuild="always")
    assert (again.removed, again.content_digest) == (1, content)
    assert [part.outcomes.get("removed") for part in read_manifest(dataset).parts] == [1, None]


def resaved(path: Path, target: Path) -> None:
    """The same pixels in other bytes."""
    Image.open(path).save(target, compress_level=0)


def test_reencoded_copies_of_removed_images_stay_out(tmp_path: Path) -> None:
    images, folder = many(tmp_path / "images", range(12)), tmp_path / "data" / "set"
    ingest(folder, config(images))
    remove(folder, Selection(sources=["a/0003.png"]), "asked to")
    for name in ("0002b", "0003b"):  # one sorts before it, one behind it
        resaved(images / "a" / "0003.png", images / "a" / f"{name}.png")
    result = ingest(folder, config(images, size=9, enlarge=True), rebuild="always")
    assert (result.kept, result.removed) == (11, 3)
    (images / "a" / "0003.png").unlink()
    assert ingest(folder, config(images, size=10, enlarge=True), rebuild="always").kept == 11


def test_later_copies_are_known_by_their_own_bytes(tmp_path: Path) -> None:
    images, folder = many(tmp_path / "images", range(12)), tmp_path / "data" / "set"
    ingest(folder, config(images))
    remove(folder, Selection(sources=["a/0003.png"]), "asked to")
    resaved(images / "a" / "0003.png", images / "a" / "copy.png")
    (images / "a" / "0003.png").unlink()
    assert ingest(folder, config(images)).removed == 1
    assert not any("copy" in str(row["source"]) for row in records(folder))
    assert ingest(folder, config(images, size=9, enlarge=True), rebuild="always").kept == 11


def test_removed_quarantined_file_name_does_not_come_back(tmp_path: Path) -> None:
    images, folder = many(tmp_path / "images", range(12)), tmp_path / "data" / "set"
    (images / "a" / "bad.png").write_bytes(b"no image")
    ingest(folder, config(images, max_quarantined=1))
    remove(folder, Selection(sources=["a/bad.png"]), "asked to")
    os.utime(images / "a" / "bad.png", (1, 1))
    assert ingest(folder, config(images, max_quarantined=1)).quarantined == []
    assert not any("bad" in str(row["source"]) for row in records(folder))
