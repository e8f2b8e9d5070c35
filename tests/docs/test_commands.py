"""Every command in the documentation is one that the command line understands."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from diffusion.common.errors import UserError
from flows.cli import app
from flows.config import load_params
from tests.builders import ROOT
from tests.docs.pages import PAGES, blocks, of_program

CLI: Any = get_command(app)
ALONE = ("--help", "-h", "--version", "--install-completion")
"""Options that do something and end the program as soon as they are parsed."""
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def _leaf(words: list[str]) -> tuple[Any, str, list[str]]:
    """The command that ``words`` name, its name, and the words after it."""
    command, name, rest = CLI, "darkroom", list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"{name} has no command {rest[0]}"
        command, name = command.commands[rest[0]], f"{name} {rest[0]}"
        rest = rest[1:]
    return command, name, rest


def _settings(words: list[str]) -> list[str]:
    return [value for option, value in pairwise(words) if option == "--set"]


@by_page
def test_each_darkroom_command_is_parsed_by_the_command_line(page: Path) -> None:
    for block in blocks(page, "sh"):
        for words in of_program("darkroom", block):
            command, name, rest = _leaf(words)
            options = [word for word in rest if word != "…"]  # a placeholder for more of them
            if options not in [[alone] for alone in ALONE]:
                for parameter in command.params:
                    parameter.callback = None  # files of the example are not here
                command.make_context(name, options)


@by_page
def test_each_setting_of_a_command_is_a_field_with_a_value_in_its_range(page: Path, tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text("{}\n")
    for block in blocks(page, "sh"):
        for words in of_program("darkroom", block):
            try:
                load_params(params, _settings(words))
            except UserError as error:
                pytest.fail(f"darkroom {' '.join(words)}: {error}")


@by_page
def test_commands_within_sentences_exist_with_their_options(page: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for words in re.findall(r"`darkroom ([^`]+)`", text):
        command, name, rest = _leaf(words.split())
        options = {option for each in command.params for option in (*each.opts, *each.secondary_opts)} | {
            "--help",
            "-h",
        }
        for word in rest:
            if word.startswith("--"):
                assert word in options, f"{name} has no option {word}"


@by_page
def test_each_make_command_names_targets_of_the_makefile(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in blocks(page, "sh"):
        for words in of_program("make", block):
            assert {word for word in words if "=" not in word} <= targets, words
