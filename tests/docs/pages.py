"""The Markdown pages of the checkout, their links, headings and commands."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from tests.builders import ROOT

FOLDERS = ("docs", "benchmarks", "examples", "infra")
PAGES = [
    ROOT / "README.md",
    *(page for name in FOLDERS for page in sorted((ROOT / name).rglob("*.md")) if "_build" not in page.parts),
]
FENCE = re.compile(r"^ *```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()(?!\w+:)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?(?=\))")
BEFORE = ("--", "worker-cpu")
"""Words after which a command of Darkroom follows in the command of another program."""


def blocks(page: Path, language: str) -> list[str]:
    """The text of each fenced block in ``language``."""
    return [match["text"] for match in FENCE.finditer(page.read_text()) if match["language"] == language]


def anchors(page: Path) -> set[str]:
    """Names of the headings, as forges and the site make them."""
    names: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        name = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        names.append(name if name not in names else f"{name}-{names.count(name)}")
    return set(names)


def commands(text: str) -> Iterator[list[str]]:
    """Each simple command of a shell script, as words; variables set before it are left out."""
    text = re.sub(r"<<'?(\w+)'?\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL).replace("\\\n", " ")
    text = re.sub(r'"?\$\(([^()]*)\)"?', r"; \1 ;", text)
    for line in text.splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("();<>|&"):
                if command:
                    yield command
                command = []
            elif command or not re.match(r"\w+=", word):
                command.append(word)


def of_program(program: str, text: str) -> Iterator[list[str]]:
    """The arguments of each call of ``program``, also by torchrun or in a container."""
    for command in commands(text):
        starts = [0, *(command.index(word) + 1 for word in BEFORE if word in command)]
        for start in starts:
            if start < len(command) and Path(command[start]).name == program:
                yield command[start + 1 :]
                break
