"""Front matter of the cards of the Hub, which strangers write."""

import time

import pytest

from diffusion.common.hub import MAX_FRONT_MATTER, read_front_matter


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\n# Card", {"license": "mit"}),
        ("\ufeff---  \r\nlicense: mit\r\n---\t\r\n", {"license": "mit"}),
        ("---\ntext: |\n  ---\n  more\n---\n", {"text": "---\nmore\n"}),
        ("---\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("# Card\n---\nlicense: mit\n---\n", {}),
        ("--- license: mit\n---\n", {}),
        ("", {}),
        ("---\n- a list\n---\n", {}),
        (f"---\nlicense: {'m' * MAX_FRONT_MATTER}\n---\n", {}),
    ],
)
def test_front_matter_is_what_stands_between_two_lines(card: str, expected: dict[str, str]) -> None:
    assert read_front_matter(card) == expected


@pytest.mark.parametrize(
    "card", ["---" + "\n" * 2**20, "---" + " \n" * 2**19, "---\n" * 2**18, "\n" * 2**20, "-" * 2**20]
)
def test_no_card_keeps_its_reader_busy(card: str) -> None:
    start = time.thread_time()
    assert read_front_matter(card) == {}
    assert time.thread_time() - start < 1
