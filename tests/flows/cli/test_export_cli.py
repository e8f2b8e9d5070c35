"""``darkroom model export`` of a file: no server, one object, one line per mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from diffusion.checkpoints import read_model_header
from tests.builders import pipelines
from tests.builders.adapters import write_adapter
from tests.builders.command_line import CommandLine, darkroom
from tests.builders.signing_keys import identity
from tests.builders.small_models import write_model
from tests.hub import TOKEN, Hub


@pytest.mark.slow
def test_a_file_is_exported_without_any_server(tmp_path: Path) -> None:
    write_model(tmp_path / "final.safetensors", seed=0, images=64)
    words = ("--to", "diffusers", "--model", "final.safetensors", "--out", "exports/blobs", "--json")
    result = darkroom(
        tmp_path, "model", "export", *words, "--set", "sampling.sampler=ddim", "--set", "sampling.steps=20"
    )
    assert result.returncode == 0, result.stderr
    about = json.loads(result.stdout)
    assert (about["to"], about["folder"], about["pipeline"]) == ("diffusers", "exports/blobs", "DDIMPipeline")
    assert all((tmp_path / "exports" / "blobs" / name).is_file() for name in about["files"])
    index = json.loads((tmp_path / "exports" / "blobs" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]


@pytest.mark.slow
@pytest.mark.long
def test_imported_pipeline_without_card_says_how_to_load(tmp_path: Path) -> None:
    (pipelines.ddpm(tmp_path / "made") / "README.md").unlink()
    result = darkroom(tmp_path, "model", "import", "made", "--out", "tiny.safetensors", "--licence", "CC0-1.0")
    assert result.returncode == 0, result.stderr
    result = darkroom(tmp_path, "model", "export", "--to", "diffusers", "--model", "tiny.safetensors", "--out", "copy")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == 'how to use it: diffusers.DDPMPipeline.from_pretrained("copy")'
    assert not (tmp_path / "copy" / "README.md").exists()


@pytest.mark.slow
def test_mistakes_are_named_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("training: {dataset: blobs}\n")
    write_model(tmp_path / "final.safetensors", seed=0, images=64)
    out = ("--out", "exports")
    for words, message in (
        (("--to", "onnx", "--model", "final.safetensors"), "'onnx' is not"),
        (("--to", "diffusers", "--model", "models:/blobs@champion"), "run `darkroom up`"),
        (("--to", "diffusers", "--model", "missing.safetensors"), "no model at missing.safetensors"),
        (("--to", "diffusers"), "run `darkroom up`"),
    ):
        result = darkroom(tmp_path, "model", "export", *words, *out)
        assert (result.returncode, message in " ".join(result.stderr.split()), result.stdout) == (2, True, ""), (
            result.stderr
        )
    assert not (tmp_path / "exports").exists()


@pytest.mark.slow
def test_only_the_export_itself_imports_diffusers() -> None:
    script = (
        "import sys, diffusion.diffusers_format.export, flows.cli.model_commands; print('diffusers' in sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == ["False"]


@pytest.mark.long
@pytest.mark.slow
def test_a_file_is_pushed_with_card_and_samples_once(tmp_path: Path, hub: Hub) -> None:
    write_model(tmp_path / "final.safetensors", seed=0, images=64)
    words = ("model", "export", "--to", "diffusers", "--model", "final.safetensors", "--out", "exports/blobs", "--json")
    push = (*words, "--push", "hf://me/blobs", "--licence", "CC0-1.0", "--set", "sampling.steps=2")
    for mistake, message in (
        (push, "HF_TOKEN"),
        ((*words, "--public"), "--push"),
        ((*words, "--push", "me/blobs"), "hf://OWNER/NAME"),
    ):
        result = darkroom(tmp_path, *mistake)
        assert (result.returncode, message in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "exports").exists()
    pushed = []
    for _ in range(2):
        result = darkroom(tmp_path, *push, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1")
        assert result.returncode == 0, result.stderr
        assert TOKEN not in result.stdout + result.stderr
        pushed.append(json.loads(result.stdout)["pushed"])
    repo = hub.repos["model", "me/blobs"]
    assert [each["created"] for each in pushed] == [True, False]
    assert {each["commit"] for each in pushed} == {repo.refs["main"]}
    card = repo.files["README.md"].decode()
    assert "license: cc0-1.0" in card
    assert 'from_pretrained("me/blobs")' in card
    samples = [path for path in repo.files if path.startswith("samples/")]
    assert len(samples) == 8
    assert all(path in card for path in samples)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


@pytest.mark.long
@pytest.mark.slow
def test_imported_pipeline_is_pushed_elsewhere_with_its_base(tmp_path: Path, hub: Hub) -> None:
    folder = pipelines.ddpm(tmp_path / "made")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.model("them/tiny", files, private=True)
    variables = {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "DARKROOM_HOME": str(tmp_path / "home")}
    result = darkroom(tmp_path, "model", "import", "hf://them/tiny", "--out", "tiny.safetensors", "--json", **variables)
    assert result.returncode == 0, result.stderr
    words = ("--to", "diffusers", "--model", "tiny.safetensors", "--out", "copy", "--push", "hf://me/copy")
    result = darkroom(tmp_path, "model", "export", *words, "--set", "sampling.steps=2", "--json", **variables)
    assert result.returncode == 0, result.stderr
    pushed = hub.repos["model", "me/copy"].files
    # All but its card.
    del files["README.md"]
    assert {path: pushed[path] for path in files} == files
    about = ModelCard(pushed["README.md"].decode()).data
    assert (about.base_model, about.license) == ("them/tiny", "openrail")


def test_a_lora_goes_out_and_comes_in_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_line: CommandLine
) -> None:
    monkeypatch.chdir(tmp_path)
    run = command_line
    pipelines.stable_diffusion(tmp_path / "made")
    run("model", "import", "made", "--out", "base.safetensors")
    write_adapter(tmp_path / "final.safetensors", tmp_path / "base.safetensors")
    lora = ("model", "export", "--to", "adapter", "--model", "final.safetensors")
    about = run.json(*lora, "--format", "kohya", "--trigger", "zwx", "--licence", "CC0-1.0", "--out", "exports/zwx")
    assert set(about["files"]) == {"zwx.safetensors", "README.md"}
    assert "zwx.safetensors" in (tmp_path / "exports" / "zwx" / "README.md").read_text()
    back = ("model", "import", "exports/zwx/zwx.safetensors", "--out", "back/zwx.safetensors")
    about = run.json(*back, "--base", "base.safetensors")
    assert about["origin"]["licence"] == "CC0-1.0"  # the file's own
    header = read_model_header(tmp_path / "back" / "zwx.safetensors")
    assert header.adapter == read_model_header(tmp_path / "final.safetensors").adapter
    for words, message in (
        ((*back,), "--base"),
        ((*back, "--base", "models:/painter/1"), "registered"),
        ((*back, "--base", "final.txt"), "models:/"),
        ((*back, "--base", "base.safetensors", "--config", "made"), "--config"),
        (("model", "import", "made", "--out", "x.safetensors", "--config", "nowhere"), "does not exist"),
        ((*lora[:3], "diffusers", *lora[4:], "--format", "kohya", "--out", "x"), "--to adapter"),
        ((*lora, "--format", "onnx", "--out", "x"), "onnx"),
    ):
        assert message in run.mistake(*words), words


def test_the_command_line_signs_an_export_and_verifies_it_offline(
    no_servers: None, tmp_path: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = command_line.answer
    write_model(tmp_path / "final.safetensors", seed=0, images=64)
    alice = identity(tmp_path / "alice", passphrase="open sesame")
    words = ("model", "export", "--to", "diffusers", "--model", "final.safetensors", "--out", "ex/blobs", "--json")
    monkeypatch.setenv("DARKROOM_SIGNING_KEY", str(alice.key))
    assert run(*words, "--sign")[0] == 2
    assert not (tmp_path / "ex").exists()
    monkeypatch.setenv("DARKROOM_SIGNING_KEY_PASSPHRASE", "open sesame")
    code, out, errors = run(*words, "--sign")
    assert code == 0, errors
    assert json.loads(out)["signature"] == "ex/blobs.sig"
    assert {path.name for path in (tmp_path / "ex").iterdir()} == {"blobs", "blobs.sig"}
    verify = ("verify", "ex/blobs", "--key", str(alice.public))
    code, out, errors = run(*verify, "--json")
    assert code == 0, errors
    about = json.loads(out)
    assert (about["verified"], about["trusted"]) == (True, True)
    assert [each["kind"] for each in about["checks"]] == ["model"]
    added = tmp_path / "ex" / "blobs" / "added.txt"
    added.write_text("more")
    code, out, errors = run(*verify)
    assert (code, "added.txt was added" in errors) == (3, True), errors
    added.unlink()
    (tmp_path / "ex" / "blobs.sig").unlink()
    assert run(*verify)[0] == 2
