"""``darkroom model export`` of a file: no server, one object, one line per mistake."""

import json
import subprocess
import sys
from pathlib import Path

from tests.builders.command_line import darkroom
from tests.builders.small_models import write_model


def test_a_file_is_exported_without_any_server(tmp_path: Path) -> None:
    write_model(tmp_path / "final.safetensors", seed=0, images=64)
    words = ("--to", "diffusers", "--model", "final.safetensors", "--out", "exports/blobs", "--json")
    done = darkroom(tmp_path, "model", "export", *words, "--set", "sampling.sampler=ddim", "--set", "sampling.steps=20")
    assert done.returncode == 0, done.stderr
    about = json.loads(done.stdout)
    assert (about["to"], about["folder"], about["pipeline"]) == ("diffusers", "exports/blobs", "DDIMPipeline")
    assert all((tmp_path / "exports" / "blobs" / name).is_file() for name in about["files"])
    index = json.loads((tmp_path / "exports" / "blobs" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]


def test_mistakes_are_named_before_anything_is_written(tmp_path: Path) -> None:
    write_model(tmp_path / "final.safetensors", seed=0, images=64)
    out = ("--out", "exports")
    for words, told in (
        (("--to", "onnx", "--model", "final.safetensors"), "'onnx' is not"),
        (("--to", "diffusers", "--model", "models:/blobs@champion"), "run `darkroom up`"),
        (("--to", "diffusers", "--model", "missing.safetensors"), "no model at missing.safetensors"),
        (("--to", "diffusers"), "run `darkroom up`"),
    ):
        done = darkroom(tmp_path, "model", "export", *words, *out)
        assert (done.returncode, told in " ".join(done.stderr.split()), done.stdout) == (2, True, ""), done.stderr
    assert not (tmp_path / "exports").exists()


def test_only_the_export_itself_imports_diffusers() -> None:
    script = (
        "import sys, diffusion.diffusers_format.export, flows.cli.model_commands; print('diffusers' in sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == ["False"]
