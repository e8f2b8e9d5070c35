"""Every regular expression of the two packages takes time in proportion to the text, whatever the text is.

They read names, labels, captions, READMEs, URLs and tables of strangers. The expressions are found in the source, and
texts that pump each of their repetitions are made from the expression itself.
"""

import ast
import re
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from re import _compiler as compiler  # type: ignore[attr-defined]
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, NamedTuple

import pytest

from tests.builders import ROOT

Item = tuple[Any, Any]
MODULES = sorted(path for package in ("diffusion", "flows") for path in (ROOT / package).rglob("*.py"))
METHODS = ("match", "search", "fullmatch", "sub", "subn", "split", "findall", "finditer")
BUILT = {
    "diffusion/data/ingest/decode.py: signature": "of a constant table, on 16 bytes",
    "diffusion/data/loader.py: f'(?:.*/)?{translate(pattern)}'": "fnmatch's, after each slash of a limited name",
    "diffusion/diffusers_format/import_lora.py: f'{pattern.pattern}$'": "of a constant table, at the end of a key",
    "diffusion/data/versions/takedown_records.py: fnmatch.translate(pattern)": "fnmatch's, which does not backtrack",
    "flows/config.py: f'\\\\b{re.escape(key)}\\\\b'": "a literal",
}
"""Expressions that are made while the program runs, and why they may be."""
LENGTHS = (16, 20, 24, 500, 4000, 10_000, 40_000)
MAX_SECONDS = 0.3
"""CPU time for each text. Of 40,000 characters, linear expressions take milliseconds, quadratic ones many seconds."""
CHARACTERS = (*map(chr, range(32, 127)), "\n", "\t", "é", "\ufeff", "\x00", "\ud800")


class Use(NamedTuple):
    place: str
    pattern: str | bytes
    flags: int
    method: str


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def names_of(path: Path) -> dict[str, Any]:
    """Constants of a module by name, found without importing it: texts, and expressions that are made of them."""
    found: dict[str, Any] = {"re": re}
    for statement in tree_of(path).body:
        match statement:
            case ast.ImportFrom(module=str(module), names=imported):
                other = ROOT / f"{module.replace('.', '/')}.py"
                if other in MODULES:
                    found |= {
                        each.name: names_of(other)[each.name] for each in imported if each.name in names_of(other)
                    }
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                found[name] = evaluate(value, found)
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                found |= {target.id: evaluate(value, found) for target, value in zip(targets, values, strict=True)}  # type: ignore[attr-defined]
    return found


def evaluate(node: ast.expr, names: dict[str, Any]) -> Any:
    """The value of an expression of constants and ``re``; None if it has anything else in it."""
    try:
        value = eval(compile(ast.Expression(node), "", "eval"), {"__builtins__": {}}, names)
    except Exception:  # noqa: BLE001 (whatever it is, it is not such an expression)
        return None
    return value if isinstance(value, str | bytes | re.Pattern | re.RegexFlag) else None


def find_uses() -> tuple[list[Use], list[str]]:
    """All uses, and the places whose expressions are made while the program runs."""
    uses, unknown, used = [], [], set()
    compiled = {}
    for path in MODULES:
        names, place = names_of(path), str(path.relative_to(ROOT))
        compiled |= {(each.pattern, each.flags): place for each in names.values() if isinstance(each, re.Pattern)}
        for call in ast.walk(tree_of(path)):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            owner, method = call.func.value, call.func.attr
            if isinstance(owner, ast.Name) and owner.id == "re" and method in (*METHODS, "compile"):
                pattern = evaluate(call.args[0], names)
                arguments = (evaluate(getattr(each, "value", each), names) for each in (*call.args[1:], *call.keywords))
                flags = sum(each for each in arguments if isinstance(each, re.RegexFlag))
                if pattern is None:
                    unknown.append(f"{place}: {ast.unparse(call.args[0])}")
                elif method != "compile":
                    uses.append(Use(place, pattern, int(flags), method))
            elif method in METHODS and isinstance(pattern := evaluate(owner, names), re.Pattern):
                uses.append(Use(place, pattern.pattern, pattern.flags, method))
                used.add((pattern.pattern, pattern.flags))
    others = [Use(place, *key, "search") for key, place in compiled.items() if key not in used]
    return uses + others, unknown


