"""``darkroom data``: what people and scripts see of a data set's versions."""

import json
import random
import shutil
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from diffusion.common.errors import UserError
from diffusion.curation.lists import ListChange
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.manifest import read_manifest
from flows.config import Params
from flows.datasets.catalog import Catalog, Heads
from flows.datasets.dvc import record_data
from flows.datasets.sync import publish
from tests.builders.command_line import CommandLine, darkroom, start
from tests.builders.ingested import files_of, records
from tests.builders.shapes import blob

FOLDER = Path("data/blobs")


@pytest.fixture
def data(
    images: Path, tmp_path: Path, no_servers: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> CommandLine:
    """Two versions of the data set: 48 images and a broken one, then two more images and the broken one mended."""
    (tmp_path / "params.yaml").write_text(
        yaml.safe_dump({"ingest": {"size": 8, "held_out": 0.33}, "training": {"dataset": "blobs", "images": 64}})
    )
    (images / "odd" / "bad.png").write_text("no image")
    config = IngestConfig(source="images", size=8, held_out=0.33, max_quarantined=1)
    ingest(FOLDER, config)
    for name in ("100", "101", "bad"):
        blob(len(name) + int(name.replace("bad", "500"))).save(images / "odd" / f"{name}.png")
    ingest(FOLDER, config)
    (images / "odd" / "worse.png").write_text("no image")
    ingest(FOLDER, config)
    return CommandLine(monkeypatch, capsys, "data")


def test_log_lists_versions_newest_first(data: CommandLine) -> None:
    current = read_manifest(FOLDER)
    lines = data("log").splitlines()[1:]
    assert [line.split()[-6:] for line in lines] == [
        [str(current.parent)[:12], "0", "0", "51", "1", "ingest"],
        [first := lines[2].split()[0], "3", "0", "51", "0", "ingest"],
        [first, "48", "0", "48", "1", "ingest"],
    ]
    assert lines[0].startswith("* ")
    entries = data.json("log")["versions"]
    assert [each["digest"][:12] for each in entries] == [line.removeprefix("*").split()[0] for line in lines]
    assert [each["current"] for each in entries] == [True, False, False]
    assert [each["quarantined"] for each in entries] == [1, 0, 1]


def test_the_calibrated_threshold_of_near_duplicates_is_printed(data: CommandLine, command_line: CommandLine) -> None:
    settings = ("--dataset", "near", "--set", "ingest.near_duplicates=auto")
    out = command_line("ingest", "images", "--local", *settings)
    bits = read_manifest(Path("data/near")).near_duplicate_bits
    (line,) = (line for line in out.splitlines() if line.startswith("near-duplicates"))
    assert f"up to {bits} of 256 bits, chosen by 51 images, group " in line
    assert f"near       up to {bits} of 256 bits" in data("show", *settings)
    assert "near-duplicates" not in command_line("ingest", "images", "--local", *settings)


def test_show_describes_a_version_and_its_quarantined_files(data: CommandLine) -> None:
    first = data.json("log")["versions"][-1]["digest"]
    output = data.json("show", first[:8])
    assert (output["dataset"], output["digest"], output["kept"]) == ("blobs", first, 48)
    assert output["classes"] == {"even": 24, "odd": 24}
    assert [each["source"] for each in output["quarantined"]] == ["odd/bad.png"]
    shown_output = data("show")
    assert "odd/worse.png" in shown_output
    assert "odd/bad.png" not in shown_output


def test_show_is_limited_without_the_all_option(data: CommandLine, tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / "images" / "even" / f"bad{number:02d}.png").write_text("no image")
    ingest(FOLDER, IngestConfig(source="images", size=8, held_out=0.33, max_quarantined=1))
    output = data("show")
    assert output.count("/bad") == 20
    assert "11 more: --all shows them" in output
    assert data("show", "--all").count("/bad") == 30
    assert len(data.json("show")["quarantined"]) == 20
    assert len(data.json("show", "--all")["quarantined"]) == 31
    assert data.json("show")["quarantined_count"] == 31


def test_diff_compares_parent_and_current_version_by_default(data: CommandLine) -> None:
    third, second, first = (each["digest"] for each in data.json("log")["versions"])
    newest = data.json("diff")
    assert (newest["before"], newest["after"], newest["same_content"]) == (second, third, True)
    assert [each["source"] for each in newest["quarantined"]["samples"]] == ["odd/worse.png"]
    whole = data.json("diff", first[:12])
    assert (whole["before"], whole["after"], whole["kept"]) == (first, third, [48, 51])
    assert {each["source"] for each in whole["added"]["samples"]} == {"odd/100.png", "odd/101.png", "odd/bad.png"}
    back = data.json("diff", second[:12], first[:12])
    assert (back["added"]["count"], back["removed"]["count"]) == (0, 3)
    assert "odd/100.png" in data("diff", first[:12])


def test_checkout_and_back_needs_no_server(data: CommandLine) -> None:
    new = files_of(FOLDER)
    third, second, first = (each["digest"] for each in data.json("log")["versions"])
    result = data.json("checkout", first[:12])
    assert (result["dataset"], result["digest"], result["kept"]) == ("blobs", first, 48)
    assert read_manifest(FOLDER).digest == first
    assert [each["digest"] for each in data.json("log")["versions"]] == [third, second, first]
    assert data("log").splitlines()[-1].startswith(f"* {first[:12]}")
    data("checkout", third[:12])
    assert files_of(FOLDER) == new


def test_checkout_mends_what_earlier_versions_lack(data: CommandLine) -> None:
    whole = files_of(FOLDER)
    third, second, first = (each["digest"] for each in data.json("log")["versions"])
    data("checkout", first[:12])
    data("checkout", third[:12])
    (FOLDER / "versions" / f"{second[:16]}.json").unlink()
    assert f"checkout {third[:12]}" in data.mistake("log")
    data("checkout", third[:12])
    assert files_of(FOLDER) == whole


@pytest.mark.slow
def test_checkout_gets_a_version_from_s3_on_a_new_machine(
    data: CommandLine, bucket: str, s3_environment: dict[str, str], tmp_path: Path
) -> None:
    Repo.init(no_scm=True).close()
    source = f"s3://{bucket}/dvc"
    Catalog.of(FOLDER.name, source).publish(read_manifest(FOLDER), record_data(FOLDER, source).digest)
    expected, digest = files_of(FOLDER), read_manifest(FOLDER).digest
    for folder in (FOLDER, FOLDER.with_name(".blobs"), Path(".dvc")):
        shutil.rmtree(folder)
    FOLDER.with_suffix(".dvc").unlink()
    assert "run `darkroom up`" in darkroom(tmp_path, "data", "checkout", digest).stderr
    variables = s3_environment | {"DARKROOM_BUCKET": bucket}
    result = json.loads(darkroom(tmp_path, "data", "checkout", digest[:12], "--json", **variables).stdout)
    assert (result["digest"], result["kept"]) == (digest, 51)
    assert files_of(FOLDER) == expected


def test_versions_in_the_bucket_are_found_on_a_new_machine(
    data: CommandLine, bucket: str, s3_environment: dict[str, str], command_line: CommandLine
) -> None:
    Repo.init(no_scm=True).close()
    publish(FOLDER, source := f"s3://{bucket}/dvc")
    expected, newest = files_of(FOLDER), read_manifest(FOLDER)
    for folder in (FOLDER, FOLDER.with_name(".blobs"), Path(".dvc")):
        shutil.rmtree(folder)
    FOLDER.with_suffix(".dvc").unlink()

    assert "darkroom data checkout --dataset blobs" in data.mistake("show")
    [entry] = data.json("log")["versions"]
    assert (entry["digest"], entry["current"], entry["local"], entry["kept"]) == (newest.digest, False, False, 51)
    [row] = command_line.json("ls")["datasets"]
    assert (row["name"], row["version"], row["images"]) == ("blobs", newest.digest[:12], 51)
    assert "there is blobs" in data.mistake("checkout", "--dataset", "faces")

    assert data.json("checkout")["digest"] == newest.digest
    assert files_of(FOLDER) == expected
    [entry, *_] = data.json("log")["versions"]
    assert (entry["digest"], entry["current"], entry["local"]) == (newest.digest, True, True)
    assert [row["place"] for row in command_line.json("ls")["datasets"]] == ["data/blobs"]
    # What was ingested here and is not published yet is not lost.
    blob(300).save("images/odd/300.png")
    ingest(FOLDER, IngestConfig(source="images", size=8, held_out=0.33, max_quarantined=1))
    unpublished = read_manifest(FOLDER).digest
    assert data.json("checkout")["digest"] == newest.digest
    assert unpublished in {entry["digest"] for entry in data.json("log")["versions"] if entry["local"]}
    assert Heads(Catalog.of("blobs", source)).newest() == newest.digest


def test_log_says_that_a_bucket_cannot_be_listed(data: CommandLine) -> None:
    data.monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        data.monkeypatch.setenv(name, "x")
    output = data.json("log")
    assert len(output["versions"]) == 3
    assert "127.0.0.1:9" in output["error"]


@pytest.mark.drill
@pytest.mark.slow
@pytest.mark.long
def test_a_checkout_killed_at_random_moments_ends_the_same(data: CommandLine, kills: int, tmp_path: Path) -> None:
    first = data.json("log")["versions"][-1]["digest"]
    newest = read_manifest(FOLDER).digest
    expected = {}
    for digest in (first, newest):
        begin = time.monotonic()
        assert darkroom(tmp_path, "data", "checkout", digest).returncode == 0
        expected[digest] = files_of(FOLDER), FOLDER.with_suffix(".dvc").read_bytes()
    duration = time.monotonic() - begin
    moments = random.Random(2)
    for number in range(kills):
        digest = (first, newest)[number % 2]
        process = start(tmp_path, "data", "checkout", digest)
        time.sleep(moments.uniform(0.3, 1) * duration)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert darkroom(tmp_path, "data", "checkout", digest).returncode == 0
        assert (files_of(FOLDER), FOLDER.with_suffix(".dvc").read_bytes()) == expected[digest]
        assert {each["digest"] for each in data.json("log")["versions"]} > {first, newest}


def test_remove_lists_the_affected_images_first(data: CommandLine) -> None:
    files = files_of(FOLDER)
    output = data.json("remove", "odd/0?.png", "--dry-run")
    assert (output["dataset"], output["dry_run"], output["images"], len(output["image_keys"])) == ("blobs", True, 5, 5)
    assert data.json("remove", output["image_keys"][0][:16], "--dry-run")["image_keys"] == output["image_keys"][:1]
    assert data.json("remove", "*", "--label", "even", "--dry-run")["images"] == 24
    assert data.json("remove", "--source", "odd/01.png", "--dry-run")["images"] == 1
    assert output["names"] == [f"odd/{number:02d}.png" for number in range(1, 10, 2)]
    assert all(f"  {name}\n" in data("remove", "odd/0?.png", "--dry-run") for name in output["names"])
    assert files_of(FOLDER) == files


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "ffffffff"], "ffffffff is not a version of data set blobs"),
        (["show", "newest"], "first 4 or more hex digits"),
        (["diff", "ffffffff"], "is not a version"),
        (["checkout", "ffffffff"], "is not a version"),
        (["log", "--dataset", "nothing"], "no data set in data/nothing (there is blobs)"),
        (["remove", "1.png", "--dry-run"], "no image of 1.png: its names are like 'even/"),
        (["remove", "01.png", "--dry-run"], "did you mean '*/01.png'?"),
        (["remove", "odd/01.png", "--dry-run", "--purge"], "leave --purge out"),
        (["log", "--dataset", "a/b"], "plain name"),
        (["remove", "--reason", "x", "--yes"], "nothing is selected"),
        (["remove", "nowhere/*", "--dry-run"], "no image of nowhere/*"),
        (["remove", "odd/01.png", "--yes"], "needs a --reason"),
        (["remove", "odd/01.png", "--reason", "x"], "give --yes"),
        (["remove", "odd/01.png", "--reason", "x", "--yes"], "run `darkroom up`"),
    ],
)
def test_data_command_errors_are_one_line_with_a_remedy(data: CommandLine, arguments: list[str], words: str) -> None:
    files = files_of(FOLDER)
    assert words in data.mistake(*arguments)
    assert files_of(FOLDER) == files


