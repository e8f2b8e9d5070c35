"""Lists of other tools: which images they name, what they change, and that nothing of it is left once withdrawn."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffusion.common.errors import ConflictError, UserError
from diffusion.curation import curate as curation
from diffusion.curation import lists
from diffusion.curation.config import CurationConfig
from diffusion.curation.curate import CurationResult, curate
from diffusion.curation.lists import ListChange
from diffusion.data.dataset import open_webdataset
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.ingest.merge import merge_versions
from diffusion.data.manifest import Manifest, read_manifest
from diffusion.data.tables import content_digest
from diffusion.data.versions.takedown import remove
from diffusion.data.versions.takedown_records import Selection
from diffusion.data.versions.versions import show
from diffusion.evaluation.config import EvaluationConfig
from tests.builders.ingested import files_of, records
from tests.builders.planted import scene
from tests.builders.shapes import blob

ROOT = "/home/me/pictures/"


def config(source: Path, **fields: object) -> IngestConfig:
    return IngestConfig.model_validate({"source": str(source), "size": 8, "held_out": 0.3, "workers": 1} | fields)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set of 24 images in the classes even and odd, one of them under two names."""
    for number in range(24):
        path = tmp_path / "images" / ("odd" if number % 2 else "even") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        blob(number).save(path)
    shutil.copy(tmp_path / "images" / "odd" / "3.png", tmp_path / "images" / "odd" / "copy of 3.png")
    ingest(tmp_path / "data" / "set", config(tmp_path / "images"))
    return tmp_path / "data" / "set"


def change(folder: Path, table: Path | None, kind: str = "drop", name: str = "bad", **fields: object) -> CurationResult:
    change = ListChange.model_validate({"name": name, "kind": kind, "table": table})
    rules = CurationConfig.model_validate(fields)
    return curate(folder, rules, config(folder), EvaluationConfig(), change=change)


def apply_again(folder: Path) -> CurationResult:
    return curate(folder, CurationConfig(), config(folder), EvaluationConfig())


