"""Labels, captions and names of files from strangers: a terminal and a page show them and obey none of them."""

import ast
import io
import json
import re
import unicodedata
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from diffusion.common.escaping import escape_controls, escape_markdown, python_literal
from diffusion.diffusers_format.export import export_to_diffusers
from diffusion.process.samplers import sampling_config
from flows.tracking.console import Bars, Lines
from tests.builders.command_line import Answer, CommandLine
from tests.builders.shapes import blob
from tests.builders.small_models import write_model

CLEAR, TURNED, LINES, QUOTED = "\x1b[2J\x1b]0;pwned\x07", "safe\u202egnp.exe", "a\nb\x9b31m\x00c", '"]*6); boom("'
HOSTILE = (CLEAR, TURNED, LINES, QUOTED, "[/red][bold]", "![x](https://example.org/x.png)|<marquee>")
ANY = st.text(st.characters(codec=None), max_size=40)
"""Also halves of surrogate pairs, as names of files that are no UTF-8 have them."""


def harmless(text: str) -> bool:
    """Whether a terminal shows ``text`` as it stands: no character but line ends controls or reorders anything."""
    turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return not any(
        (unicodedata.category(each) in ("Cc", "Cs", "Zl", "Zp") and each != "\n")
        or unicodedata.bidirectional(each) in turning
        for each in text
    )


@given(ANY)
def test_any_text_becomes_one_harmless_line_that_can_be_written(text: str) -> None:
    escaped_text = escape_controls(text)
    assert harmless(escaped_text)
    assert "\n" not in escaped_text
    escaped_text.encode()


@given(st.text(st.characters(categories=("L", "N", "P", "S", "M"))))
def test_ordinary_text_is_not_escaped(text: str) -> None:
    assert escape_controls(text) == text


@given(ANY)
def test_json_and_python_literals_are_escaped_without_loss(text: str) -> None:
    line = escape_controls(json.dumps({text: [text]}, ensure_ascii=False))
    assert harmless(line)
    assert json.loads(line) == {text: [text]}
    assert harmless(python_literal(text))
    assert ast.literal_eval(python_literal(text)) == text


@given(ANY.filter(str.strip))
def test_markdown_shows_any_text_as_it_is(text: str) -> None:
    reader = MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = reader.parse(f"| {escape_markdown(text)} | b |\n|---|---|\n")
    inline = [token for token in tokens if token.type == "inline"]
    assert tokens[0].type == "table_open"
    assert len(inline) == 2
    children = inline[0].children or []
    assert {child.type for child in children} <= {"text", "text_special"}
    assert "".join(child.content for child in children) == escape_controls(" ".join(text.split()))


@pytest.mark.parametrize("shown", [Lines, Bars])
def test_progress_shows_notes_and_lines_as_they_are(shown: Callable[[], Lines | Bars]) -> None:
    with redirect_stderr(io.StringIO()) as error:
        console = shown()
        for text in HOSTILE:
            console("work", 1, 2, text)
            console.write(text)
        console.close()
    for text in HOSTILE:
        assert escape_controls(text) in error.getvalue()


class Harmless(CommandLine):
    """Commands that say nothing but what is harmless, whatever it is about."""

    def answer(self, *words: object) -> Answer:
        answer = super().answer(*words)
        output = answer.out + answer.err
        assert harmless(output), output
        output.encode()
        assert "Traceback" not in output
        return answer


@pytest.fixture
def darkroom(
    no_servers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Harmless:
    """In a folder with images whose names, labels and captions are hostile, and files that are no images."""
    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for number, text in enumerate(HOSTILE * 8):
        blob(number).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "label": text, "text": f"caption {text}"})
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    # Beside metadata, files that it does not name are not looked at.
    others = tmp_path / "others" / TURNED
    others.mkdir(parents=True)
    for number in range(8):
        blob(100 + number).save(others / f"{number}.png")
    for name in (CLEAR, TURNED, "line\nfeed", "\udcff\udc80"):
        (others / f"{name}.png").write_text("not an image")
    params = {"ingest": {"source": "images", "size": 8}, "training": {"dataset": "set"}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    return Harmless(monkeypatch, capsys)


@pytest.mark.slow
def test_commands_show_hostile_names_labels_and_captions_and_obey_none(darkroom: Harmless) -> None:
    first = darkroom.json("ingest", "--local")["digest"]
    others = ("--set", "ingest.source=others")
    assert darkroom("ingest", "--local", *others).count("quarantined: ") == 4
    assert darkroom.json("ingest", "--local", *others)["quarantined_count"] == 4
    output = darkroom("data", "show", "--all")
    assert f"  {escape_controls(CLEAR)}: 8" in output
    classes = darkroom.json("data", "show")["classes"]
    # A source with one folder alone has no classes.
    assert classes == dict.fromkeys(HOSTILE, 8)
    for command in (("log",), ("diff",), ("diff", "--json"), ("show", first[:12])):
        darkroom("data", *command)
    darkroom("data", "show", CLEAR, code=2)
    darkroom("ingest", "--local", "--set", f"ingest.source={json.dumps(CLEAR)}", code=2)
    darkroom("ingest", "--local", "--set", f"ingest.source={TURNED}\udcff", code=2)


def test_page_on_hostile_names_is_harmless(darkroom: Harmless, tmp_path: Path) -> None:
    from diffusion.evaluation.reports.dataset_report import write_dataset_report

    darkroom("ingest", "--local")
    page = tmp_path / "page.html"
    summary = write_dataset_report(tmp_path / "data" / "set", page)
    text = page.read_text()
    assert harmless(text)
    assert "<marquee>" not in text
    assert harmless(summary.markdown())


@pytest.mark.parametrize("label", HOSTILE)
def test_the_readme_of_an_export_has_a_python_literal(label: str, tmp_path: Path) -> None:
    weights = write_model(tmp_path / "w.safetensors", 1, 0, channels=1, size=8, classes={label: 3, "z": 2})
    export = export_to_diffusers(weights, tmp_path / 'folder "x', sampling_config(steps=4))
    text = (export.folder / "README.md").read_text()
    assert harmless(text)
    [example] = re.findall(r"```python\n(.*?)\n```", text, flags=re.DOTALL)
    calls = [node for node in ast.walk(ast.parse(example)) if isinstance(node, ast.Call)]
    assert len(calls) == 2
    arguments = {word.arg: ast.literal_eval(word.value) for call in calls for word in call.keywords}
    assert arguments["labels"][0] in (label, "z")