def test_an_error_names_the_line_that_sets_the_field(data: CommandLine, command_line: CommandLine) -> None:
    rest = "training:\n  dataset: blobs\ningest:\n  held_out: 0.33\n"
    Path("params.yaml").write_text(f"{rest}  size: 12\n")
    assert "ingest.size is set in params.yaml, line 5" in command_line.mistake("ingest", "images", "--local")
    Path("params.yaml").write_text(f"{rest}  size: 8\n")
    error = command_line.mistake("ingest", "images", "--local", "--set", "ingest.size=12")
    assert "params.yaml" not in error


def test_commands_that_need_no_server_take_local(data: CommandLine) -> None:
    data.monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    assert data.json("log", "--local")["error"] is None
    for verb in ("show", "diff"):
        assert data.json(verb, "--local") == data.json(verb)


def test_the_first_version_has_nothing_to_be_compared_with(
    images: Path, tmp_path: Path, no_servers: None, command_line: CommandLine
) -> None:
    (tmp_path / "params.yaml").write_text("training: {dataset: blobs, images: 1}")
    ingest(FOLDER, IngestConfig(source="images", size=8))
    assert "is the first version" in command_line.mistake("data", "diff")


def test_curate_drops_by_rule_and_brings_back_without_a_server(data: CommandLine) -> None:
    rule = ("--set", "curation.min_contrast=30", "--set", "curation.max_dropped=1")
    image_count = read_manifest(FOLDER).kept
    dry_run = data.json("curate", "--dry-run", *rule)
    assert dry_run["dry_run"] is True
    assert 0 < dry_run["dropped"] < image_count
    assert f"{dry_run['dropped']} would be dropped" in data("curate", "--dry-run", *rule)
    assert read_manifest(FOLDER).kept == image_count
    result = data.json("curate", "--local", *rule)
    assert result["images"] == dry_run["images"]
    assert read_manifest(FOLDER).digest == result["digest"]
    assert "no new version" in data("curate", "--local", *rule)
    assert "min_contrast = 30: contrast is" in data("show")
    assert f"dropped now {result['dropped']}" in data("diff")
    assert "curation" in data("log").splitlines()[1]
    data("curate", "--local")
    assert read_manifest(FOLDER).kept == image_count
    assert "give the path of an .html file" in data.mistake("curate", "--report", "page.pdf")
    Path("file").touch()
    Path("folder.html").mkdir()
    for wrong in (["file/page.html"], ["folder.html"], ["/proc/none/page.html"]):
        assert "--report" in data.mistake("curate", "--report", *wrong)
    for option in ("--dry-run", "--local"):
        assert option in data.mistake("curate", "--report", "page.html", option)
    assert not Path("page.html").exists()
    assert "--set curation.max_nsfw=0.5" in data.mistake("curate", "--set", "curation.max_nsfw=0.5")


