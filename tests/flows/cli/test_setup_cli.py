"""``darkroom init``, ``config``, ``ls``, ``open`` and the dry runs: what a new user sees first."""

import csv
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.numpy import save_file
from scipy.stats import binom

from diffusion.common.model_files import METADATA_KEY
from diffusion.data.manifest import read_manifest
from diffusion.data.versions.takedown import remove
from diffusion.data.versions.takedown_records import Selection
from flows.cli.retraining_commands import _describe_retraining
from flows.config import load_params
from flows.storage.s3 import Store
from tests.builders.command_line import CommandLine
from tests.builders.shapes import blob, disc
from tests.builders.small_models import write_model


@pytest.fixture
def run(no_servers: None, command_line: CommandLine) -> CommandLine:
    return command_line


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    folder = tmp_path / "captioned"
    folder.mkdir()
    for number in range(4):
        blob(number).save(folder / f"{number}.png")
    rows = "".join(f'{number}.png,"a blob, number {number}",round\n' for number in range(4))
    (folder / "prompts.csv").write_text(f"image,caption,class\n{rows}")
    return folder


def test_init_writes_a_configuration_that_ingests_the_images(run: CommandLine, images: Path) -> None:
    about = run.json("init", str(images))
    assert (about["params"], about["dataset"], about["size"]) == ("params.yaml", "images", 12)
    assert about["survey"]["classes"] == {"even": 24, "odd": 24}
    assert (about["survey"]["images"], about["survey"]["channels"]) == (48, 1)
    assert about["next"] == "darkroom up && darkroom ingest && darkroom train"
    params = load_params(Path("params.yaml"), [])
    assert (params.ingest.source, params.ingest.size, params.training.dataset) == (str(images), 12, "images")
    assert params.model.conditional
    for other in ("model.family=vae", "model.low_resolution=6"):
        load_params(Path("params.yaml"), [other])
    result = run.json("ingest", "--local")
    assert (result["kept"], result["quarantined"]) == (48, [])


@pytest.mark.parametrize(("count", "share"), [(40, None), (60, 0.35), (120, 0.2), (400, 0.1)])
def test_init_holds_out_what_an_evaluation_needs(
    run: CommandLine, tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int, share: float | None
) -> None:
    (tmp_path / "few").mkdir()
    for number in range(count):
        disc(number).save(tmp_path / "few" / f"{number}.png")
    about = run.json("init", "few")
    params = load_params(Path("params.yaml"), [])
    assert params.ingest.held_out == (share or 0.1)
    if share is None:
        assert about["next"].endswith("darkroom ingest && darkroom train")
        run("ingest", "--local")
        assert "darkroom model import" in caplog.text
    else:
        # One set of hundred may fall short.
        assert binom.cdf(9, count, share) < 0.015


def test_init_proposes_to_keep_the_shapes_of_wide_images(run: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "flags").mkdir()
    for number in range(12):
        disc(number, 24).resize((36, 24)).save(tmp_path / "flags" / f"{number}.png")
    about = run.json("init", "flags")
    assert about["survey"]["cropped"] == pytest.approx(1 / 3)
    assert load_params(Path("params.yaml"), []).ingest.fit == "bucket"
    assert "33% of the pixels" in Path("params.yaml").read_text()


def test_dry_run_forecasts_what_ingest_makes_of_images(run: CommandLine, images: Path) -> None:
    settings = ("images", "--dataset", "blobs", "--set", "ingest.size=16")
    preview = run.json("ingest", "--dry-run", *settings)
    assert (preview["new"], preview["forecast"]["kept"]) == (48, 0)
    [(reason, count)] = preview["forecast"]["quarantined"].items()
    assert (count, "size = 16" in reason) == (48, True)
    assert "no usable image" in preview["fails"]
    run("ingest", "--local", *settings, code=2)

    settings = ("images", "--dataset", "blobs", "--set", "ingest.size=8", "--set", "ingest.held_out=0.33")
    (images / "odd" / "copy.png").write_bytes((images / "odd" / "01.png").read_bytes())
    (images / "odd" / "bad.png").write_text("no image")
    preview, result = (run.json("ingest", how, *settings) for how in ("--dry-run", "--local"))
    assert preview["forecast"] | {"quarantined": {}} == {
        **{"tried": 50, "kept": result["kept"], "duplicates": result["duplicates"], "removed": 0, "quarantined": {}}
    }
    assert (result["duplicates"], list(preview["forecast"]["quarantined"].values())) == (1, [1])
    assert preview["fails"] is None

    remove(Path("data/blobs"), Selection(sources=["odd/03.png"]), "consent withdrawn")
    shutil.copy(images / "odd" / "03.png", images / "odd" / "again.png")
    preview, result = (run.json("ingest", how, *settings) for how in ("--dry-run", "--local"))
    assert (preview["new"], preview["forecast"]["removed"], preview["forecast"]["kept"]) == (1, 1, 0)
    assert (result["added"], result["removed"]) == (0, 1)


