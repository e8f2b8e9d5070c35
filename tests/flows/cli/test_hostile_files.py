"""Files that users and strangers give hold anything: each command ends with exit code 2 and one line."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.main import get_command

from flows.cli import app
from tests.builders.command_line import CommandLine
from tests.builders.hostile_texts import JSON, YAML

LIMIT = 5
"""Seconds of CPU time that a command may take for a hostile file."""

WORDS = {"to": "diffusers", "to_seed": "1", "page": "report"}
"""Arguments that are not any text."""


def configured_commands() -> Iterator[tuple[str, ...]]:
    """Each command that reads params.yaml, with an argument for each that it must have."""

    def walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, (*words, name))
        if any("--params" in parameter.opts for parameter in command.params):
            needed = [parameter for parameter in command.params if parameter.required]
            options = [
                text
                for parameter in needed
                for text in ([] if parameter.param_type_name == "argument" else parameter.opts[:1])
                + [WORDS.get(parameter.name, "x")]
            ]
            yield (*words, *options)

    yield from walk(get_command(app), ())


COMMANDS = sorted(configured_commands())


@pytest.fixture
def mistake(no_servers: None, command_line: CommandLine) -> Callable[..., str]:
    """Gives a command that ends with exit code 2, soon, and with one line, which is returned."""

    def run(*words: object) -> str:
        start = time.process_time()
        line = command_line.mistake(*words)
        assert time.process_time() - start < LIMIT
        assert len(line) < 3000
        return line

    return run


@pytest.mark.parametrize("what", YAML)
def test_a_hostile_configuration_is_one_line(mistake: Callable[..., str], what: str) -> None:
    Path("params.yaml").write_bytes(YAML[what])
    assert "params.yaml" in mistake("config", "validate")
    assert not Path("pwned").exists()


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_refuses_a_hostile_configuration(mistake: Callable[..., str], words: tuple[str, ...]) -> None:
    Path("params.yaml").write_bytes(YAML["an anchor in itself"])
    if words[0] == "edit":  # whose images are looked at before
        Image.new("L", (8, 8)).save("x", "png")
    assert "params.yaml" in mistake(*words)


def test_the_table_has_the_commands_of_the_pipeline() -> None:
    assert {"train", "evaluate", "promote", "retrain", "sweep", "deploy", "gc"} <= {words[0] for words in COMMANDS}


@pytest.mark.parametrize("what", [name for name in YAML if name not in ("a text", "a number")])
def test_a_hostile_value_of_an_option_is_one_line(mistake: Callable[..., str], what: str) -> None:
    # No argument of a program holds a NUL, and none is this long.
    text = YAML[what][:100_000].decode("utf-8", "surrogateescape").replace("\0", "\x01")
    mistake("config", "validate", "--set", f"training.dataset={text}")
    mistake("sweep", "--local", "--over", f"training.batch_size={text}")


@pytest.mark.parametrize("what", JSON)
def test_a_hostile_table_of_requests_is_one_line(mistake: Callable[..., str], what: str) -> None:
    Path("requests.jsonl").write_bytes(JSON[what])
    mistake("sample", "--requests", "requests.jsonl", "--model", "models:/x/1", "--dry-run")


@pytest.mark.parametrize("what", JSON)
def test_a_hostile_pipeline_is_one_line(mistake: Callable[..., str], what: str) -> None:
    Path("pipeline").mkdir()
    Path("pipeline", "model_index.json").write_bytes(JSON[what])
    mistake("model", "import", "pipeline", "--out", "x.safetensors")


@pytest.mark.parametrize("what", JSON)
def test_a_hostile_manifest_is_one_line(mistake: Callable[..., str], what: str) -> None:
    Path("data", "faces").mkdir(parents=True)
    Path("data", "faces", "manifest.json").write_bytes(JSON[what])
    mistake("train", "--local", "--dataset", "faces")