def children(item: Item) -> list[Sequence[Item]]:
    """The sequences inside an item."""
    code, value = item
    if code in (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT):
        return [value[2]]
    if code is codes.BRANCH:
        return list(value[1])
    if code in (codes.SUBPATTERN, codes.ATOMIC_GROUP):
        return [value[-1] if code is codes.SUBPATTERN else value]
    return []


def characters(sequence: Sequence[Item], flags: int) -> Iterator[set[str]]:
    """What each item of one character stands for, among CHARACTERS."""
    for item in sequence:
        if item[0] in (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN):
            single = compiler.compile(parser.SubPattern(parser.State(), [item]), flags)
            yield {each for each in CHARACTERS if single.fullmatch(each)} or {chr(item[1])}
        for child in children(item):
            yield from characters(child, flags)


def example(sequence: Sequence[Item], flags: int) -> str:
    """A short text that the sequence matches, but for assertions."""
    text = ""
    for item in sequence:
        inside = children(item)
        if inside:
            text += example(inside[0], flags) * (item[1][0] if "REPEAT" in str(item[0]) else 1)
        else:
            text += "".join(min(each) for each in characters([item], flags))
    return text


def pumps(sequence: Sequence[Item], alphabet: Sequence[str], flags: int, prefix: str = "") -> Iterator[tuple[str, str]]:
    """What leads to each repetition without an upper bound, and what can be repeated there."""
    for item in sequence:
        for child in children(item):
            yield from pumps(child, alphabet, flags, prefix)
            if "REPEAT" in str(item[0]) and item[1][1] > 100:
                yield prefix, example(child, flags)
                inside = set().union(*characters(child, flags))
                yield from ((prefix, each) for each in alphabet if each in inside)
        prefix += example([item], flags)


def texts(pattern: str, flags: int, length: int) -> Iterator[str]:
    tree = parser.parse(pattern, flags)
    groups = list(characters(tree, tree.state.flags))
    # One character of each kind that the expression tells apart.
    kinds = {tuple(each in group for group in groups): each for each in reversed(CHARACTERS)}
    for prefix, unit in dict.fromkeys(pumps(tree, list(kinds.values()), tree.state.flags)):
        for start, end in ((prefix, ""), (prefix, "\x00"), ("", "\x00")):
            yield start + unit * (length // max(len(unit), 1)) + end


def seconds(use: Use, text: str) -> float:
    expression = re.compile(use.pattern, use.flags)
    arguments = ("", text) if use.method in ("sub", "subn") else (text,)
    start = time.thread_time()
    result = getattr(expression, use.method)(*arguments)
    if use.method == "finditer":
        list(result)
    return time.thread_time() - start


def slowest(use: Use) -> tuple[float, str]:
    """CPU seconds of the slowest text, and how it begins; of the shortest length at which one is too slow."""
    worst = 0.0, ""
    for length in LENGTHS:
        for text in texts(use.pattern, use.flags, length):
            worst = max(worst, (seconds(use, text), text[:40]))
            if worst[0] > MAX_SECONDS:
                return worst
    return worst


def test_no_expression_takes_more_than_linear_time() -> None:
    uses, built = find_uses()
    assert len(uses) > 40
    assert set(built) == BUILT.keys()
    distinct = {use[1:]: use for use in uses}.values()
    assert [(use, text) for use in distinct for duration, text in [slowest(use)] if duration > MAX_SECONDS] == []


@pytest.mark.parametrize(
    ("pattern", "method"),
    [
        (r"\ufeff?---\s*?\n(.*?)^---\s*$", "match"),
        (r"(a+)+$", "match"),
    ],
)
def test_expressions_of_more_than_linear_time_are_found(pattern: str, method: str) -> None:
    flags = int(re.DOTALL | re.MULTILINE) if pattern.startswith(r"\ufeff") else 0
    assert slowest(Use("", pattern, flags, method))[0] > MAX_SECONDS
