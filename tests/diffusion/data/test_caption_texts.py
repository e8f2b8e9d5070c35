"""Texts that training samples for a caption: lines, shuffled and dropped tags."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from diffusion.data.caption_texts import TagsConfig, list_texts, vary_tags
from diffusion.data.sources.caption_files import complete_caption

TAGS = st.lists(st.text("abcdef ", min_size=1).map(str.strip).filter(bool), min_size=1, max_size=8)


@given(TAGS, st.booleans(), st.integers(0, 4), st.floats(0.01, 0.9), st.integers(0, 2**32), st.integers(0, 99))
def test_variants_keep_the_first_tags_and_lose_no_other_by_shuffling(
    tags: list[str], shuffle: bool, keep: int, dropout: float, seed: int, number: int
) -> None:
    line = ",".join(tags)
    shuffled = vary_tags(line, TagsConfig(shuffle=True, keep=keep), seed, number).split(", ")
    assert shuffled[:keep] == tags[:keep]
    assert Counter(shuffled) == Counter(tags)
    config = TagsConfig(shuffle=shuffle, keep=keep, dropout=dropout)
    varied = vary_tags(line, config, seed, number)
    left = varied.split(", ")
    assert left[: min(keep, len(tags))] == tags[:keep]
    assert varied
    assert Counter(left) <= Counter(tags)
    assert varied == vary_tags(line, config, seed, number)


def test_tags_are_dropped_and_moved_as_often_as_configured() -> None:
    line, count = ", ".join("abcdefghij"), 4000
    config = TagsConfig(shuffle=True, keep=1, dropout=0.25)
    variants = [vary_tags(line, config, 7, number).split(", ") for number in range(count)]
    dropped = 1 - sum(len(tags) - 1 for tags in variants) / (9 * count)
    assert dropped == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / (9 * count)) ** 0.5)
    # After the kept one, each tag is as likely as any other.
    seconds = Counter(tags[1] for tags in variants if len(tags) > 1)
    assert seconds.keys() == set("bcdefghij")
    assert all(abs(number - count / 9) < 5 * (count / 9) ** 0.5 for number in seconds.values())


def test_one_line_is_one_text_and_several_are_drawn_equally_often() -> None:
    plain = list_texts(["b", "a"], None, 0)
    assert (plain.texts, plain.first.tolist(), plain.choices) == (["a", "b"], [1, 0], None)
    texts = list_texts(["one", "two\nthree\nfour"], None, 0)
    assert texts.texts == ["four", "one", "three", "two"]
    captions = np.array([0] * 300 + [1] * 300)
    u = np.linspace(0, 1, 300, endpoint=False)
    assert [texts.texts[number] for number in texts.select(captions)] == ["one"] * 300 + ["two"] * 300
    sampled = [texts.texts[number] for number in texts.select(captions, np.concatenate([u, u]))]
    assert Counter(sampled) == {"one": 300, "two": 100, "three": 100, "four": 100}
    # The largest number below 1 selects the last one.
    assert texts.texts[texts.select(np.array([1]), np.array([np.nextafter(1, 0)]))[0]] == "four"


def test_lines_share_the_variants_of_their_tags() -> None:
    texts = list_texts(["a, b, c\nx, y"], TagsConfig(shuffle=True, variants=8), 3)
    assert texts.choices is not None
    assert len(texts.choices) == texts.ends[0] == 16
    assert {"".join(sorted(texts.texts[number].replace(", ", ""))) for number in texts.choices} == {"abc", "xy"}


@pytest.mark.parametrize(
    ("caption", "default", "trigger", "expected"),
    [
        (None, None, None, None),
        ("a cat", None, None, "a cat"),
        (None, "a cat", "sks", "sks, a cat"),
        (None, None, "sks", "sks"),
        ("a photo of [trigger]", None, "sks", "a photo of sks"),
        ("sks sits\na cat", "other", "sks", "sks sits\nsks, a cat"),
    ],
)
def test_a_trigger_is_in_every_caption(
    caption: str | None, default: str | None, trigger: str | None, expected: str | None
) -> None:
    assert complete_caption(caption, default, trigger) == expected


def test_tags_that_change_nothing_are_an_error() -> None:
    with pytest.raises(ValidationError, match="changes nothing"):
        TagsConfig(keep=2)
