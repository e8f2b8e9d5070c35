"""Equal images of many parts, compared with what a loop over all records finds."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.common.errors import UserError
from diffusion.data.ingest.config import StorageConfig
from diffusion.data.ingest.key_resolution import resolve
from diffusion.data.manifest import digest_of_samples, sample_digest
from tests.builders.tables import Row, row_of, rows, write_parts

STORAGE = StorageConfig(size=8)


def expected_of(parts: list[list[Row]]) -> tuple[str, list[tuple[int, int, bool]]]:
    firsts: dict[str, tuple[bytes, bool]] = {}
    duplicates = []
    for part, records in enumerate(parts):
        for place, row in enumerate(records):
            if row["outcome"] in ("kept", "dropped"):
                digest = sample_digest(*(row.get(name) for name in ("key", "split", "label", "caption", "mask")))
                if row["key"] in firsts:
                    duplicates.append((part, place, digest != firsts[row["key"]][0]))
                else:
                    firsts[row["key"]] = digest, row["outcome"] == "kept"
    return digest_of_samples(STORAGE, (firsts[key][0] for key in sorted(firsts) if firsts[key][1])), duplicates


@settings(max_examples=8, deadline=None)
@given(st.lists(st.lists(rows(), min_size=1, max_size=8), min_size=1, max_size=4))
def test_duplicates_and_the_digest_are_those_of_a_loop(parts: list[list[Row]]) -> None:
    with TemporaryDirectory() as root, pytest.MonkeyPatch.context() as small:
        small.setattr("diffusion.data.tables.FILES", 2)
        small.setattr("diffusion.data.tables.BATCH", 3)
        small.setattr("diffusion.data.ingest.key_resolution.MAX_RANGE", 1)
        places = [(Path(root), part) for part in write_parts(Path(root), parts)]
        digest, duplicates = resolve(places, STORAGE, Path(root) / "it's {}")
    assert (digest, duplicates.tolist()) == expected_of(parts)


def test_every_character_is_digested_as_canonical_json_has_it(tmp_path: Path) -> None:
    characters = [chr(code) for code in (*range(0x250), 0x2028, 0x2029, 0xFEFF, 0xFFFF, 0x1F600, 0x10FFFF)]
    records = [row_of(number, label=text, caption=f"a{text}{text}b") for number, text in enumerate(characters)]
    ((part),) = write_parts(tmp_path, [records])
    assert resolve([(tmp_path, part)], STORAGE, tmp_path / "scratch")[0] == expected_of([records])[0]


def test_images_that_were_taken_down_are_named(tmp_path: Path) -> None:
    first, second, third = row_of(1), row_of(2), row_of(3, "duplicate")
    (part,) = write_parts(tmp_path, [[first, second, third]])
    for digests in ([second["key"]], [second["source_sha256"], third["key"]]):
        with pytest.raises(UserError, match=f"1 images were taken down.*{second['key']} --dataset"):
            resolve([(tmp_path, part)], STORAGE, tmp_path / "scratch", digests)


def test_damaged_and_missing_tables_are_errors(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, [[row_of(1)], [row_of(2)]])
    (tmp_path / "manifest.json").touch()
    path = tmp_path / parts[1].records.name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    for _ in range(2):
        with pytest.raises(UserError):
            resolve([(tmp_path, part) for part in parts], STORAGE, tmp_path / "scratch")
        path.unlink(missing_ok=True)
