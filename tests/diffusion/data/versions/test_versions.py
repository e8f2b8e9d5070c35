"""Versions of a data set: what there is, what is in one, what changed between two."""

import json
from pathlib import Path

import numpy as np
import pytest

from diffusion.common.errors import UserError
from diffusion.data.manifest import manifest_bytes, parse_manifest, read_manifest, write_manifest
from diffusion.data.versions.difference import diff
from diffusion.data.versions.versions import history, known_versions, remember, resolve, show
from tests.builders.built_datasets import BuiltDataset, duplicate, image_record, quarantined
from tests.builders.small_datasets import random_images

PIXELS = random_images(12)[:, 0]


@pytest.fixture
def built(tmp_path: Path) -> BuiltDataset:
    """A data set without a version."""
    return BuiltDataset(tmp_path / "data" / "built", size=8)


def image(number: int, **fields: object) -> dict[str, object]:
    return image_record(PIXELS[number], f"{number}.png", **fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "../../outside"),
        ("name", "shards/../../outside"),
        ("name", "/etc/outside"),
        ("name", "shards/a/b"),
        ("name", "shards/.hidden"),
        ("sha256", "../outside"),
    ],
)
def test_manifest_with_paths_outside_the_folder_is_an_error(built: BuiltDataset, field: str, value: str) -> None:
    document = json.loads(manifest_bytes(built.version([image(0)])))
    document["parts"][0]["shard"][field] = value
    with pytest.raises(UserError, match="here is damaged"):
        parse_manifest(json.dumps(document).encode(), "here")


def test_history_counts_added_removed_and_quarantined_images(built: BuiltDataset) -> None:
    first = built.version([image(0), image(1), quarantined("bad.png", "damaged")])
    second = built.version([image(2), duplicate(image(0), "copy.png")])
    third = built.replace(0, [image(1)], "removal: asked to")
    counted = [(each.digest, each.change, each.added, each.removed, each.kept) for each in history(built.folder)]
    assert counted == [
        (third.digest, "removal: asked to", 0, 1, 2),
        (second.digest, "ingest", 1, 0, 3),
        (first.digest, "ingest", 2, 0, 2),
    ]
    assert [each.current for each in history(built.folder)] == [True, False, False]
    assert [each.parent for each in history(built.folder)] == [second.digest, first.digest, None]


def test_rebuild_counts_as_removing_and_adding_all_images(built: BuiltDataset) -> None:
    built.version([image(0), image(1)])
    built.parts.clear()
    built.version([image(0), image(1), image(2)], change="rebuild")
    newest = history(built.folder)[0]
    assert (newest.added, newest.removed, newest.kept) == (3, 2, 3)


def test_the_last_record_of_a_name_decides_its_quarantine(built: BuiltDataset) -> None:
    built.version([quarantined("once.png", "damaged"), quarantined("always.png", "damaged"), image(0)])
    built.version([image_record(PIXELS[1], "once.png"), quarantined("always.png", "too small")])
    built.version([image_record(PIXELS[2], "late.png")])
    built.version([quarantined("late.png", "damaged")])
    assert [each.quarantined for each in history(built.folder)] == [2, 1, 1, 2]
    newest = show(built.folder, read_manifest(built.folder))
    assert newest.quarantined_count == 2
    reasons = {each.source: each.reason for each in newest.quarantined or ()}
    assert reasons == {"always.png": "too small", "late.png": "damaged"}


def test_show_lists_top_reasons_and_first_quarantined_files(built: BuiltDataset) -> None:
    bad = [quarantined(f"{n:02d}.png", "damaged" if n % 3 else "too small") for n in range(9)]
    version = built.version([*bad, image(0, label="a"), image(1, label="b", split="held_out")])
    summary = show(built.folder, version, limit=2)
    assert [each.source for each in summary.quarantined or ()] == ["00.png", "01.png"]
    assert summary.quarantined_count == 9
    assert [(each.reason, each.count) for each in summary.reasons or ()] == [("damaged", 6), ("too small", 3)]
    assert (summary.kept, summary.splits, summary.classes) == (2, {"train": 1, "held_out": 1}, {"a": 1, "b": 1})


def test_missing_record_table_makes_the_quarantine_count_unknown(built: BuiltDataset) -> None:
    first = built.version([image(0), quarantined("bad.png", "damaged")])
    path = built.folder / first.parts[0].records.name
    copy = path.read_bytes()
    built.replace(0, [image(1)], "removal: asked to")
    assert [each.quarantined for each in history(built.folder)] == [0, None]
    assert show(built.folder, first).quarantined_count is None
    remote = built.folder.parent / "stored"
    remote.write_bytes(copy)
    summary = show(built.folder, first, lambda _: remote)
    assert [each.source for each in summary.quarantined or ()] == ["bad.png"]
    remote.write_bytes(copy[:-1])
    assert show(built.folder, first, lambda _: remote).quarantined_count is None


def test_a_version_is_named_by_the_beginning_of_either_digest(built: BuiltDataset) -> None:
    first = built.version([image(0)])
    second = built.version([image(1)])
    assert resolve(built.folder, None) == second
    assert resolve(built.folder, first.digest[:12].upper()) == first
    assert resolve(built.folder, first.content_digest[:12]) == first


@pytest.mark.parametrize(
    ("prefix", "words"),
    [("ffffffffffff", "is not a version"), ("abc", "4 or more hex digits"), ("latest", "hex digits")],
)
def test_a_version_that_never_was_names_those_there_are(built: BuiltDataset, prefix: str, words: str) -> None:
    versions = [built.version([image(0)]), built.version([image(1)])]
    with pytest.raises(UserError, match=words) as error:
        resolve(built.folder, prefix)
    assert words != "is not a version" or all(version.digest[:12] in str(error.value) for version in versions)


