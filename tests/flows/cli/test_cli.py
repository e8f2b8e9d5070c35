"""The command line: quick to answer, one line per mistake, one object per --json."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import flows.cli
from flows.cli.command import CommandOutput, command
from tests.builders import ROOT
from tests.builders.command_line import darkroom

COMMANDS = (
    *("ingest", "train", "evaluate", "promote", "sample", "retrain", "sweep", "compare", "distill"),
    *("trace", "reproduce", "deploy", "monitor", "gc", "up", "down", "status", "env", "init", "ls", "open"),
)
GROUPS = {
    "data": ("log", "show", "diff", "checkout", "curate", "remove"),
    "model": ("history", "rollback", "explain", "export", "card", "import"),
    "edit": ("inpaint", "img2img", "interpolate", "upscale"),
    "config": ("show", "schema", "validate"),
    "server": ("up", "down", "status", "env", "health", "backup", "restore"),
}
WITHOUT_EXAMPLE = {"status", "down"}
"""Commands that take nothing but --json."""


def test_help_lists_every_command(tmp_path: Path) -> None:
    output = darkroom(tmp_path, "--help")
    assert output.returncode == 0
    assert [name for name in (*COMMANDS, *GROUPS) if f"\n  {name} " not in output.stdout] == []
    assert not set(output.stdout) & set("│╭─")
    for group, commands in GROUPS.items():
        output = darkroom(tmp_path, group, "--help")
        assert [name for name in commands if f"\n  {name} " not in output.stdout] == []


def test_help_of_a_command_shows_json_and_an_example() -> None:
    app = typer.main.get_command(flows.cli.app)
    assert isinstance(app, typer.core.TyperGroup)
    groups = {name: app.commands[name] for name in GROUPS}
    assert {name: set(group.commands) for name, group in groups.items()} == {  # type: ignore[attr-defined]
        name: set(commands) for name, commands in GROUPS.items()
    }
    commands = [app.commands[name] for name in COMMANDS]
    commands += [each for group in groups.values() for each in group.commands.values()]  # type: ignore[attr-defined]
    for each in commands:
        assert any("--json" in option.opts for option in each.params), each.name
        assert each.name in WITHOUT_EXAMPLE or "Example:" in (each.help or ""), each.name


def test_standard_output_has_the_result_alone() -> None:
    app = typer.Typer()

    @command(app)
    def noisy(times: int = 1) -> CommandOutput:
        print("said by a library")
        return CommandOutput({"times": times}, ["a line"], typer.Exit(3) if times > 1 else None)

    result = CliRunner().invoke(app, ["--json"])
    assert (result.exit_code, result.stdout, result.stderr) == (0, '{"times": 1}\n', "said by a library\n")
    result = CliRunner().invoke(app, ["--times", "2"])
    assert (result.exit_code, result.stdout) == (3, "a line\n")


def test_help_loads_no_heavy_library() -> None:
    # Each of these takes longer to import than the whole answer may take; a clock would be noisy here.
    script = (
        "import sys, flows.cli\n"
        "heavy = {'torch', 'mlflow', 'prefect', 'dvc', 'boto3', 'pydantic', 'numpy', 'PIL', 'pandas', 'pyarrow'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []


def test_a_mistake_exits_2_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("training:\n  images: 10\n")
    result = darkroom(tmp_path, "train")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("darkroom: ")
    assert len(result.stderr.splitlines()) == 1


def test_health_has_a_line_for_each_server(tmp_path: Path) -> None:
    output = darkroom(tmp_path, "server", "health", "mlflow", "http://127.0.0.1:9/")
    assert output.returncode == 2
    assert [line.split()[:2] for line in output.stdout.splitlines()] == [
        ["mlflow", "fails:"],
        ["http://127.0.0.1:9/", "fails:"],
    ]
    assert "run `darkroom up`" in output.stderr


def test_commands_that_need_servers_explain_how_to_start_them(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("training:\n  images: 10\n")
    result = darkroom(tmp_path, "gc")
    assert "run `darkroom up`" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_dead_server_is_named_soon_without_its_password(tmp_path: Path) -> None:
    variables = {
        "MLFLOW_TRACKING_URI": "http://someone:test-secret@127.0.0.1:9",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9",
    }
    result = darkroom(tmp_path, "model", "history", "--dataset", "digits", **variables)
    assert result.returncode == 1
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("darkroom: MLflow does not answer (http://127.0.0.1:9")
    assert "is MLFLOW_TRACKING_URI right" in line
    assert "test-secret" not in line


@pytest.mark.slow
def test_dry_run_of_training_needs_no_server(dataset: Path, tmp_path: Path) -> None:
    small = ["model.width=16", "model.channel_mult=[1]", "model.attention=[]", "sampling.steps=2"]
    settings = [word for setting in (*small, "training.images=640") for word in ("--set", setting)]
    output = darkroom(tmp_path, "train", "--dataset", "blobs", "--dry-run", *settings)
    assert output.returncode == 0, output.stderr
    assert "of 8×8×1, 2 classes;" in output.stdout
    assert "640 images," in output.stdout
    about = json.loads(darkroom(tmp_path, "train", "--dataset", "blobs", "--dry-run", "--json", *settings).stdout)
    assert (about["dataset"], about["images"], about["shape"]) == ("blobs", 640, [1, 8, 8])
    assert not (tmp_path / "runs" / "blobs").exists()
    process = darkroom(tmp_path, "train", "--dataset", "blobs", "--dry-run", "--restart")
    assert (process.returncode, "leave --restart out" in process.stderr) == (2, True)


@pytest.mark.parametrize("words", [["retrain", "x"], ["ingest", "--local"], ["train", "--dry-run"], ["status"]])
def test_single_process_commands_fail_under_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    process = darkroom(tmp_path, *words)
    assert (process.returncode, "leave torchrun out" in process.stderr) == (2, True)


def test_an_answer_that_has_no_room_is_one_line(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-c", "from flows.cli import main; main()", "config", "schema"]
        process = subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    [line] = process.stderr.splitlines()
    assert (process.returncode, "a disk is full: free some space" in line) == (1, True)


def test_an_interrupt_before_a_command_begins_shows_no_traceback(tmp_path: Path) -> None:
    program = """
