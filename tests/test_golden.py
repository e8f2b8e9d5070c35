"""Fixed small inputs and seeds give what they gave before: see tests/golden.py."""

import json
from pathlib import Path

import pytest

from tests import golden


@pytest.mark.slow
def test_results_are_those_that_were_written_down(tmp_path: Path) -> None:
    """Digests, weights, images, metrics, verdicts; write them anew where a change of results is meant."""
    assert not golden.differences(json.loads(golden.VALUES.read_text()), golden.compute(tmp_path))


def test_each_kind_of_difference_is_named() -> None:
    before = {
        "codecs": {"pillow": "1"},
        "fingerprint": {"torch": "1"},
        "exact": {"a": "x"},
        "close": {"b": 0.25},
        "machine": {"c": "y"},
    }
    assert golden.differences(before, before) == []
    nearly = before | {"close": {"b": 0.25 + 1e-12}}
    assert golden.differences(before, nearly) == []
    other = before | {"exact": {"a": "z"}, "close": {"b": 0.26}, "machine": {}}
    assert [line.partition(":")[0] for line in golden.differences(before, other)] == ["exact/a", "close/b", "machine/c"]
    elsewhere = other | {"codecs": {"pillow": "2"}, "fingerprint": {"torch": "2"}}
    assert [line.partition(":")[0] for line in golden.differences(before, elsewhere)] == ["close/b"]
