"""Text for display: escaping of what is untrusted, such as labels, captions and file names, and numbers of things."""

import json
import re

INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""Control characters, line separators, bidirectional marks and lone surrogates."""
MARKUP = re.compile(
    r"[\\`*\[\]<>&|~#$]"  # special characters anywhere
    r"|(?<![^\W_])_|_(?![^\W_])"  # emphasis, which has no effect inside a word
    r"|:(?=//)|(?<=\bwww)\.|@"  # addresses that are linked automatically
    r"|^[-+=]|(?<=^\d)[.)]",  # lists and headings
    re.IGNORECASE,
)
"""Characters that Markdown, or HTML in it, would interpret."""


def escape_controls(text: str) -> str:
    r"""Replace control characters, bidirectional marks and lone surrogates by ``\uXXXX``; JSON keeps its meaning."""
    return INVISIBLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def escape_markdown(text: str) -> str:
    """Escape ``text`` for one line of Markdown, without markup, links, images or HTML."""
    return MARKUP.sub(r"\\\g<0>", escape_controls(" ".join(text.split())))


def python_literal(text: str) -> str:
    """Format ``text`` as a printable string literal for Python and JSON."""
    return escape_controls(json.dumps(text, ensure_ascii=False))


def pluralize(number: int, one: str, several: str | None = None) -> str:
    """Format a number of things with their name; ``several``: its plural, if that is not the name with an s."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"