def test_a_path_with_a_line_break_stays_within_its_comment(run: CommandLine, images: Path) -> None:
    folder = images.rename(images.parent / "a\n\x85preset: large\u2028b")
    run("init", str(folder), "--dataset", "blobs")
    params = load_params(Path("params.yaml"), [])
    assert (params.ingest.source, params.preset) == (str(folder), "fast")


def test_init_changes_no_existing_configuration(run: CommandLine, images: Path) -> None:
    Path("params.yaml").write_text("training:\n  dataset: mine\n")
    run("init", str(images), code=2)
    assert Path("params.yaml").read_text() == "training:\n  dataset: mine\n"


def test_table_of_captions_becomes_metadata_on_request(run: CommandLine, captioned: Path) -> None:
    survey = run.json("init", str(captioned), "--dataset", "blobs")["survey"]
    assert (survey["captions"], survey["captions_table"]["image"]) == (0, "image")
    assert not (captioned / "metadata.csv").exists()
    assert "prompts.csv" in run("ingest", str(captioned), "--dataset", "plain", "--set", "ingest.size=12", "--local")
    Path("params.yaml").unlink()
    survey = run.json("init", str(captioned), "--write-metadata")["survey"]
    assert (survey["captions"], survey["classes"], survey["captions_table"]) == (4, {"round": 4}, None)
    with (captioned / "metadata.csv").open() as file:
        assert next(iter(csv.DictReader(file))) == {"file_name": "0.png", "text": "a blob, number 0", "label": "round"}
    run("init", str(captioned), "--write-metadata", code=2)


def test_captions_beside_the_folder_that_is_named_are_pointed_at(run: CommandLine, captioned: Path) -> None:
    beside = captioned.with_name("captions.csv")
    beside.write_text(f"file_name,caption\n{captioned.name}/0.png,a blob\n")
    (captioned / "prompts.csv").unlink()
    assert str(beside) in run("init", str(captioned))
    Path("params.yaml").unlink()
    beside.write_text("file_name,caption\nelsewhere/0.png,a blob\n")
    assert str(beside) not in run("init", str(captioned))


def test_captions_that_are_written_later_are_learned(run: CommandLine, captioned: Path) -> None:
    run("init", str(captioned), "--dataset", "blobs")  # which advises to give the next command
    run("init", str(captioned), "--write-metadata")
    params = load_params(Path("params.yaml"), [])
    assert (params.model.text, params.training.dataset) == (True, "blobs")


@pytest.mark.parametrize("section", ["", "model:\n  width: 32\n"])
def test_edited_configuration_is_kept_with_a_hint_that_fits(run: CommandLine, captioned: Path, section: str) -> None:
    run("init", str(captioned), "--dataset", "blobs")
    path = Path("params.yaml")
    path.write_text(f"{path.read_text()}{section}")
    path.write_text(path.read_text().replace("minutes: 10", "minutes: 9"))
    before = path.read_text()
    output = run("init", str(captioned), "--write-metadata")
    assert (captioned / "metadata.csv").is_file()
    assert path.read_text() == before
    assert ("add the lines `model:`" in output) == (not section)
    lines = ["model:\n", "  text: true\n"] if not section else ["  text: true\n"]
    path.write_text(before + "".join(lines))
    assert load_params(path, []).model.text


