"""dvc.yaml on a laptop: the same steps as the flows, with no server up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from diffusion.common.errors import UserError
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from flows.datasets.dvc import data_version, record_data
from tests.builders import ROOT
from tests.builders.command_line import output_of, without_servers
from tests.builders.hostile_texts import YAML
from tests.builders.shapes import blob
from tests.builders.workspace import PARAMS


def test_data_sets_outside_dvc_yaml_get_their_own_pointer(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    for name in (".gitignore", "data/.gitignore"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text((ROOT / name).read_text())
    folder = Path("data/other")
    assert data_version(folder) is None
    ingest(folder, IngestConfig(source=str(images), size=8))
    version = record_data(folder, push_to=None)
    assert version.digest.endswith(".dir")
    assert version.pointer == "data/other.dvc"
    assert record_data(folder, push_to=None) == version
    assert data_version(folder) == version
    blob(99).save(images / "another.png")
    ingest(folder, IngestConfig(source=str(images), size=8))
    # As a kill leaves DVC's table of locks, which is written in place.
    Path(".dvc/tmp/rwlock").write_text('{"write": {')
    assert record_data(folder, push_to=None).pointer == "data/other.dvc"


def test_repositories_killed_at_creation_are_whole(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").write_text("x")
    code = "from pathlib import Path; from flows.datasets.dvc import record_data; record_data(Path('data'), None)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path) as process:
        while not (tmp_path / ".dvc").exists():
            assert process.poll() is None
        process.kill()
    with Repo(str(tmp_path)) as repo:
        assert repo.config["core"]["no_scm"]


@pytest.mark.parametrize("file", ["dvc.yaml", "dvc.lock", "data/other.dvc"])
@pytest.mark.parametrize(
    "what", ["a NUL", "a text", "a number of 6,000 digits", "indented sections that are nested too deeply"]
)
def test_hostile_files_of_dvc_are_errors_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Repo.init(str(tmp_path), no_scm=True).close()
    Path("data/other").mkdir(parents=True)
    Path("data/other/manifest.json").write_text("{}")
    Path("dvc.yaml").write_text("stages: {ingest: {cmd: echo, outs: [data/other]}}")
    Path(file).write_bytes(YAML[what])
    for read in (data_version, lambda folder: record_data(folder, push_to=None)):
        with pytest.raises(UserError):
            read(Path("data/other"))


@pytest.mark.parametrize(
    "params", [(ROOT / "params.yaml").read_text(), "training: {dataset: x}\n"], ids=["project", "least"]
)
def test_dvc_repro_needs_no_optional_params_section(tmp_path: Path, params: str) -> None:
    Repo.init(str(tmp_path), no_scm=True).close()
    (tmp_path / "params.yaml").write_text(params)
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    dataset = yaml.safe_load(params)["training"]["dataset"]
    for folder in ("data", "runs", "reports"):
        (tmp_path / folder / dataset).mkdir(parents=True)
    command = [sys.executable, "-m", "dvc", "repro", "--dry"]
    planned = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert planned.returncode == 0, planned.stderr
    assert [f"darkroom {stage} --local" in planned.stdout for stage in ("ingest", "train", "evaluate")] == [True] * 3


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_repro_metrics_and_plots_work_without_servers_and_agree_with_the_flow(tmp_path: Path) -> None:
    params = {**PARAMS, "ingest": {**PARAMS["ingest"], "source": "images"}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    for number in range(72):
        path = tmp_path / "images" / ("even" if number % 2 == 0 else "odd") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        blob(number).save(path)
    scripts = Path(sys.executable).parent
    variables = without_servers(PATH=f"{scripts}:{os.environ['PATH']}", DVC_NO_ANALYTICS="1")

    def run(*command: str) -> str:
        return output_of(command, cwd=tmp_path, env=variables)

    run("git", "init", "-q")
    run("dvc", "init", "-q")
    run("dvc", "repro")
    assert "kid_efflite0" in run("dvc", "metrics", "show")
    run("git", "add", "dvc.lock", "dvc.yaml", "params.yaml", ".dvc")
    run("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "first")

    again = run("dvc", "repro")
    assert "Stage 'train' didn't change, skipping" in again
    assert "Stage 'evaluate' didn't change, skipping" in again

    final = (tmp_path / "runs" / "blobs" / "final.safetensors").read_bytes()
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({**params, "training": {**params["training"], "seed": 9}}))
    run("dvc", "repro")
    assert (tmp_path / "runs" / "blobs" / "final.safetensors").read_bytes() != final
    assert "file://" in run("dvc", "plots", "diff", "HEAD")
    run("dvc", "metrics", "diff", "HEAD")

    before = (tmp_path / "dvc.lock").read_text()
    lock = yaml.safe_load(before)["stages"]["ingest"]["outs"][0]["md5"]
    cwd = Path.cwd()
    try:
        os.chdir(tmp_path)
        assert record_data(Path("data/blobs"), push_to=None).digest == lock
        with Repo() as repo:
            assert "train" not in repo.status()
    finally:
        os.chdir(cwd)
