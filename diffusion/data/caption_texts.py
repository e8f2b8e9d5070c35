"""Texts that training shows for a caption: one of its lines, with its tags shuffled or dropped.

All are listed beforehand, so that each is embedded once; which one an image gets is sampled by seed and index.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field, model_validator

from diffusion.common.config import Config
from diffusion.common.files import sha256_bytes


class TagsConfig(Config):
    """Captions as lists of tags, between commas, of which training sees many orders and selections."""

    shuffle: bool = False
    """Whether the tags beyond ``keep`` are shuffled."""
    keep: int = Field(0, ge=0, le=1000)
    """Number of first tags that stay in their place and are never dropped, such as a trigger word."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability with which each tag beyond ``keep`` is dropped."""
    variants: int = Field(16, ge=1, le=1024)
    """Number of texts that are made of each line of a caption, and embedded once; one is sampled at each step."""

    @model_validator(mode="after")
    def _changes_something(self) -> "TagsConfig":
        if not self.shuffle and not self.dropout:
            raise ValueError("training.tags changes nothing: set shuffle or dropout, or leave it out")
        return self


def vary_tags(line: str, config: TagsConfig, seed: int, number: int) -> str:
    """Make variant ``number`` of a line: a function of the arguments. At least one tag is left."""
    from diffusion.common.random import generator  # with torch, which configurations do without

    tags = [tag for part in line.split(",") if (tag := part.strip())]
    kept, others = tags[: config.keep], tags[config.keep :]
    chance = generator(seed, f"tags/{sha256_bytes(line.encode())}", number)
    if config.dropout:
        stay = chance.random(len(others)) >= config.dropout
        if not kept and not stay.any() and len(others):
            stay[chance.integers(len(others))] = True
        others = [tag for tag, stays in zip(others, stay, strict=True) if stays]
    if config.shuffle:
        others = [others[place] for place in chance.permutation(len(others))]
    return ", ".join([*kept, *others])


@dataclass(frozen=True)
class CaptionTexts:
    """The texts of K captions: ``first`` of each for evaluation, and ``choices`` for training."""

    texts: list[str]
    """All that differ, sorted."""
    first: np.ndarray
    """(K,) int64, index in ``texts`` of the first line of each caption."""
    choices: np.ndarray | None
    """Indices in ``texts`` of those to sample from, caption by caption: int64. None: each has its first line alone."""
    ends: np.ndarray
    """(K,) int64, where those of each caption end in ``choices``."""

    def select(self, captions: np.ndarray, u: np.ndarray | None = None) -> np.ndarray:
        """Return the index of a text of each of ``captions``, (N,): the first, or sampled by ``u`` in [0, 1), (N,)."""
        if u is None or self.choices is None:
            places, texts = captions, self.first
        else:
            starts = np.concatenate([[0], self.ends[:-1]])[captions]
            places, texts = starts + (u * (self.ends[captions] - starts)).astype(np.int64), self.choices
        selected: np.ndarray = np.take(texts, places)
        return selected


def list_texts(captions: Sequence[str], tags: TagsConfig | None, seed: int) -> CaptionTexts:
    """List the texts of ``captions``, each of one or several lines."""
    first, choices = [], list[list[str]]()
    for caption in captions:
        lines = [line for line in caption.split("\n") if line.strip()] or [caption]
        first.append(lines[0])
        if tags is not None:
            lines = [vary_tags(line, tags, seed, number) for line in lines for number in range(tags.variants)]
        choices.append(lines)
    texts = sorted({*first, *(text for lines in choices for text in lines)})
    numbers = {text: number for number, text in enumerate(texts)}
    varies = any(lines != [line] for lines, line in zip(choices, first, strict=True))
    return CaptionTexts(
        texts,
        np.array([numbers[text] for text in first], np.int64),
        np.array([numbers[text] for lines in choices for text in lines], np.int64) if varies else None,
        np.cumsum([len(lines) for lines in choices], dtype=np.int64),
    )
