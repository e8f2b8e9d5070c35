"""``darkroom data``: what people and scripts see of a data set's versions."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo

from diffusion.common.errors import UserError
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.manifest import read_manifest
from flows.cli import main
from flows.config import Params
from flows.datasets.catalog import Catalog, Heads
from flows.datasets.dvc import record_data
from flows.datasets.sync import publish
from tests.builders import ROOT
from tests.builders.ingested import files_of
from tests.builders.shapes import blob

FOLDER = Path("data/blobs")


class CommandLine:
    """Runs ``darkroom data``, or another command, in a folder of its own, without servers unless variables name one."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.variables: dict[str, str] = {}

    def run(self, *arguments: str, code: int = 0, command: str = "data") -> str:
        """In this process, which saves the start of another."""
        self.monkeypatch.setattr(sys, "argv", ["darkroom", command, *arguments])
        self.monkeypatch.setattr(sys, "stdin", io.StringIO())
        exit_code = 0
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            try:
                main()
            except SystemExit as done:
                exit_code = int(done.code or 0)
        return self.checked(exit_code, code, out.getvalue(), err.getvalue())

    def shell(self, *arguments: str, code: int = 0) -> str:
        """In a process of its own."""
        process = self.start(*arguments)
        out, err = process.communicate()
        return self.checked(process.returncode, code, out, err)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Begin a process of its own."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("DARKROOM_", "MLFLOW_", "PREFECT_", "AWS_"))
        }
        return subprocess.Popen(
            [sys.executable, "-c", "from flows.cli import main; main()", "data", *arguments],
            cwd=self.folder,
            env=inherited | {"PYTHONPATH": str(ROOT)} | self.variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @staticmethod
    def checked(ended: int, code: int, out: str, err: str) -> str:
        assert ended == code, err
        if code == 2:
            assert out == ""
            assert len(err.strip().splitlines()) == 1
            return err
        return out

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json"))


@pytest.fixture
def commands(images: Path, tmp_path: Path, no_servers: None, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
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
    return CommandLine(tmp_path, monkeypatch)


def test_log_lists_versions_newest_first(commands: CommandLine) -> None:
    current = read_manifest(FOLDER)
    lines = commands.run("log").splitlines()[1:]
    assert [line.split()[-6:] for line in lines] == [
        [str(current.parent)[:12], "0", "0", "51", "1", "ingest"],
        [first := lines[2].split()[0], "3", "0", "51", "0", "ingest"],
        [first, "48", "0", "48", "1", "ingest"],
    ]
    assert lines[0].startswith("* ")
    entries = commands.json("log")["versions"]
    assert [each["digest"][:12] for each in entries] == [line.removeprefix("*").split()[0] for line in lines]
    assert [each["current"] for each in entries] == [True, False, False]
    assert [each["quarantined"] for each in entries] == [1, 0, 1]


def test_the_calibrated_threshold_of_near_duplicates_is_printed(commands: CommandLine) -> None:
    settings = ("--dataset", "near", "--set", "ingest.near_duplicates=auto")
    out = commands.run("images", "--local", *settings, command="ingest")
    bits = read_manifest(Path("data/near")).near_duplicate_bits
    (line,) = (line for line in out.splitlines() if line.startswith("near-duplicates"))
    assert f"up to {bits} of 256 bits, chosen by 51 images, group " in line
    assert f"near       up to {bits} of 256 bits" in commands.run("show", *settings)
    assert "near-duplicates" not in commands.run("images", "--local", *settings, command="ingest")


def test_compact_joins_the_shards_of_all_versions(commands: CommandLine) -> None:
    before = commands.json("show")
    result = commands.json("compact", "--local")
    assert (result["dataset"], result["changed"], result["shards"]) == ("blobs", True, [2, 1])
    assert result["content_digest"] == before["content_digest"] == commands.json("show")["content_digest"]
    assert "none too small" in commands.run("compact", "--local")


def test_simulate_takes_shards_of_a_data_set_or_description(commands: CommandLine) -> None:
    manifest = read_manifest(FOLDER)
    output = commands.json("simulate", "--step-seconds", "0.1", "--set", "training.batch_size=4", "--epochs", "2")
    assert (output["images"], output["shards"]) == (manifest.counts["train"], 2)
    assert [epoch["fetched"] for epoch in output["simulation"]["epochs"]] == [2, 0]
    described = ("simulate", "--images", "1000000000", "--bytes-per-image", "20000", "--nodes", "4", "--ranks", "8")
    settings = ("--set", "training.batch_size=65536", "--set", "ingest.shard_bytes=2000000000")
    output = commands.json(*described, *settings, "--step-seconds", "2")
    assert (output["images"], output["bytes"], output["shards"]) == (10**9, 2 * 10**13, 10**4)
    assert output["streaming"]["window"] == output["smallest"]["window"]
    output = commands.json(*described, "--set", "ingest.size=64", "--set", "ingest.shard_bytes=2000000000")
    assert output["streaming"]["batch_size"] == 32
    lines = commands.run(*described, *settings, "--step-seconds", "0.5").splitlines()
    assert any("the network would have to be" in line for line in lines)
    commands.run("simulate", "--images", "5", code=2)
    for wrong in (("nodes", "0"), ("bandwidth", "-1"), ("latency", "nan"), ("step-seconds", "inf")):
        assert f"--{wrong[0]} " in commands.run(*described, f"--{wrong[0]}", wrong[1], code=2)
    commands.run(*described, "--disk-bytes", "1000", code=2)
    assert "24 ranks" in commands.run(*described, *settings, "--nodes", "3", code=2)


def test_show_describes_a_version_and_its_quarantined_files(commands: CommandLine) -> None:
    first = commands.json("log")["versions"][-1]["digest"]
    output = commands.json("show", first[:8])
    assert (output["dataset"], output["digest"], output["kept"]) == ("blobs", first, 48)
    assert output["classes"] == {"even": 24, "odd": 24}
    assert [each["source"] for each in output["quarantined"]] == ["odd/bad.png"]
    shown_output = commands.run("show")
    assert "odd/worse.png" in shown_output
    assert "odd/bad.png" not in shown_output


def test_show_is_limited_without_the_all_option(commands: CommandLine) -> None:
    for number in range(30):
        (commands.folder / "images" / "even" / f"bad{number:02d}.png").write_text("no image")
    ingest(FOLDER, IngestConfig(source="images", size=8, held_out=0.33, max_quarantined=1))
    output = commands.run("show")
    assert output.count("/bad") == 20
    assert "11 more: --all shows them" in output
    assert commands.run("show", "--all").count("/bad") == 30
    assert len(commands.json("show")["quarantined"]) == 20
    assert len(commands.json("show", "--all")["quarantined"]) == 31
    assert commands.json("show")["quarantined_count"] == 31


def test_diff_compares_parent_and_current_version_by_default(commands: CommandLine) -> None:
    third, second, first = (each["digest"] for each in commands.json("log")["versions"])
    newest = commands.json("diff")
    assert (newest["before"], newest["after"], newest["same_content"]) == (second, third, True)
    assert [each["source"] for each in newest["quarantined"]["samples"]] == ["odd/worse.png"]
    whole = commands.json("diff", first[:12])
    assert (whole["before"], whole["after"], whole["kept"]) == (first, third, [48, 51])
    assert {each["source"] for each in whole["added"]["samples"]} == {"odd/100.png", "odd/101.png", "odd/bad.png"}
    back = commands.json("diff", second[:12], first[:12])
    assert (back["added"]["count"], back["removed"]["count"]) == (0, 3)
    assert "odd/100.png" in commands.run("diff", first[:12])


def test_checkout_and_back_needs_no_server(commands: CommandLine) -> None:
    new = files_of(FOLDER)
    third, second, first = (each["digest"] for each in commands.json("log")["versions"])
    result = commands.json("checkout", first[:12])
    assert (result["dataset"], result["digest"], result["kept"]) == ("blobs", first, 48)
    assert read_manifest(FOLDER).digest == first
    assert [each["digest"] for each in commands.json("log")["versions"]] == [third, second, first]
    assert commands.run("log").splitlines()[-1].startswith(f"* {first[:12]}")
    commands.run("checkout", third[:12])
    assert files_of(FOLDER) == new


def test_checkout_mends_what_earlier_versions_lack(commands: CommandLine) -> None:
    whole = files_of(FOLDER)
    third, second, first = (each["digest"] for each in commands.json("log")["versions"])
    commands.run("checkout", first[:12])
    commands.run("checkout", third[:12])
    (FOLDER / "versions" / f"{second[:16]}.json").unlink()
    assert f"checkout {third[:12]}" in commands.run("log", code=2)
    commands.run("checkout", third[:12])
    assert files_of(FOLDER) == whole


def test_checkout_gets_a_version_from_s3_on_a_new_machine(
    commands: CommandLine, bucket: str, s3_environment: dict[str, str]
) -> None:
    Repo.init(no_scm=True).close()
    source = f"s3://{bucket}/dvc"
    Catalog.of(FOLDER.name, source).publish(read_manifest(FOLDER), record_data(FOLDER, source).digest)
    expected, digest = files_of(FOLDER), read_manifest(FOLDER).digest
    for folder in (FOLDER, FOLDER.with_name(".blobs"), Path(".dvc")):
        shutil.rmtree(folder)
    FOLDER.with_suffix(".dvc").unlink()
    assert "run `darkroom up`" in commands.shell("checkout", digest, code=2)
    commands.variables = s3_environment | {"DARKROOM_BUCKET": bucket}
    result = json.loads(commands.shell("checkout", digest[:12], "--json"))
    assert (result["digest"], result["kept"]) == (digest, 51)
    assert files_of(FOLDER) == expected


def test_versions_in_the_bucket_are_found_on_a_new_machine(
    commands: CommandLine, bucket: str, s3_environment: dict[str, str]
) -> None:
    Repo.init(no_scm=True).close()
    publish(FOLDER, source := f"s3://{bucket}/dvc")
    expected, newest = files_of(FOLDER), read_manifest(FOLDER)
    for folder in (FOLDER, FOLDER.with_name(".blobs"), Path(".dvc")):
        shutil.rmtree(folder)
    FOLDER.with_suffix(".dvc").unlink()
    commands.monkeypatch.setenv("DARKROOM_BUCKET", bucket)

    assert "darkroom data checkout --dataset blobs" in commands.run("show", code=2)
    [entry] = commands.json("log")["versions"]
    assert (entry["digest"], entry["current"], entry["local"], entry["kept"]) == (newest.digest, False, False, 51)
    [row] = json.loads(commands.run("--json", command="ls"))["datasets"]
    assert (row["name"], row["version"], row["images"]) == ("blobs", newest.digest[:12], 51)
    assert "there is blobs" in commands.run("checkout", "--dataset", "faces", code=2)

    assert commands.json("checkout")["digest"] == newest.digest
    assert files_of(FOLDER) == expected
    [entry, *_] = commands.json("log")["versions"]
    assert (entry["digest"], entry["current"], entry["local"]) == (newest.digest, True, True)
    assert [row["place"] for row in json.loads(commands.run("--json", command="ls"))["datasets"]] == ["data/blobs"]
    # What was ingested here and is not published yet is not lost.
    blob(300).save("images/odd/300.png")
    ingest(FOLDER, IngestConfig(source="images", size=8, held_out=0.33, max_quarantined=1))
    unpublished = read_manifest(FOLDER).digest
    assert commands.json("checkout")["digest"] == newest.digest
    assert unpublished in {entry["digest"] for entry in commands.json("log")["versions"] if entry["local"]}
    assert Heads(Catalog.of("blobs", source)).newest() == newest.digest


def test_log_says_that_a_bucket_cannot_be_listed(commands: CommandLine) -> None:
    commands.monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        commands.monkeypatch.setenv(name, "x")
    output = commands.json("log")
    assert len(output["versions"]) == 3
    assert "127.0.0.1:9" in output["error"]


@pytest.mark.drill(
    "a checkout from this machine is killed",
    "SIGKILL at random moments, to an older version and back",
    "the same files",
)
@pytest.mark.slow
def test_a_checkout_killed_at_random_moments_ends_the_same(commands: CommandLine, kills: int) -> None:
    first = commands.json("log")["versions"][-1]["digest"]
    newest = read_manifest(FOLDER).digest
    expected = {}
    for digest in (first, newest):
        start = time.monotonic()
        commands.shell("checkout", digest)
        expected[digest] = files_of(FOLDER), FOLDER.with_suffix(".dvc").read_bytes()
    duration = time.monotonic() - start
    moments = random.Random(2)
    for number in range(kills):
        digest = (first, newest)[number % 2]
        process = commands.start("checkout", digest)
        time.sleep(moments.uniform(0.3, 1) * duration)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        commands.shell("checkout", digest)
        assert (files_of(FOLDER), FOLDER.with_suffix(".dvc").read_bytes()) == expected[digest]
        assert {each["digest"] for each in commands.json("log")["versions"]} > {first, newest}


def test_remove_lists_the_affected_images_first(commands: CommandLine) -> None:
    files = files_of(FOLDER)
    output = commands.json("remove", "odd/0?.png", "--dry-run")
    assert (output["dataset"], output["dry_run"], output["images"], len(output["image_keys"])) == ("blobs", True, 5, 5)
    assert commands.json("remove", output["image_keys"][0][:16], "--dry-run")["image_keys"] == output["image_keys"][:1]
    assert commands.json("remove", "*", "--label", "even", "--dry-run")["images"] == 24
    assert commands.json("remove", "--source", "odd/01.png", "--dry-run")["images"] == 1
    assert output["names"] == [f"odd/{number:02d}.png" for number in range(1, 10, 2)]
    assert all(f"  {name}\n" in commands.run("remove", "odd/0?.png", "--dry-run") for name in output["names"])
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
def test_data_command_errors_are_one_line_with_a_remedy(
    commands: CommandLine, arguments: list[str], words: str
) -> None:
    files = files_of(FOLDER)
    assert words in commands.run(*arguments, code=2)
    assert files_of(FOLDER) == files


def test_an_error_names_the_line_that_sets_the_field(commands: CommandLine) -> None:
    rest = "training:\n  dataset: blobs\ningest:\n  held_out: 0.33\n"
    Path("params.yaml").write_text(f"{rest}  size: 12\n")
    assert "ingest.size is set in params.yaml, line 5" in commands.run("images", "--local", command="ingest", code=2)
    Path("params.yaml").write_text(f"{rest}  size: 8\n")
    error = commands.run("images", "--local", "--set", "ingest.size=12", command="ingest", code=2)
    assert "params.yaml" not in error


def test_commands_that_need_no_server_take_local(commands: CommandLine) -> None:
    commands.monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    assert commands.json("log", "--local")["error"] is None
    for verb in ("show", "diff"):
        assert commands.json(verb, "--local") == commands.json(verb)


def test_the_first_version_has_nothing_to_be_compared_with(
    images: Path, tmp_path: Path, no_servers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "params.yaml").write_text("training: {dataset: blobs, images: 1}")
    ingest(FOLDER, IngestConfig(source="images", size=8))
    assert "is the first version" in CommandLine(tmp_path, monkeypatch).run("diff", code=2)


def test_curate_drops_by_rule_and_brings_back_without_a_server(commands: CommandLine) -> None:
    rule = ("--set", "curation.min_contrast=30", "--set", "curation.max_dropped=1")
    image_count = read_manifest(FOLDER).kept
    dry_run = json.loads(commands.run("curate", "--dry-run", "--json", *rule))
    assert dry_run["dry_run"] is True
    assert 0 < dry_run["dropped"] < image_count
    assert f"{dry_run['dropped']} would be dropped" in commands.run("curate", "--dry-run", *rule)
    assert read_manifest(FOLDER).kept == image_count
    result = json.loads(commands.run("curate", "--local", "--json", *rule))
    assert result["images"] == dry_run["images"]
    assert read_manifest(FOLDER).digest == result["digest"]
    assert "no new version" in commands.run("curate", "--local", *rule)
    assert "min_contrast = 30: contrast is" in commands.run("show")
    assert f"dropped now {result['dropped']}" in commands.run("diff")
    assert "curation" in commands.run("log").splitlines()[1]
    commands.run("curate", "--local")
    assert read_manifest(FOLDER).kept == image_count
    assert "give the path of an .html file" in commands.run("curate", "--report", "page.pdf", code=2)
    Path("file").touch()
    Path("folder.html").mkdir()
    for wrong in (["file/page.html"], ["folder.html"], ["/proc/none/page.html"]):
        assert "--report" in commands.run("curate", "--report", *wrong, code=2)
    for option in ("--dry-run", "--local"):
        assert option in commands.run("curate", "--report", "page.html", option, code=2)
    assert not Path("page.html").exists()
    assert "--set curation.max_nsfw=0.5" in commands.run("curate", "--set", "curation.max_nsfw=0.5", code=2)


def test_merge_takes_names_of_data_sets_and_no_paths(commands: CommandLine) -> None:
    shutil.copytree(FOLDER, "elsewhere")
    commands.run("merge", "../elsewhere", "--local", code=2)
    assert read_manifest(FOLDER).change == "ingest"


def test_curate_with_servers_needs_no_local_copy(commands: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(params: Params) -> None:
        raise UserError(f"curated {params.training.dataset}")

    monkeypatch.setattr("flows.cli.data_change_commands.connect", lambda *_: nullcontext())
    monkeypatch.setattr("flows.curate.curate", reached)
    shutil.rmtree(FOLDER)
    assert "curated blobs" in commands.run("curate", code=2)
