"""YAML is read as PyYAML reads it, within bounds; JSON raises one kind of error."""

import time
from pathlib import Path

import pytest
import yaml

from diffusion.common.parsing import MAX_DEPTH, MAX_NODES, parse_json, parse_yaml, read_yaml
from diffusion.presets import preset
from tests.builders import ROOT
from tests.builders.hostile_texts import JSON, YAML

NOT_A_CONFIGURATION = ("a text", "a number", "keys that are numbers", "no key")
"""Plain YAML all the same."""
PLAIN = {
    "nothing": "",
    "scalars": "[1, -0x1f, 0o7, 017, 1_000, 1:30, 1.5, 1e3, .inf, true, no, null, ~, 2024-01-31, text, '1']",
    "an anchor used twice": "a: &a {k: [1, 2]}\nb: *a\nc: [*a, *a]\n",
    "merged sections": "a: &a {k: 1, l: 2}\nb: {<<: *a, k: 3}\nc:\n  <<: [*a, {m: 4}]\n",
    "blocks of text": "a: |\n  one\n  two\nb: >-\n  one\n  two\n",
    "a byte order mark": "\ufeffa: 1\n",
    "the deepest lists": "[" * MAX_DEPTH + "]" * MAX_DEPTH,
}


@pytest.mark.parametrize("what", PLAIN)
def test_plain_yaml_is_read_as_by_pyyaml(tmp_path: Path, what: str) -> None:
    (tmp_path / "a.yaml").write_text(PLAIN[what])
    assert read_yaml(tmp_path / "a.yaml") == yaml.safe_load(PLAIN[what])


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.yaml"), *ROOT.glob("infra/*.yaml")]), ids=lambda path: path.name)
def test_files_of_the_project_are_plain_yaml(path: Path) -> None:
    assert read_yaml(path) == yaml.safe_load(path.read_text())


def test_presets_are_read() -> None:
    assert preset("fast")["training"]


@pytest.mark.parametrize("what", [name for name in YAML if name not in NOT_A_CONFIGURATION])
def test_hostile_yaml_is_one_kind_of_error_and_soon(what: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(YAML[what])
    start = time.process_time()
    if what == "many keys":
        assert len(read_yaml(tmp_path / "a.yaml")) == 7_000
    else:
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            read_yaml(tmp_path / "a.yaml")
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    "text", ["[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), f"[{'1,' * MAX_NODES}]", "&a [*a]", "[&a [1], &a [2]]"]
)
def test_what_exceeds_the_limits_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"over|contains itself|duplicate"):
        parse_yaml(text)


@pytest.mark.parametrize("what", [name for name in JSON if name != "a number"])
def test_hostile_json_is_one_kind_of_error(what: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(JSON[what])


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("training: [", "line 1, column 12"),
        ("training:\n  minutes: 3\n dataset: x", "line 3, column 2"),
        ("training:\n\tminutes: 3", "line 2, column 1"),
        ("training: minutes: 3", "line 1, column 18"),
        ("a: 1\nb", "line 2, column 2"),
        ("a: {b: 1", "line 1, column 9"),
        ("- a\nb: c", "line 2, column 1"),
        ("a: @b", "line 1, column 4"),
    ],
)
def test_yaml_mistake_names_its_place_and_what_was_expected(text: str, place: str) -> None:
    with pytest.raises(ValueError, match=rf"^{place}: .*(expected|cannot begin)") as error:
        parse_yaml(text)
    assert "unicode string" not in str(error.value)


def test_character_that_yaml_forbids_is_named() -> None:
    with pytest.raises(ValueError, match=r"U\+0000") as error:
        parse_yaml("a: \0")
    assert "unicode string" not in str(error.value)
