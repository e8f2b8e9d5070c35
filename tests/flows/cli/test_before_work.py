"""Checks before work: what is wrong is said before any server, network or file of the work is touched."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from tests.builders.command_line import CommandLine, one_after_the_other
from tests.builders.http_server import serving
from tests.builders.shapes import blob
from tests.builders.small_models import write_model

MODEL = "--model m.safetensors"
REQUESTS = {
    "column.csv": "name,prompt\n1,2\n",
    "size.csv": "label,size\ncat,9by9\n",
    "empty.csv": "label\n\n",
    "lines.jsonl": '{"label": "cat"}\n{"label": \n',
    "table.parquet": "no Parquet",
    "table.xlsx": "label\ncat\n",
}
WRITERS = (
    f"sample {MODEL} --out {{}}",
    f"edit img2img one.png {MODEL} --out {{}}",
    f"edit inpaint one.png --mask one.png {MODEL} --out {{}}",
    f"edit interpolate 3 {MODEL} --out {{}}",
    f"edit upscale one.png {MODEL} --out {{}}",
    "edit interpolate 3 --out {}",
    f"model export --to diffusers {MODEL} --out {{}}",
    "model export --to diffusers --out {}",
    "model export --to adapter --out {}",
    "model explain --out {}",
    "model import pets --licence CC0-1.0 --out {}/m.safetensors",
    "reproduce s3://bucket/samples/faces/1/batch --out {}",
    "sign s3://bucket/samples/faces/1/batch --out {}",
    "server backup {}",
)
MISTAKES = (
    *(verb.format(place) for verb in WRITERS for place in ("one.png/deeper", "/proc/darkroom")),
    *(f"model export --to {kind} {model} --out pets" for kind in ("diffusers", "adapter") for model in ("", MODEL)),
    *(f"sample --requests {name}" for name in (*REQUESTS, "nosuch.csv")),
    *(
        f"{verb} --to {place}"
        for verb in ("sample", "retrain pets")
        for place in ("images", "/tmp/x", "s3://A", "s3:/b/c")
    ),
    *(f"edit img2img {name}" for name in ("nosuch.png", "notes.txt", "pets")),
    *(f"edit inpaint one.png --mask {name}" for name in ("nosuch.png", "notes.txt")),
    "edit upscale notes.txt",
    "sign s3://bucket/batch --out signed --parent notes.txt",
    *(
        f"{verb} {model}"
        for verb in ("sample", "evaluate")
        for model in ("--model nosuch.safetensors", "--model faces")
    ),
    "ui --model notes.safetensors",
    "server restore nosuch",
    "deploy --cron nightly",
    "deploy --monitor-cron 25",
    *(f"{verb} {place}" for verb in ("trace", "reproduce") for place in ("s3://bucket", "s3://B/x", "one.png")),
    "ingest wds:nosuch.tar",
    "ingest parquet:nosuch.parquet",
    "retrain wds:nosuch.tar",
    "sweep --over bogus=1",
    *(f"{verb} --size 64by64" for verb in ("sample", "edit img2img one.png", "edit interpolate 3")),
)
CONNECTED = (
    "ls models",
    "ls batches",
    "ingest pets",
    "retrain pets --set ingest.held_out=0.5",
    "promote --to 1",
    "evaluate --model models:/pets/1",
    "sample",
    "edit interpolate 3",
    "edit img2img one.png",
    "model history",
    "model rollback",
    "model card",
    "model explain",
    "model export --to diffusers --out new",
    "model import m.safetensors --name faces --licence CC0-1.0",
    "trace s3://bucket/samples/faces/1/batch",
    "reproduce s3://bucket/samples/faces/1/batch",
    "verify s3://bucket/samples/faces/1/batch --untrusted",
    "deploy",
    "monitor",
    "gc",
    "ui",
    "data checkout abcd",
    "data remove cat* --reason x --yes",
)


@pytest.fixture
def folder(no_servers: None, tmp_path: Path) -> Path:
    """A folder with images, a model and a configuration."""
    for name in ("pets/cat/1.png", "pets/dog/2.png", "one.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        blob(1).save(tmp_path / name)
    write_model(tmp_path / "m.safetensors", seed=0, images=1)
    for name, text in {"notes.txt": "no image", "notes.safetensors": "no model", **REQUESTS}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "params.yaml").write_text("training: {dataset: pets}\n")
    return tmp_path


@pytest.fixture
def requests(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the servers of the environment were asked."""
    paths: list[str] = []

    class Recording(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(500)

        def do_POST(self) -> None:
            self.do_GET()

        def do_PUT(self) -> None:
            self.do_GET()

        def do_HEAD(self) -> None:
            self.do_GET()

    with serving(Recording) as url:
        for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.setenv(name, url)
        yield paths


@pytest.mark.parametrize("words", MISTAKES)
def test_mistake_is_found_without_a_server_and_leaves_nothing(
    folder: Path, requests: list[str], command_line: CommandLine, words: str
) -> None:
    before = sorted(folder.rglob("*"))
    code, out, err = command_line.answer(*words.split(), "--json")
    assert code == 2, err
    assert err.count("\n") == 1
    assert json.loads(out)["exit_code"] == 2
    assert requests == []
    assert sorted(folder.rglob("*")) == before


@pytest.mark.slow
def test_dead_servers_are_found_before_their_clients_are_imported(folder: Path) -> None:
    servers = dict.fromkeys(("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "AWS_ENDPOINT_URL_S3"), "http://127.0.0.1:9")
    hasty = "from flows.local_stack import http_api; http_api.RESTART_SECONDS = 0"
    process = one_after_the_other(folder, CONNECTED, ("torch", "mlflow", "prefect"), hasty, **servers)
    assert process.stdout.splitlines() == ["1"] * len(CONNECTED), process.stderr
    lines = process.stderr.splitlines()
    assert len(lines) == len(CONNECTED)
    assert all("does not answer" in line and "127.0.0.1:9" in line for line in lines), lines