def test_curate_takes_lists_of_other_tools_and_withdraws_them(data: CommandLine) -> None:
    before = read_manifest(FOLDER)
    names = [row["source"] for row in records(FOLDER) if row["outcome"] == "kept"]
    rows = [f"/mnt/images/{name},True" for name in names[:3]] + ["/mnt/images/none.png,True", f"{names[3]},False"]
    Path("dark images.csv").write_text("\n".join([",is_dark_issue", *rows]))
    Path("fix.jsonl").write_text(json.dumps({"file_name": names[4], "label": "other"}))
    assert "would be dropped" in data("curate", "--drop", "dark images.csv", "--dry-run")
    assert read_manifest(FOLDER) == before
    result = data.json("curate", "--local", "--drop", "dark images.csv")
    assert (result["dropped"], result["rules"]) == (3, {"list dark images": 3})
    assert (result["list_change"]["unknown_count"], result["list_change"]["unknown"]) == (1, ["/mnt/images/none.png"])
    assert "no new version" in data("curate", "--local", "--drop", "dark images.csv")
    assert "fixed labels 1 image" in data("curate", "--local", "--label", "fix.jsonl", "--name", "fixed")
    shown = data("show")
    assert "dark images drops 3 images" in shown
    assert f"{names[0]}: list dark images: dark" in shown
    difference = data.json("diff", before.digest[:12])
    assert [change["after"]["label"] for change in difference["changed"]["samples"]] == ["other"]
    assert difference["dropped"]["count"] == 3
    data("curate", "--local")
    assert read_manifest(FOLDER).dropped == 3
    for name in ("fixed", "dark images"):
        assert "withdrawn" in data("curate", "--local", "--withdraw", name)
    assert read_manifest(FOLDER).content_digest == before.content_digest
    for words, told in (
        (["--withdraw", "none"], "no list none"),
        (["--drop", "fix.jsonl", "--withdraw", "x"], "give one of them"),
        (["--name", "x"], "--name"),
        (["--drop", "fix.jsonl", "--name", "a/b"], "plain name"),
        (["--drop", "fix.jsonl", "--report", "page.html"], "--report"),
        (["--drop", "fix.txt"], "is not a table"),
    ):
        assert told in data.mistake("curate", *words, *(["--local"] if "--report" not in words else []))


def test_curate_with_servers_needs_no_local_copy(data: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(params: Params, change: ListChange | None) -> None:
        raise UserError(f"curated {params.training.dataset}, change {change and change.name}")

    monkeypatch.setattr("flows.cli.data_change_commands.connect", lambda *_: nullcontext())
    monkeypatch.setattr("flows.curate.curate", reached)
    shutil.rmtree(FOLDER)
    assert "curated blobs, change None" in data.mistake("curate")
    assert "curated blobs, change bad" in data.mistake("curate", "--withdraw", "bad")