import signal
import flows.cli

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background process has not
flows.cli.app = lambda **_: signal.raise_signal(signal.SIGINT)
flows.cli.main()
"""
    process = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (130, "")


def test_signal_inside_prefects_engine_ends_the_process(tmp_path: Path) -> None:
    program = """
import flows.cli
from prefect.exceptions import TerminationSignal

def strike(**_):
    try:
        raise TerminationSignal(15)
    finally:
        raise ValueError("Task run is not set")

flows.cli.app = strike
flows.cli.main()
"""
    process = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (-15, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "request_",
    [
        "__import__('httpx').get('http://127.0.0.1:9')",
        "__import__('requests').get('http://127.0.0.1:9')",
        "__import__('mlflow').MlflowClient('http://127.0.0.1:9').search_experiments()",
        "__import__('boto3').client('s3', endpoint_url='http://127.0.0.1:9').list_buckets()",
    ],
)
def test_a_server_lost_during_a_command_is_one_line_with_a_remedy(request_: str, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom flows.cli import app, main\n"
        f"app.command('ask')(lambda: {request_})\n"
        "sys.argv = ['darkroom', 'ask']\nmain()"
    )
    quick = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "AWS_MAX_ATTEMPTS": "1", "AWS_DEFAULT_REGION": "us-east-1"}
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "test-secret"}
    answer = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | quick | keys | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 1
    [line] = answer.stderr.splitlines()
    assert "darkroom up" in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_python_ignores_still_ends_a_command(number: signal.Signals, tmp_path: Path) -> None:
    script = f"""
import signal, sys, time, weakref
from prefect.utilities.engine import capture_sigterm
from flows.cli import app, main

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background process has not

class Thing: pass

@app.command("ask")
def ask():
    with capture_sigterm():
        thing = Thing()
        reference = weakref.ref(thing, lambda _: signal.raise_signal({number.value}))
        del thing
        time.sleep(60)

sys.argv = ["darkroom", "ask"]
main()
"""
    answer = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert answer.returncode in (-number, 128 + number)
    assert "Traceback" not in answer.stderr