@pytest.mark.parametrize("answer", [True, False])
def test_captions_are_offered_in_a_terminal_before_the_configuration(
    run: CommandLine, captioned: Path, answer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = []

    def confirm(question: str, **_: object) -> bool:
        questions.append((question, Path("params.yaml").exists()))
        return answer

    monkeypatch.setattr("typer.confirm", confirm)
    for stream in (sys.stdin, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    run("init", str(captioned), "--dataset", "blobs")
    [(question, was_written)] = questions
    assert "prompts.csv" in question
    assert not was_written
    assert load_params(Path("params.yaml"), []).model.text is answer


def test_init_and_ingest_count_captions_beside_images(run: CommandLine, captioned: Path) -> None:
    (captioned / "prompts.csv").unlink()
    for number in range(3):
        (captioned / f"{number}.txt").write_text(f"a blob, number {number}")
    (captioned / "notes.md").write_text("")
    counts = "captions   3 of 4 images, from NAME.txt; first: a blob, number 0"
    lines = run("init", str(captioned), "--dataset", "blobs").splitlines()
    assert {counts, "warning    1 of 4 images has no caption, such as 3.png"} <= {*lines}
    assert any(line.startswith("ignored") and "1 .md" in line for line in lines)
    params = load_params(Path("params.yaml"), [])
    assert params.model.text
    lines = run("ingest", "--local").splitlines()
    assert counts.replace("captions   ", "captions ") in lines
    assert any(line.startswith("ignored") and "1 .md" in line for line in lines)


@pytest.mark.parametrize(
    ("names", "captioned_too", "folders", "weights", "classes"),
    [
        (["10_cat", "5_dog"], False, "class", {"10_cat/*": 10, "5_dog/*": 5}, {"cat": 4, "dog": 4}),
        (["10_cat", "10_dog"], False, "class", None, {"cat": 4, "dog": 4}),
        (["10_sks dog"], False, "caption", None, {}),
        (["10_cat", "1_dog"], True, "caption", {"10_cat/*": 10, "1_dog/*": 1}, {}),
        (["cat", "dog"], False, None, None, {"cat": 4, "dog": 4}),
    ],
)
def test_folders_of_sd_scripts_are_recognised(
    run: CommandLine,
    tmp_path: Path,
    names: list[str],
    captioned_too: bool,
    folders: str | None,
    weights: dict[str, float] | None,
    classes: dict[str, int],
) -> None:
    for number in range(4 * len(names)):
        path = tmp_path / "img" / names[number % len(names)] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        blob(number).save(path)
    if captioned_too:
        (tmp_path / "img" / "10_cat" / "0.txt").write_text("a captioned cat")
    about = run.json("init", "img")
    params = load_params(Path("params.yaml"), [])
    assert (params.ingest.folders, params.training.weights) == (folders, weights)
    assert about["survey"]["classes"] == classes
    assert params.model.text is (folders == "caption")
    # By accident, without init's setting: no class is called after the repeats.
    result = run.json("ingest", "img", "--local", "--dataset", "bare", "--set", "ingest.folders=null")
    assert result["kept"] == 4 * len(names)
    histogram = read_manifest(Path("data/bare")).class_histogram
    assert histogram == ({name.partition("_")[2] or name: 4 for name in names} if len(names) > 1 else {})


def test_init_without_images_is_a_mistake(run: CommandLine) -> None:
    assert "FOLDER" in run.mistake("init")
    assert not Path("params.yaml").exists()


@pytest.mark.parametrize("key", ["training", "training.minutes"])
def test_config_shows_one_section_or_field(run: CommandLine, key: str) -> None:
    Path("params.yaml").write_text("training:\n  minutes: 3\n")
    lines = run("config", "show", key).splitlines()
    assert all(line.split()[0].startswith(key) for line in lines)
    assert any(line.split() == ["training.minutes", "3.0", "params.yaml"] for line in lines)
    run("config", "show", "minutes", code=2)


def test_status_says_that_nothing_runs(run: CommandLine) -> None:
    assert "darkroom up" in run("status")


@pytest.mark.parametrize(
    "words",
    [
        *("ingest pets --local", "train", "train --local", "evaluate", "promote", "sample", "retrain", "retrain pets"),
        *("distill", "sweep --over training.seed=1,2", "compare", "deploy", "monitor", "ui", "open report"),
        *(
            "edit interpolate 3",
            "data log",
            "data show",
            "data diff",
            "data checkout abcd",
            "data curate",
        ),
        *("model history", "model rollback", "model card", "model explain", "model export --to adapter --out new"),
        "config validate",
    ],
)
def test_without_a_configuration_every_verb_names_init(run: CommandLine, words: str) -> None:
    message = run.mistake(*words.split())
    assert "no params.yaml" in message
    assert "darkroom init FOLDER" in message
    assert not any(Path().iterdir())


def test_config_shows_values_with_their_origin(run: CommandLine) -> None:
    Path("params.yaml").write_text("training:\n  dataset: faces\n  minutes: 3\n")
    output = run.json("config", "show", "--set", "training.images=8000")
    assert (output["params"]["training"]["images"], output["params"]["training"]["minutes"]) == (8000, None)
    assert output["origin"]["training.images"] == "--set"
    assert output["origin"]["training.dataset"] == "params.yaml"
    shown_output = run("config", "show", "--dataset", "cats")
    assert any(line.split() == ["training.dataset", '"cats"', "--dataset"] for line in shown_output.splitlines())


def test_config_schema_describes_every_section_and_validate_checks_the_file(run: CommandLine) -> None:
    schema = json.loads(run("config", "schema"))
    assert schema == run.json("config", "schema")
    assert {"ingest", "model", "training", "sampling", "evaluation", "gate"} <= schema["properties"].keys()
    assert schema["$defs"]["IngestConfig"]["properties"]["size"]["maximum"] == 1024
    Path("faces.yaml").write_text("training:\n  minutes: 3\n")
    assert run.json("config", "validate", "--params", "faces.yaml") == {"valid": True, "file": "faces.yaml"}
    Path("params.yaml").write_text("training:\n  imagess: 3\n")
    run("config", "validate", code=2)


def test_ls_lists_what_is_here_without_servers(run: CommandLine, dataset: Path, tmp_path: Path) -> None:
    for name in ("blobs", "more"):
        (tmp_path / "runs" / name / "checkpoints").mkdir(parents=True)
    write_model(tmp_path / "runs" / "more" / "final.safetensors", seed=0, images=640)
    # Stopped by a signal before its first regular checkpoint.
    write_model(tmp_path / "runs" / "stopped" / "interrupted" / "0000000032.safetensors", seed=0, images=32)
    output = run.json("ls")
    assert output["datasets"][0] | {"version": ""} == {
        **{"name": "blobs", "images": 48, "shape": "8×8×1", "classes": 2, "version": "", "place": "data/blobs"}
    }
    assert output["runs"] == [
        {"name": "runs/blobs", "state": "unfinished", "images": None, "family": None},
        {"name": "runs/more", "state": "finished", "images": 640, "family": "ddpm"},
        {"name": "runs/stopped", "state": "unfinished", "images": 32, "family": "ddpm"},
    ]
    assert output.keys() == {"datasets", "runs", "errors"}
    assert output["errors"].keys() == {"models", "batches"}
    assert run.json("ls", "datasets").keys() == {"datasets", "errors"}
    assert run("ls", "runs").splitlines()[1].split() == ["runs/blobs", "unfinished"]
    run("ls", "models", code=2)


def test_ls_lists_damaged_runs_but_no_deleted_batches(
    run: CommandLine, store: Store, bucket: str, tmp_path: Path
) -> None:
    (tmp_path / "runs" / "blobs" / "checkpoints").mkdir(parents=True)
    header = {METADATA_KEY: json.dumps({"model_header": []})}
    save_file({}, tmp_path / "runs" / "blobs" / "final.safetensors", header)
    for number, text in enumerate((b"{}", b"[]", b"{", b'{"model": "m", "version": 1, "count": 4, "seed": 7}')):
        store.put_once(bucket, f"samples/m/1/{number}/batch.json", text)
    store.put_once(bucket, "samples/m/1/gone/batch.json", b"{}")
    store.put_once(bucket, "deleted/samples/m/1/gone", b"")
    assert [each["images"] for each in run.json("ls", "runs")["runs"]] == [None]
    assert [each.get("images") for each in run.json("ls", "batches")["batches"]] == [None, None, None, 4]


def retraining(verdict: dict[str, Any]) -> dict[str, Any]:
    """Result of a retraining that ended in this ``verdict``."""
    version = {"model": "blobs", "number": 1}
    return {
        "data": {"kept": 48, "content_digest": "0" * 64},
        "verdict": {"reason": "first", "champion": 1, "version": version} | verdict,
        "explained": {"files": []},
        "advice": None,
        **dict.fromkeys(
            ("samples", "skipped", "seconds", "start", "quality", "set_aside", "report", "mlflow_page"), None
        ),
        **{"run_id": "1", "prefect_page": None},
    }


@pytest.mark.usefixtures("no_servers")
def test_a_held_version_names_where_to_look(tmp_path: Path) -> None:
    page = "reports/blobs/champion_comparison.html"
    held = list(_describe_retraining(retraining({"promoted": False, "verdict": "hold", "comparison_page": page})))
    [line] = [line for line in held if page in line]
    assert "docs/how-to/why-held.md" in line
    promoted = list(_describe_retraining(retraining({"promoted": True, "verdict": "promote", "comparison_page": page})))
    assert not [line for line in promoted if "why-held" in line]


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({}, {"mlflow_password", "prefect_auth_string"}),
        ({"MLFLOW_TRACKING_URI": "https://mlflow.example"}, {"prefect_auth_string"}),
        ({"MLFLOW_TRACKING_URI": "https://m.example", "PREFECT_API_URL": "https://p.example/api"}, set()),
    ],
)
@pytest.mark.usefixtures("no_servers")
def test_passwords_are_named_for_servers_of_the_local_stack(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], named: set[str]
) -> None:
    Path(".darkroom").mkdir()
    Path(".darkroom/credentials.json").write_text("{}")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    text = "\n".join(_describe_retraining(retraining({"promoted": True, "verdict": "promote"})))
    assert {field for field in ("mlflow_password", "prefect_auth_string") if field in text} == named


