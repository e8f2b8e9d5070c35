"""Parsers of YAML and JSON from users and strangers, bounded in time and memory."""

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

MAX_YAML_BYTES = 2**17
"""Maximum size of a YAML document."""
MAX_DEPTH = 50
"""Maximum nesting of a YAML document."""
MAX_NODES = 2**14
"""Maximum number of values in a YAML document, with those behind an alias counted at each use."""
MAX_DIGITS = 100
"""Maximum length of a number in YAML."""
TOKENS = {
    "mapping values are not allowed here": "expected no colon here; indent keys like their neighbours, and quote "
    "a text with a colon",
    "found character '\\t' that cannot start any token": "expected spaces before a key, found a tab",
    "that cannot start any token": "that cannot begin a value: quote it",
    "could not find expected ':'": "expected a colon after the key",
    "<block end>": "the next key with the same indentation",
    "'<block mapping start>'": "a key with another indentation",
    "the node content": "a value",
    "'<stream end>'": "the end",
    "'<scalar>'": "a text",
    ", but found": ", found",
    ", but got": ", found",
}
"""What PyYAML calls the things that it expects and finds, in plain words."""


class _BoundedLoader(yaml.SafeLoader):
    """Loader of plain YAML: bounded, without cycles, tags and repeated keys, which PyYAML takes."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.count = 0
        self.sizes = dict[str, int]()
        """Number of values behind each finished anchor."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        anchor, before, line = event.anchor, self.count, event.start_mark.line + 1
        self.count += 1
        if isinstance(event, yaml.AliasEvent):
            # An unknown one is reported by PyYAML.
            if anchor in self.anchors and anchor not in self.sizes:
                raise ValueError(f"*{anchor} contains itself, in line {line}")
            self.count += self.sizes.get(anchor, 0)
        elif event.tag is not None:
            raise ValueError(f"it has the tag {event.tag} in line {line}")
        self.depth += 1
        if self.depth > MAX_DEPTH or self.count > MAX_NODES:
            limit = f"{MAX_DEPTH} levels" if self.depth > MAX_DEPTH else f"{MAX_NODES} values"
            raise ValueError(f"it has over {limit}, in line {line}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.ScalarNode):
            if node.tag.endswith((":int", ":float")) and len(node.value) > MAX_DIGITS:
                raise ValueError(f"it has a number of over {MAX_DIGITS} digits in line {line}")
            node.value.encode()  # raises UnicodeEncodeError, a ValueError, for what no text may hold
        if anchor is not None and not isinstance(event, yaml.AliasEvent):
            self.sizes[anchor] = self.count - before
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set[Any]()
        for key_node, _ in node.value:
            if key_node.tag != "tag:yaml.org,2002:merge":
                key = self.construct_object(key_node, deep=True)
                # PyYAML reports a key that is a section or a list.
                if isinstance(key, Hashable) and key in keys:
                    raise ValueError(f"{key} is given twice, the second time in line {key_node.start_mark.line + 1}")
                keys |= {key} if isinstance(key, Hashable) else set()
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Parse plain YAML; raises ValueError, in one line, for anything else and for what exceeds the limits."""
    try:
        if len(text) > MAX_YAML_BYTES:
            raise ValueError(f"it has over {MAX_YAML_BYTES} bytes")
        return _BoundedLoader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        raise ValueError(_describe_marked(error)) from error
    except yaml.reader.ReaderError as error:
        raise ValueError(f"it holds the character U+{error.character:04X} at position {error.position}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _describe_marked(error: yaml.MarkedYAMLError) -> str:
    """Describe an error of PyYAML: where, as people count lines and columns, what was expected, and what was found."""
    text, mark, start = error.problem or "", error.problem_mark or error.context_mark, error.context_mark
    if text == "second occurrence":
        text = (error.context or "").partition(";")[0]
    for token, words in TOKENS.items():
        text = text.replace(token, words)
    if start is not None and mark is not None and start.line != mark.line:
        text += f", in what begins in line {start.line + 1}"
    return text if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: {text}"


def read_yaml(path: Path) -> Any:
    """Parse the YAML file at ``path``; raises OSError if it cannot be read, and ValueError as ``parse_yaml`` does."""
    with path.open("rb") as file:
        data = file.read(MAX_YAML_BYTES + 1)
    try:
        return parse_yaml(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: expected text in UTF-8") from error


def parse_json(data: str | bytes) -> Any:
    """Parse JSON; raises ValueError for anything else, and for too deep a nesting."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