def test_versions_of_other_branches_stay_known(built: BuiltDataset) -> None:
    first = built.version([image(0)])
    other = built.version([image(1)])
    remember(built.folder, other)
    write_manifest(built.folder, first)
    for path in (built.folder / "versions").iterdir():
        path.unlink()
    assert list(known_versions(built.folder)) == [first.digest, other.digest]
    built.parts, built.manifest = list(first.parts), first
    mine = built.version([image(2)])
    assert [each.digest for each in history(built.folder)] == [mine.digest, first.digest, other.digest]
    assert resolve(built.folder, other.digest[:8]) == other


def test_versions_are_listed_by_branch_with_the_current_one_first(built: BuiltDataset) -> None:
    first = built.version([image(0)])
    second = built.version([image(1)])
    third = built.version([image(2)])
    for version in (second, third):
        remember(built.folder, version)
    write_manifest(built.folder, first)
    built.parts, built.manifest = list(first.parts), first
    branch = built.version([image(3)])
    remember(built.folder, branch)
    order = [each.digest for each in history(built.folder)]
    assert order == [branch.digest, first.digest, third.digest, second.digest]
    write_manifest(built.folder, second)
    assert [each.digest for each in history(built.folder)] == [
        *(each.digest for each in (third, second, first)),
        branch.digest,
    ]


def test_damaged_remembered_versions_are_named_and_hide_no_other(
    built: BuiltDataset, caplog: pytest.LogCaptureFixture
) -> None:
    version = built.version([image(0)])
    remember(built.folder, read_manifest(built.folder).model_copy(update={"change": "ingest "}))
    (path,) = built.folder.parent.rglob(f".{built.folder.name}/versions/*.json")
    path.write_text(path.read_text().replace("ingest ", "rebuild"))
    assert known_versions(built.folder) == {version.digest: version}
    assert f"{path} is damaged" in caplog.text
    assert [each.digest for each in history(built.folder)] == [version.digest]


def test_diff_covers_images_labels_quarantine_settings_and_classes(built: BuiltDataset) -> None:
    before = built.version(
        [image(0), image(1, label="a"), quarantined("bad.png", "damaged")], [image(2), image(3, label="b")]
    )
    after = built.replace(
        1,
        [image(3, label="c"), image(4), image_record(PIXELS[5], "bad.png"), quarantined("worse.png", "empty")],
        "rebuild",
    )
    difference = diff(built.folder, before, after, elsewhere=lambda _: None)
    assert difference.unread == [before.parts[1].records.name]

    built.folder.joinpath(before.parts[1].records.name).parent.mkdir(exist_ok=True)
    again = BuiltDataset(built.folder, 8)
    again.version([image(0), image(1, label="a"), quarantined("bad.png", "damaged")])
    again.parts.append(again._part(1, [image(2), image(3, label="b")]))
    difference = diff(built.folder, before, after)
    keys = {number: str(image(number)["key"]) for number in range(6)}
    assert difference.added is not None
    assert {each.key for each in difference.added.samples} == {keys[4], keys[5]}
    assert difference.removed is not None
    assert [(each.key, each.source) for each in difference.removed.samples] == [(keys[2], "2.png")]
    assert difference.changed is not None
    assert [(each.before.label, each.after.label) for each in difference.changed.samples] == [("b", "c")]
    assert difference.quarantined is not None
    assert [each.source for each in difference.quarantined.samples] == ["worse.png"]
    assert difference.cleared is not None
    assert [each.source for each in difference.cleared.samples] == ["bad.png"]
    assert difference.classes == {"b": (1, 0), "c": (0, 1)}
    assert (difference.kept, difference.same_content, difference.unread) == ((4, 5), False, [])


def test_diff_shows_the_first_of_many_and_counts_all(built: BuiltDataset) -> None:
    before = built.version([image(0)])
    after = built.version([image(number) for number in range(1, 12)])
    difference = diff(built.folder, before, after, limit=3)
    assert difference.added is not None
    assert (difference.added.count, len(difference.added.samples)) == (11, 3)
    keys = sorted(str(image(number)["key"]) for number in range(1, 12))
    assert [each.key for each in difference.added.samples] == keys[:3]


def test_diff_reads_no_table_that_both_versions_share(built: BuiltDataset) -> None:
    before = built.version([image(0)])
    after = built.version([image(1)])
    (built.folder / before.parts[0].records.name).write_bytes(b"damaged")
    difference = diff(built.folder, before, after)
    assert difference.added is not None
    assert difference.added.count == 1


def test_diff_over_a_removal_knows_the_removed_keys(built: BuiltDataset) -> None:
    before = built.version([image(0), image(1), image(2)])
    removed_row: dict[str, object] = {"outcome": "removed", "reason": "asked to", "source": "", "key": image(1)["key"]}
    after = built.replace(0, [image(0), removed_row | {"source_sha256": "0" * 64}, image(2)], "removal: asked to")
    difference = diff(built.folder, before, after)
    assert difference.removed is not None
    assert [each.key for each in difference.removed.samples] == [image(1)["key"]]
    assert difference.removed.count == 1
    assert difference.added is not None
    assert difference.added.count == 0


def test_images_are_unlike_each_other() -> None:
    assert len({pixels.tobytes() for pixels in np.array(PIXELS)}) == len(PIXELS)