def test_open_prints_addresses_and_where_the_password_is(
    run: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Path("params.yaml").write_text("training: {dataset: digits}\n")
    run("open", "report", code=2)
    page = tmp_path / "reports" / "digits" / "report.html"
    page.parent.mkdir(parents=True)
    page.write_text("<html>")
    assert run.json("open", "report") == {"url": page.as_uri()}
    monkeypatch.setenv("PREFECT_API_URL", "http://team:test-secret@prefect.example/api")
    output = run("open", "prefect")
    assert output.splitlines()[0] == "http://prefect.example"
    assert "PREFECT_API_AUTH_STRING" in output
    assert "test-secret" not in output


def test_dry_run_of_ingest_changes_nothing(run: CommandLine, images: Path, dataset: Path, tmp_path: Path) -> None:
    for number in range(48, 51):
        blob(number).save(images / "odd" / f"{number}.png")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    options = ("--dry-run", "--dataset", "blobs", "--set", "ingest.size=8", "--set", "ingest.held_out=0.33")
    about = run.json("ingest", str(images), *options)
    assert (about["dataset"], about["kept"], about["new"], about["survey"]["images"]) == ("blobs", 48, 3, 51)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    # As the ingest itself would: its images are stored in another size.
    run("ingest", str(images), "--dry-run", "--dataset", "blobs", "--set", "ingest.size=10", code=2)
    rebuilt = run.json("ingest", str(images), "--rebuild", *options)
    assert (rebuilt["kept"], rebuilt["new"]) == (None, 51)


@pytest.mark.slow
def test_dry_run_of_several_trainings_measures_each(run: CommandLine, dataset: Path) -> None:
    small = ["model.width=16", "model.channel_mult=[1]", "model.attention=[]", "sampling.steps=2", "training.images=64"]
    settings = [word for each in small for word in ("--set", each)]
    about = run.json("sweep", "--over", "training.seed=1,2", "--dry-run", "--dataset", "blobs", *settings)
    assert list(about["trainings"]) == ["seed=1", "seed=2"]
    assert all(each["images"] == 64 for each in about["trainings"].values())
    assert about["seconds"] == sum(each["seconds"] for each in about["trainings"].values()) > 0
    assert not Path("runs").exists()


def test_dry_run_of_several_trainings_shows_all_times(
    run: CommandLine, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [("time", "20 seconds"), ("at SIGTERM", "ends")]
    estimate = SimpleNamespace(seconds=20.0, lines=lambda: lines, model_dump=lambda mode: {})
    monkeypatch.setattr("diffusion.training.train.preflight", lambda *_: estimate)
    words = ["sweep", "--over", "training.seed=1,2", "--dry-run", "--dataset", "blobs"]
    assert run(*words).splitlines() == ["seed=1: 20 seconds", "seed=2: 20 seconds", "2 trainings, 40 seconds in all"]


def test_quiet_shows_the_result_alone_before_or_after_the_command(
    run: CommandLine, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("--local", "--set", "ingest.size=8")
    # So that work of a moment has lines, too.
    monkeypatch.setattr("flows.tracking.console.EVERY", 0.0)
    for number, (before, after) in enumerate(((["-q"], []), ([], ["--quiet"]), ([], []))):
        _, out, err = run.answer(*before, "ingest", images, "--dataset", f"set{number}", *settings, *after)
        assert out.startswith("48 images in ")
        assert bool(err) == (not before and not after)
