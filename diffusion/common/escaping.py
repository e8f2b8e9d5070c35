"""Text from outside, such as labels, captions and file names, as it can be shown safely."""

import json
import re

INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""Control characters, line separators, marks that turn the direction of writing, and halves of surrogate pairs."""
MARKUP = re.compile(
    r"[\\`*\[\]<>&|~#$]"  # marks that count anywhere
    r"|(?<![^\W_])_|_(?![^\W_])"  # emphasis, which is none inside of a word
    r"|:(?=//)|(?<=\bwww)\.|@"  # addresses, which become links by themselves
    r"|^[-+=]|(?<=^\d)[.)]",  # lists and headings
    re.IGNORECASE,
)
"""What Markdown, or HTML in it, would take for its own."""


def escape_character(match: re.Match[str]) -> str:
    """The one character of ``match`` as an escape that JSON and Python read alike: backslash, u, four hex digits."""
    return f"\\u{ord(match[0]):04x}"


def escape_controls(text: str) -> str:
    r"""``text`` on one line, with ``\uXXXX`` for each character that moves a cursor, hides or reorders its neighbours.

    Can always be encoded. JSON without white space stays the same JSON.
    """
    return INVISIBLE.sub(escape_character, text)


def escape_markdown(text: str) -> str:
    """``text`` on one line of Markdown, which is shown as it is: no markup, link, image or HTML."""
    return MARKUP.sub(r"\\\g<0>", escape_controls(" ".join(text.split())))


def python_literal(text: str) -> str:
    """A string literal for ``text`` that can be shown; Python and JSON read it alike."""
    return escape_controls(json.dumps(text, ensure_ascii=False))
