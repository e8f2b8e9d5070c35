"""Wrong input: fifty things that users type; each ends with exit code 2 and one line, before anything slow begins."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from tests.builders.command_line import CommandLine, one_after_the_other
from tests.builders.shapes import blob


@pytest.fixture
def folder(tmp_path: Path, no_servers: None) -> Path:
    """A folder of things to get wrong, in which no server is known."""
    for name in ("pets/cat", "pets/dog", "empty", "notes"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("pets/cat/1.png", "pets/dog/2.png", "one.png"):
        blob(1).save(tmp_path / name)
    (tmp_path / "notes" / "a.txt").write_text("no image")
    (tmp_path / "text.safetensors").write_text("this is no model")
    (tmp_path / "params.yaml").write_text("training:\n  dataset: pets\n  minutes: 3\n")
    for name, text in {"bad": "training: [", "list": "- a", "typo": "trainning: {}"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


MISTAKES = """
nonsense
ingest one another
ingest nosuch
ingest nosuch --local
ingest empty
ingest notes --local
ingest hf://user/set
ingest hf://datasets/user/set?colour=red
ingest https://example.org/a.zip
ingest one.png
ingest text.safetensors
ingest hf:Nope
ingest pets --set ingest.size=4
ingest pets --set ingest.sise=32
ingest pets --dataset ../x
train
train --dataset nope --local
train --dataset nope --dry-run
train --dry-run --restart
train --dataset pets --set model.attention=5 --dry-run
train --no-such-option
train --set training.images
train --set training.images=abc
train --set training.images=8000 --set training.minutes=2
train --set model.family=transformer
train --set preset=best
train --params missing.yaml
train --params bad.yaml
train --local --params missing.yaml
train --dry-run --params .
train --params list.yaml
train --params typo.yaml
evaluate
promote
promote --reason x
promote --to 0
promote --to 1 --model models:/faces/1
promote --model m.safetensors
evaluate --model models:/faces/1 --local
sample --count many
sample --count 0
sample --seed -1
sample --size 64
sample --model text.safetensors --size 64
edit img2img one.png --size 64 --model m.safetensors
sample --model text.safetensors
sample --model one.png
sample --out here
retrain nosuch
retrain pets --label bird
retrain pets --prompt x
retrain pets --set model.text=true
retrain pets --set model.low_resolution=14 --count 3
retrain --version abcd pets
retrain --version abcd
sweep
sweep --over training.learning_rate
sweep --over ingest.size=8,16
sweep --over training.lr=1,2
sweep --over training.seed=1,2 --dry-run
compare --family nope
compare --family ddpm
distill --local
data show --dataset nope
data remove
data remove cat* --dataset nope --reason x
model history
model import nosuch.safetensors --name faces
model import nosuch --out m.safetensors
model import user/tiny --out m.safetensors
model import pets --out m.safetensors
model import one.png --out m.safetensors --licence CC0-1.0
model import text.safetensors --out m.safetensors --licence CC0-1.0
model import text.safetensors
model import text.safetensors --name ../x
model import text.safetensors --out m
model card --model faces
model export --to onnx --out x
model export --to diffusers --model text.safetensors --out x
model export --to diffusers --model text.safetensors --out x --push user/set
model export --to diffusers --model text.safetensors --out x --public
edit img2img one.png --strength nan --model m.safetensors
edit inpaint one.png --mask one.png --resample-steps 1000 --model m.safetensors
edit interpolate
trace nosuch.png
server health foo
deploy
gc --set retention.grace_hours=-1
init pets
config validate --params typo.yaml
ls nonsense
ls models
open nowhere
open report
open mlflow
"""


@pytest.mark.parametrize("words", MISTAKES.strip().splitlines())
def test_a_mistake_is_one_line_and_exit_code_2(folder: Path, command_line: CommandLine, words: str) -> None:
    before = sorted(folder.rglob("*"))
    code, out, err = command_line.answer(*words.split(), "--json")
    assert code == 2, err
    [line] = err.splitlines()
    # One object on standard output, which says the same.
    assert json.loads(out) == {"error": line.removeprefix("darkroom: "), "exit_code": 2}
    assert sorted(folder.rglob("*")) == before


def test_mistakes_are_found_before_anything_slow_is_imported(folder: Path) -> None:
    mistakes = [
        "ingest nosuch",
        "train --dataset nope",
        "sample --model text.safetensors",
        "sample --model faces",
        "retrain pets --label bird",
        "sweep --over training.lr=1,2",
        "compare --family nope",
        "trace one.png",
    ]
    process = one_after_the_other(folder, mistakes, ("torch", "mlflow", "prefect", "dvc", "boto3"))
    assert process.stdout.splitlines() == ["2"] * len(mistakes), process.stdout


@pytest.mark.parametrize("words", ["", "data", "model --help", "config schema", "--version"])
def test_pipes_get_plain_text(folder: Path, monkeypatch: pytest.MonkeyPatch, words: str, capfd: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["darkroom", *words.split()])
    with pytest.raises(SystemExit):
        main()
    out, err = capfd.readouterr()
    assert out + err
    assert not set(out + err) & set("╭│╰\x1b")


def test_a_label_that_the_source_has_is_no_mistake(folder: Path, command_line: CommandLine) -> None:
    about = command_line.json("retrain", "pets", "--label", "cat", "--dry-run")
    assert about["ingest"]["survey"]["classes"] == {"cat": 1, "dog": 1}
