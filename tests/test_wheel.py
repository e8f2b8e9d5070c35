"""The built package in an environment with its core dependencies and nothing of the extras."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from PIL import Image

import diffusion
from tests.builders import ROOT
from tests.builders.virtual_environments import environment

pytestmark = pytest.mark.slow
EXTRAS = ("boto3", "dvc", "matplotlib", "mlflow", "pandas", "prefect", "scipy", "torchvision", "torch_fidelity")
MODEL = ROOT / "examples" / "emoji.safetensors"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A copy, as a build writes into its source.
    source = tmp_path_factory.mktemp("source")
    for name in ("diffusion", "flows"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(source / "dist"), "."]
    subprocess.run(command, cwd=source, check=True)
    [path] = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel and what its core requires."""
    with ZipFile(wheel) as archive:
        [metadata] = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = re.findall(r"^Requires-Dist: (.*)$", archive.read(metadata).decode(), re.MULTILINE)
    core = [line for line in lines if "extra ==" not in line]
    programs = environment(tmp_path_factory.mktemp("installed") / "venv", core)
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    return programs


def run(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, check=False, env={})


def test_the_wheel_has_its_data_its_licence_and_the_one_version(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert wheel.name == f"darkroom_diffusion-{diffusion.__version__}-py3-none-any.whl"
    data = [path for name in ("diffusion", "flows") for path in (ROOT / name).rglob("*") if path.suffix != ".pyc"]
    assert {str(path.relative_to(ROOT)) for path in data if path.is_file()} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_core_loads_a_model_and_generates(installed: Path, tmp_path: Path) -> None:
    script = f"""
import diffusion, importlib.util, sys
assert diffusion.__file__.startswith({str(installed.parent)!r}), diffusion.__file__
for name in {EXTRAS!r}:
    assert importlib.util.find_spec(name) is None, name
model = diffusion.load({str(MODEL)!r}, compute_batch=4)
for number, image in enumerate(model.generate(count=2, seed=7, steps=4)):
    image.save(f"{{number}}.png")
try:
    diffusion.evaluate("faces")
except diffusion.common.errors.UserError as error:
    print(error)
"""
    result = run(installed / "python", "-c", script, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "[evaluation]" in result.stdout
    ours = diffusion.load(MODEL, compute_batch=4).generate(count=2, seed=7, steps=4)
    theirs = [Image.open(tmp_path / f"{number}.png") for number in range(2)]
    assert [each.tobytes() for each in theirs] == [each.tobytes() for each in ours]


def test_the_core_has_the_commands_that_need_no_server(installed: Path, tmp_path: Path) -> None:
    darkroom = installed / "darkroom"
    settings = ["--set", "sampling.steps=4", "--set", "sampling.compute_batch=4", "--out", "out", "--json"]
    result = run(darkroom, "sample", "--model", MODEL, "--count", "2", *settings, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    images = sorted(str(path) for path in (tmp_path / "out").glob("0*.png"))
    assert len(images) == json.loads(result.stdout)["count"] == 2

    (tmp_path / "images").mkdir()
    for number in range(40):
        Image.new("L", (8, 8), 6 * number).save(tmp_path / "images" / f"{number}.png")
    data = ["--local", "--dataset", "tones", "--set"]
    result = run(darkroom, "ingest", "images", *data, "ingest.size=8", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    few = ["training.images=64", "--set", "training.batch_size=32", "--set", "model.width=16"]
    result = run(darkroom, "train", *data, *few, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / "tones" / "final.safetensors").is_file()


@pytest.mark.parametrize("command", ["retrain images", "status", "model history", "gc"])
def test_other_commands_name_the_missing_extra(installed: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "images").mkdir()
    Image.new("L", (32, 32)).save(tmp_path / "images" / "0.png")
    (tmp_path / "params.yaml").write_text("training: {dataset: tones}\n")
    result = run(installed / "darkroom", *command.split(), folder=tmp_path)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "[pipeline]" in result.stderr