def csv(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def dropped(folder: Path) -> dict[str, str]:
    return {str(row["source"]): str(row["reason"]) for row in records(folder) if row["outcome"] == "dropped"}


def labels(folder: Path) -> dict[str, str]:
    return {str(row["source"]): str(row["label"]) for row in records(folder) if row["outcome"] in ("kept", "dropped")}


def key_of(folder: Path, name: str) -> str:
    return str(next(row["key"] for row in records(folder) if row["source"] == name))


def test_tables_of_each_tool_drop_what_they_name(data: Path, tmp_path: Path) -> None:
    keys = [key_of(data, f"even/{number}.png") for number in (2, 4)]
    flags = "is_dark_issue,dark_score,is_blurry_issue,blurry_score"
    jsonl = tmp_path / "c.jsonl"
    jsonl.write_text(json.dumps({"file_name": "16.png", "tags": ["soft", "cut"]}) + "\n")
    pq.write_table(pa.table({"id": ["even/18", "20"]}), tmp_path / "nemo.parquet")
    frame = pa.table({"is_dark_issue": [True, False], "__index_level_0__": [f"{ROOT}odd/1.png", f"{ROOT}odd/5.png"]})
    pq.write_table(frame, tmp_path / "pandas.parquet")
    tables = {
        csv(tmp_path / "sheet.csv", "key,reason", f"{keys[0]},a hand", f"{keys[1][:16].upper()},"): {
            "even/2.png": "a hand",
            "even/4.png": "listed",
        },
        csv(tmp_path / "fo.csv", "id,filepath,tags", f"65,{ROOT}odd/7.png,dup", f"66,{ROOT}odd/9.png,"): {
            "odd/7.png": "dup",
            "odd/9.png": "listed",
        },
        csv(
            tmp_path / "cv.csv", f",{flags}", f"{ROOT}even/6.png,True,0.1,True,0.2", f"{ROOT}even/8.png,False,1,False,1"
        ): {"even/6.png": "dark; blurry"},
        jsonl: {"even/16.png": "soft, cut"},
        tmp_path / "nemo.parquet": {"even/18.png": "listed", "even/20.png": "listed"},
        tmp_path / "pandas.parquet": {"odd/1.png": "dark"},
    }
    for table, expected in tables.items():
        result = change(data, table, name=table.stem)
        assert result.list_change is not None
        assert result.list_change.unknown_count == result.list_change.ambiguous_count == 0
        mine = {name: reason for name, reason in dropped(data).items() if reason.startswith(f"list {table.stem}: ")}
        assert mine == {name: f"list {table.stem}: {reason}" for name, reason in expected.items()}
        assert result.newly_dropped == len(expected)
    assert [each.name for each in read_manifest(data).lists or ()] == [table.stem for table in tables]


def test_copies_that_cleanvision_marks_all_are_kept(data: Path, tmp_path: Path) -> None:
    rows = (",is_exact_duplicates_issue,is_near_duplicates_issue", "odd/3.png,True,False", "odd/5.png,False,True")
    with pytest.raises(UserError, match="no issue"):
        change(data, csv(tmp_path / "t.csv", *rows))
    change(data, csv(tmp_path / "t.csv", f"{rows[0]},is_dark_issue", f"{rows[1]},False", f"{rows[2]},True"))
    assert dropped(data) == {"odd/5.png": "list bad: dark"}


def test_rows_without_an_issue_keep_their_label(data: Path, tmp_path: Path) -> None:
    rows = (
        "filepath,is_label_issue,given_label,label",
        f"{ROOT}odd/1.png,True,odd,even",
        f"{ROOT}odd/5.png,False,odd,odd2",
    )
    change(data, csv(tmp_path / "t.csv", *rows), "label")
    assert (labels(data)["odd/1.png"], labels(data)["odd/5.png"]) == ("even", "odd")


def test_unknown_and_ambiguous_names_are_told(data: Path, tmp_path: Path) -> None:
    for folder, number in (("odd", 100), ("even", 101)):
        (tmp_path / "more" / folder).mkdir(parents=True)
        blob(number).save(tmp_path / "more" / folder / "same.png")
    ingest(data, config(tmp_path / "more"))
    result = change(data, csv(tmp_path / "t.csv", "file_name", "same.png", "none.png", "odd/same.png"))
    outcome = result.list_change
    assert outcome is not None
    assert (outcome.unknown, outcome.ambiguous) == (["none.png"], ["same.png"])
    assert dropped(data).keys() == {"odd/same.png"}
    assert any("same.png" in line for line in result.lines())
    with pytest.raises(UserError, match="none of 1 row"):
        change(data, csv(tmp_path / "t.csv", "file_name", "none.png"))


def test_the_root_of_all_others_decides_between_tails(tmp_path: Path) -> None:
    for number, name in enumerate(("1.png", "a/1.png", "a/2.png", "b.png")):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        blob(number).save(path)
    ingest(tmp_path / "data" / "set", config(tmp_path / "images"))
    both = csv(tmp_path / "t.csv", "filepath", f"{ROOT}a/1.png", f"{ROOT}a/2.png")
    change(tmp_path / "data" / "set", both)
    assert dropped(tmp_path / "data" / "set").keys() == {"a/1.png", "a/2.png"}
    with pytest.raises(UserError):
        change(tmp_path / "data" / "set", csv(tmp_path / "t.csv", "filepath", f"{ROOT}a/1.png"), name="other")


@pytest.mark.parametrize("seed", range(4))
def test_withdrawn_lists_leave_the_data_set_as_it_was(data: Path, tmp_path: Path, seed: int) -> None:
    random, before, original = np.random.default_rng(seed), read_manifest(data), labels(data)
    names, active = sorted(original), dict[str, tuple[str, list[str]]]()
    for step in range(6):
        if active and random.random() < 0.4:
            name = str(random.choice(sorted(active)))
            del active[name]
            change(data, None, name=name)
        else:
            kind, name = str(random.choice(["drop", "label"])), f"list {step}"
            chosen = [str(each) for each in random.choice(names, 5, replace=False)]
            table = csv(tmp_path / "t.csv", "source,label", *(f"{each},{name}" for each in chosen))
            active[name] = (kind, chosen)
            change(data, table, kind, name, max_dropped=0.99)
        lost = {each for kind, chosen in active.values() if kind == "drop" for each in chosen}
        expected = original | {
            each: name for name, (kind, chosen) in active.items() if kind == "label" for each in chosen
        }
        assert dropped(data).keys() == lost
        assert labels(data) == expected
        after = read_manifest(data)
        assert after.content_digest == content_digest(data, after.parts, after.storage)
    for name in active:
        change(data, None, name=name)
    after = read_manifest(data)
    assert (after.content_digest, after.parts, after.lists) == (before.content_digest, before.parts, None)


def test_the_same_list_again_makes_no_version(data: Path, tmp_path: Path) -> None:
    table = csv(tmp_path / "t.csv", "source,reason", "odd/1.png,dark", "odd/5.png,soft")
    first = change(data, table)
    shuffled = csv(tmp_path / "t.csv", "source,reason", "odd/5.png,soft", "odd/1.png,dark")
    again = change(data, shuffled)
    assert (first.changed, again.changed, again.digest) == (True, False, first.digest)
    shorter = change(data, csv(tmp_path / "t.csv", "source,reason", "odd/5.png,soft"))
    assert (shorter.changed, shorter.restored, shorter.dropped) == (True, 1, 1)
    assert change(data, None).changed is True
    assert change(data, None).changed is False
    with pytest.raises(UserError, match="no list other"):
        change(data, None, name="other")


@pytest.mark.parametrize("stop", ["write_manifest", "remove_strays", "write_json"])
def test_a_list_recorded_by_a_killed_process_ends_the_same(
    data: Path, tmp_path: Path, stop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, table = data.parent / "expected", csv(tmp_path / "t.csv", "source,label", "odd/1.png,even")
    shutil.copytree(data, expected)
    shutil.copytree(data.parent / ".set", data.parent / ".expected")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for kind in ("label", "drop"):
        with monkeypatch.context() as patched:
            patched.setattr(curation, stop, killed)
            with pytest.raises(KeyboardInterrupt):
                change(data, table, kind, kind)
        change(data, table, kind, kind)
        change(expected, table, kind, kind)
    change(data, None, name="label")
    change(expected, None, name="label")
    assert files_of(data) == files_of(expected)


def test_lists_outlive_ingests_rebuilds_and_other_sizes(data: Path, tmp_path: Path) -> None:
    change(data, csv(tmp_path / "t.csv", "source,reason", "odd/3.png,soft"))
    change(data, csv(tmp_path / "t.csv", "source,label", "even/4.png,odd"), "label", "fix")
    curated = read_manifest(data)
    shutil.copy(tmp_path / "images" / "odd" / "3.png", tmp_path / "images" / "odd" / "again.png")
    ingest(data, config(tmp_path / "images"))
    apply_again(data)
    assert read_manifest(data).content_digest == curated.content_digest
    ingest(data, config(tmp_path / "images"), rebuild="always")
    apply_again(data)
    assert read_manifest(data).content_digest == curated.content_digest
    ingest(data, config(tmp_path / "images", size=12, enlarge=True), rebuild="always")
    apply_again(data)
    assert len(dropped(data)) == 1
    assert labels(data)["even/4.png"] == "odd"
    assert {each.name: each.images for each in read_manifest(data).lists or ()} == {"bad": 1, "fix": 1}


def test_copy_with_its_own_label_is_not_relabelled(data: Path, tmp_path: Path) -> None:
    change(data, csv(tmp_path / "t.csv", "source,label", "odd/1.png,even", "odd/5.png,even"), "label")
    for name, copy in (("odd/1", "odd/copy"), ("odd/5", "even/copy"), ("odd/7", "even/other")):
        shutil.copy(tmp_path / "images" / f"{name}.png", tmp_path / "images" / f"{copy}.png")
        (data.parent / ".set" / "index.sqlite").unlink(missing_ok=name == "odd/5")
        assert ingest(data, config(tmp_path / "images")).relabelled == (name == "odd/7")


def test_labels_of_lists_come_before_rules(tmp_path: Path) -> None:
    for label, side in (("a", 96), ("b", 64)):
        path = tmp_path / "images" / label / f"{side}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        scene(1, 96).resize((side, side), Image.Resampling.BICUBIC).save(path)
    for number in range(2, 6):
        scene(number).save(tmp_path / "images" / "a" / f"other-{number}.png")
    folder, table = tmp_path / "data" / "set", csv(tmp_path / "t.csv", "source,label", "b/64.jpg,a")
    ingest(folder, config(tmp_path / "images", size=48))
    change(folder, table, "label", near_duplicates="one_per_class")
    assert dropped(folder).keys() == {"b/64.jpg"}
    change(folder, None, near_duplicates="one_per_class")
    assert dropped(folder) == {}


def test_takedown_keeps_lists_true(data: Path, tmp_path: Path) -> None:
    key = key_of(data, "odd/5.png")
    change(data, csv(tmp_path / "t.csv", "source,reason", "odd/5.png,private", "odd/1.png,dark"))
    remove(data, Selection(prefixes=[key]), "asked")
    (about,) = read_manifest(data).lists or ()
    assert about.images == 1
    assert not any(b"private" in each for each in files_of(data).values())
    blob(200).save(tmp_path / "images" / "odd" / "200.png")
    ingest(data, config(tmp_path / "images"))
    assert dropped(data).keys() == {"odd/1.png"}
    change(data, None)
    kept = {row["source"] for row in records(data) if row["outcome"] == "kept"}
    assert "odd/1.png" in kept
    assert "odd/5.png" not in kept


def lines_of(data: Path, first: Sequence[ListChange], second: Sequence[ListChange]) -> tuple[Path, Manifest]:
    """Begin two lines of versions at the current one: the first in the folder returned, the second in ``data``."""
    other, base = data.parent / "line" / "set", read_manifest(data)
    shutil.copytree(data, other)
    shutil.copytree(data.parent / ".set", other.parent / ".set")
    for folder, changes in ((other, first), (data, second)):
        for each in changes:
            curate(folder, CurationConfig(), config(folder), EvaluationConfig(), change=each)
    return other, base


def unite(data: Path, other: Path, base: Manifest) -> dict[str, int]:
    """Add the line in ``data`` to the one in ``other``, after its files came; returns the sizes of the lists."""
    for name, content in files_of(other).items():
        if name != "manifest.json" and not (data / name).is_file():
            (data / name).parent.mkdir(exist_ok=True)
            (data / name).write_bytes(content)
    version = merge_versions(data, config(data), read_manifest(other), base).version
    apply_again(data)
    return {each.name: each.images for each in version.lists or ()}


def test_two_machines_keep_what_both_recorded_and_withdrew(data: Path, tmp_path: Path) -> None:
    tables = [csv(tmp_path / f"{number}.csv", "source,label", f"odd/{number}.png,x") for number in (1, 5, 7, 9)]
    for name, table in zip("ab", tables, strict=False):
        change(data, table, "label", name)
    other, base = lines_of(
        data,
        [ListChange(name="c", table=tables[2]), ListChange(name="d", table=tables[1])],
        [ListChange(name="a", table=None), ListChange(name="e", table=tables[3])],
    )
    assert list(unite(data, other, base)) == ["b", "c", "d", "e"]
    assert dropped(data).keys() == {"odd/5.png", "odd/7.png", "odd/9.png"}
    assert {name for name, label in labels(data).items() if label == "x"} == {"odd/5.png"}


@pytest.mark.parametrize("has_base", [False, True])
def test_lists_of_one_name_conflict_until_one_is_withdrawn(data: Path, tmp_path: Path, has_base: bool) -> None:
    tables = [csv(tmp_path / f"{number}.csv", "source", f"odd/{number}.png") for number in (1, 5, 7)]
    if has_base:
        change(data, tables[0])
    other, base = lines_of(data, *([ListChange(name="bad", table=table)] for table in tables[1:]))
    with pytest.raises(ConflictError, match="--withdraw bad --local"):
        unite(data, other, base)
    change(data, None)
    assert unite(data, other, base) == {"bad": 1}
    assert dropped(data).keys() == {"odd/5.png"}


@pytest.mark.parametrize("takes_down", ["remote", "local"])
def test_takedown_from_a_list_is_not_a_change_of_it(data: Path, tmp_path: Path, takes_down: str) -> None:
    rows = ("odd/1.png,private", "odd/5.png,dark", "odd/7.png,soft")
    tables = [csv(tmp_path / f"{count}.csv", "source,reason", *rows[:count]) for count in (2, 3)]
    change(data, tables[0])
    recorded = [ListChange(name=name, table=tables[1]) for name in ("bad", "new")]
    other, base = lines_of(data, *(([], recorded) if takes_down == "remote" else (recorded, [])))
    remove(other if takes_down == "remote" else data, Selection(sources=["odd/1.png"]), "asked")
    assert unite(data, other, base) == {"bad": 2, "new": 2}
    assert dropped(data).keys() == {"odd/5.png", "odd/7.png"}
    assert not any(b"private" in (data / each.table.name).read_bytes() for each in read_manifest(data).lists or ())


def test_a_list_withdrawn_elsewhere_stays_so_after_a_takedown(data: Path, tmp_path: Path) -> None:
    change(data, csv(tmp_path / "t.csv", "source", "odd/1.png", "odd/5.png"))
    other, base = lines_of(data, [ListChange(name="bad", table=None)], [])
    remove(data, Selection(sources=["odd/1.png"]), "asked")
    assert unite(data, other, base) == {}


@pytest.mark.parametrize(
    ("name", "content", "kind", "words"),
    [
        ("t.txt", b"source\nodd/1.png\n", "drop", "is not a table"),
        ("t.csv", b"name\nodd/1.png\n", "drop", "no column that names images"),
        ("t.csv", b"source\n", "drop", "no rows"),
        ("t.csv", b"source,is_dark_issue\nodd/1.png,False\n", "drop", "no issue"),
        ("t.csv", b"source,is_dark_issue\nodd/1.png,maybe\n", "drop", "True or False"),
        ("t.csv", b"source,reason\n,dark\n", "drop", "names no image"),
        ("t.csv", b"source,reason\nodd/1.png,dark\n", "label", "no column label"),
        ("t.csv", b"source,label\nodd/1.png,\n", "label", "has no label"),
        ("t.csv", b"source,label\nodd/1.png,a\nodd/1.png,b\n", "label", "both a and b"),
        ("t.jsonl", b'{"source": {"a": 1}}\n', "drop", "give one text"),
        ("t.parquet", b"PAR1 and no more", "drop", "cannot be read as Parquet"),
    ],
)
def test_unusable_tables_are_errors(
    name: str, content: bytes, kind: str, words: str, data: Path, tmp_path: Path
) -> None:
    before = files_of(data)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        change(data, tmp_path / name, kind)
    with pytest.raises(UserError, match="not a file"):
        change(data, tmp_path / "none.csv", kind)
    assert files_of(data) == before


def test_too_many_rows_and_too_many_images_are_errors(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = csv(tmp_path / "t.csv", "source", *sorted(labels(data))[:20])
    with pytest.raises(UserError, match="max_dropped"):
        change(data, table)
    monkeypatch.setattr(lists, "MAX_ROWS", 19)
    with pytest.raises(UserError, match="more than 19 rows"):
        change(data, table)


def test_other_training_scripts_see_labels_of_lists(data: Path, tmp_path: Path) -> None:
    change(data, csv(tmp_path / "t.csv", "source,label", "odd/1.png,new", "even/2.png,odd"), "label")
    key, names = key_of(data, "even/2.png"), read_manifest(data).labels
    splits = (open_webdataset(data, "train"), open_webdataset(data, "held_out"))
    seen = {sample["key"]: names[sample["label"]] for split in splits for sample in split if sample["label"] >= 0}
    assert seen[key] == "odd"
    assert seen[key_of(data, "odd/1.png")] == "new"
    assert seen[key_of(data, "odd/5.png")] == "odd"


def test_show_names_lists_with_counts(data: Path, tmp_path: Path) -> None:
    change(data, csv(tmp_path / "t.csv", "source,reason", "odd/1.png,dark", "x.png,dark"))
    change(data, csv(tmp_path / "t.csv", "source,label", "odd/5.png,even"), "label", "fix")
    contents = show(data, read_manifest(data))
    assert [(each.name, each.images, each.unmatched) for each in contents.lists or ()] == [("bad", 1, 1), ("fix", 1, 0)]
    assert contents.relabelled == 1
    assert [(each.reason, each.count) for each in contents.rules or ()] == [("list bad", 1)]
