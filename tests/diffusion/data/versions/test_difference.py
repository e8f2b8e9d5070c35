"""Differences of versions, compared with those of dictionaries."""

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.data.versions.difference import Sample, VersionGroup, diff
from tests.builders.tables import Row, manifest_of, rows, write_parts

FIELDS = ("key", "source", "split", "label", "caption", "reason", "mask")
VERSION = st.lists(rows(), min_size=1, max_size=10, unique_by=lambda row: row["key"] or row["source"])


def images_of(records: list[Row], outcome: str) -> dict[str, Sample]:
    return {
        row["key"]: Sample.model_validate({name: row.get(name) for name in FIELDS})
        for row in records
        if row["outcome"] == outcome
    }


def only_in(images: dict[str, Sample], others: dict[str, Sample], limit: int) -> VersionGroup[Sample]:
    keys = sorted(images.keys() - others.keys())
    return VersionGroup(count=len(keys), samples=[images[key] for key in keys[:limit]])


@settings(max_examples=8, deadline=None)
@given(VERSION, VERSION, st.integers(0, 3))
def test_differences_are_those_of_dictionaries(old: list[Row], new: list[Row], limit: int) -> None:
    with TemporaryDirectory() as root:
        folder = Path(root)
        versions = [manifest_of(write_parts(folder, [records[:4], records[4:]])) for records in (old, new)]
        result = diff(folder, *versions, limit)
    old_images, new_images = images_of(old, "kept"), images_of(new, "kept")
    assert result.added == only_in(new_images, old_images, limit)
    assert result.removed == only_in(old_images, new_images, limit)
    assert result.dropped == only_in(images_of(new, "dropped"), images_of(old, "dropped"), limit)
    assert result.restored == only_in(images_of(old, "dropped"), images_of(new, "dropped"), limit)
    compared = [
        [
            (key, images[key].split, *(getattr(images[key], name) or "" for name in ("label", "caption", "mask")))
            for key in images
        ]
        for images in (old_images, new_images)
    ]
    changed = sorted({key for key, *_ in set(compared[1]) - set(compared[0])} & old_images.keys())
    assert result.changed is not None
    assert result.changed.count == len(changed)
    pairs = [(change.before, change.after) for change in result.changed.samples]
    assert pairs == [(old_images[key], new_images[key]) for key in changed[:limit]]
