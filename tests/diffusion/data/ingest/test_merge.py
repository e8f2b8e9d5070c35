"""Two lines of versions become one, which holds what both added and nothing that was taken down."""

import shutil
from pathlib import Path

import pytest

from diffusion.common.errors import ConflictError
from diffusion.data.dataset import Dataset
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.ingest.merge import Union, merge_versions
from diffusion.data.manifest import Manifest, manifest_bytes, read_manifest, require_whole, version_path, work_folder
from diffusion.data.versions.takedown import remove, remove_known
from diffusion.data.versions.takedown_records import Selection
from tests.builders.ingested import files_of
from tests.builders.shapes import blob

Line = tuple[Path, Path]
"""A data set's folder and that of its source."""


def config(source: Path, **fields: object) -> IngestConfig:
    return IngestConfig.model_validate({"source": str(source), "size": 8, "held_out": 0.33, "workers": 1} | fields)


def add(line: Line, *numbers: int, **fields: object) -> Manifest:
    folder, source = line
    source.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        blob(number).save(source / f"{number}.png")
    ingest(folder, config(source, **fields))
    return read_manifest(folder)


@pytest.fixture
def lines(tmp_path: Path) -> tuple[Line, Line, Manifest]:
    """Two machines with the same first version."""
    ours, theirs = ((tmp_path / name / "data" / "blobs", tmp_path / name / "source") for name in ("ours", "theirs"))
    base = add(ours, *range(6))
    shutil.copytree(ours[0].parents[1], theirs[0].parents[1])
    return ours, theirs, base


def bring(ours: Line, theirs: Line) -> Manifest:
    """All files of the version in ``theirs`` lie in ``ours`` as well."""
    for path in theirs[0].rglob("*"):
        target = ours[0] / path.relative_to(theirs[0])
        if path.is_file() and path.name != "manifest.json" and not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    return read_manifest(theirs[0])


def united(ours: Line, theirs: Line, base: Manifest | None, **fields: object) -> Union:
    version = bring(ours, theirs)
    return merge_versions(ours[0], config(ours[1], **fields), version, base)


def test_merged_data_set_equals_one_ingested_on_a_single_machine(
    lines: tuple[Line, Line, Manifest], tmp_path: Path
) -> None:
    ours, theirs, base = lines
    add(theirs, 100, 101, 102)
    mine = add(ours, 101, 200)
    result = united(ours, theirs, base)
    alone = add((tmp_path / "alone" / "blobs", tmp_path / "all"), *range(6), 100, 101, 102, 200)
    assert (result.added, result.lost) == (1, 0)
    assert result.version.content_digest == alone.content_digest
    assert result.version.parent == read_manifest(theirs[0]).digest
    require_whole(ours[0], result.version)
    assert version_path(ours[0], read_manifest(theirs[0]).digest).is_file()
    assert (work_folder(ours[0]) / "versions" / f"{mine.digest}.json").read_bytes() == manifest_bytes(mine)
    # The index stands for it: the next ingest reads nothing.
    again = ingest(ours[0], config(ours[1]))
    assert (again.read, again.changed) == (0, False)
    assert Dataset.open(ours[0]).images(range(10)).shape[0] == 10


def test_merge_killed_before_the_manifest_resumes_to_the_same_result(
    lines: tuple[Line, Line, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs, base = lines
    add(theirs, 100)
    add(ours, 200, 201)
    other = tmp_path / "undisturbed" / "data" / "blobs"
    shutil.copytree(ours[0].parent, other.parent)
    united((other, ours[1]), theirs, base)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("diffusion.data.ingest.merge.remember", killed)
        with pytest.raises(KeyboardInterrupt):
            united(ours, theirs, base)
    united(ours, theirs, base)
    shards = [{name: data for name, data in files_of(folder).items() if "tar" in name} for folder in (ours[0], other)]
    assert shards[0] == shards[1]
    assert read_manifest(ours[0]) == read_manifest(other)


def test_merge_keeps_takedowns_and_removals_of_the_other_branch(
    lines: tuple[Line, Line, Manifest],
) -> None:
    ours, theirs, base = lines
    add(theirs, 200)
    removal = remove(theirs[0], Selection(sources=["200.png", "3.png"]), "consent withdrawn")
    add(ours, 200, 201)
    shutil.copytree(work_folder(theirs[0]) / "removals", work_folder(ours[0]) / "removals")
    result = united(ours, theirs, base)
    assert removal.images == 2
    assert (result.added, result.version.kept) == (1, 6)
    assert remove_known(ours[0]) == []


def test_a_takedown_of_ours_is_applied_to_theirs(lines: tuple[Line, Line, Manifest]) -> None:
    ours, theirs, base = lines
    add(theirs, 100)
    removal = remove(ours[0], Selection(sources=["3.png"]), "consent withdrawn")
    united(ours, theirs, base)
    assert remove_known(ours[0]) == [removal]
    assert read_manifest(ours[0]).kept == 6
    assert read_manifest(ours[0]).change == "removal: consent withdrawn"


def test_applying_a_takedown_elsewhere_gives_the_same_version(lines: tuple[Line, Line, Manifest]) -> None:
    ours, theirs, _ = lines
    removal = remove(theirs[0], Selection(sources=["3.png"]), "consent withdrawn")
    shutil.copytree(work_folder(theirs[0]) / "removals", work_folder(ours[0]) / "removals")
    assert remove_known(ours[0]) == [removal]
    assert files_of(ours[0]) == files_of(theirs[0])


def test_merge_handles_unrelated_branches_and_near_duplicates(tmp_path: Path) -> None:
    ours, theirs = ((tmp_path / name / "blobs", tmp_path / name / "source") for name in ("ours", "theirs"))
    add(ours, 1, 2, 3)
    add(theirs, 3, 4, near_duplicates=24)
    result = united(ours, theirs, None, near_duplicates=24)
    assert (result.added, result.version.kept) == (2, 4)


@pytest.mark.parametrize("theirs_too", [True, False])
def test_merge_keeps_the_calibrated_threshold_of_near_duplicates(theirs_too: bool, tmp_path: Path) -> None:
    ours, theirs = ((tmp_path / name / "blobs", tmp_path / name / "source") for name in ("ours", "theirs"))
    mine = add(ours, *range(60), near_duplicates="auto")
    other = add(theirs, *range(100, 180), size=8, near_duplicates="auto" if theirs_too else None)
    assert mine.near_duplicate_bits is not None
    assert (other.near_duplicate_bits is not None) == theirs_too
    assert mine.near_duplicate_bits != other.near_duplicate_bits
    result = united(ours, theirs, None, near_duplicates="auto")
    expected = other.near_duplicate_bits if theirs_too else mine.near_duplicate_bits
    assert result.version.near_duplicate_bits == expected
    assert ingest(ours[0], config(ours[1], near_duplicates="auto")).near_duplicates is None


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_merge_fails_for_different_storage_settings(lines: tuple[Line, Line, Manifest], whose: str) -> None:
    ours, theirs, base = lines
    line, other = (ours, theirs) if whose == "ours" else (theirs, ours)
    add(other, 100)
    ingest(line[0], config(line[1], size=9), rebuild="always")
    before = read_manifest(ours[0])
    with pytest.raises(ConflictError, match="another process was first"):
        united(ours, theirs, base)
    assert read_manifest(ours[0]) == before
