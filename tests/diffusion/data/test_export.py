"""Data sets out and in again: the same content, in every format, described so that others read it."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlcroissant
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

import diffusion.data.export.base
from diffusion.common.errors import UserError
from diffusion.common.files import sha256_file
from diffusion.data.export import FORMATS
from diffusion.data.export.base import ExportDetails
from diffusion.data.export.export import DatasetExport, export_dataset
from diffusion.data.export.hub import export_to_hub
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.manifest import Manifest, read_manifest, work_folder
from tests.builders import ROOT
from tests.builders.ingested import records
from tests.hub import TOKEN, Hub

SIZE, COUNT = 12, 40
DETAILS = ExportDetails(licence="CC-BY-4.0", creator="A. Painter", url="https://example.org/faces")
SOURCES = {"imagefolder": "", "parquet": "parquet:", "webdataset": "wds:"}
formats = pytest.mark.parametrize("to", SOURCES)


def make_dataset(root: Path, captions: bool = True, labels: bool = True, mode: str = "RGB") -> Path:
    """Images of noise, of which some have classes and captions, one with line breaks and quotes."""
    source = root / "source"
    source.mkdir(parents=True)
    lines = []
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(source / f"{number:02d}.png")
        record: dict[str, Any] = {"file_name": f"{number:02d}.png"}
        if labels and number % 7:
            record["label"] = ("cat", "dog, wet")[number % 2]
        if captions and number % 5:
            record["text"] = f'number "{number}",\nдва' if number == 3 else f"number {number}"
        lines.append(json.dumps(record))
    (source / "metadata.jsonl").write_text("\n".join(lines))
    ingest(root / "faces", IngestConfig(source=str(source), size=SIZE, held_out=0.3, licence="CC0-1.0"))
    return root / "faces"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("made"))


def ingested_again(export: Path, to: str, folder: Path) -> Manifest:
    ingest(folder, IngestConfig(source=f"{SOURCES[to]}{export}", size=SIZE, held_out=0.3))
    return read_manifest(folder)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@formats
@pytest.mark.parametrize("texts", [{}, {"captions": False}, {"labels": False, "mode": "L"}], ids=str)
def test_the_content_digest_comes_again(tmp_path: Path, to: str, texts: dict[str, Any]) -> None:
    folder = make_dataset(tmp_path, **texts)
    result = export_dataset(folder, to, tmp_path / "out", DETAILS)
    assert (result.images, sum(result.splits.values()), result.created) == (COUNT, COUNT, True)
    again = ingested_again(tmp_path / "out", to, tmp_path / "again")
    assert again.content_digest == read_manifest(folder).content_digest
    assert [part.outcomes for part in again.parts] == [{"kept": sum(part.outcomes.values())} for part in again.parts]


@formats
def test_croissant_is_valid_and_reads_every_record(data: Path, tmp_path: Path, to: str) -> None:
    export_dataset(data, to, tmp_path / "out", DETAILS)
    dataset = mlcroissant.Dataset(tmp_path / "out" / "croissant.json")
    issues = dataset.metadata.ctx.issues
    assert not issues.errors
    assert dataset.metadata.ctx.is_v1_1()
    assert not [warning for warning in issues.warnings if "citeAs" not in warning]
    assert dataset.metadata.license == ["CC-BY-4.0"]
    assert dataset.metadata.data_biases
    assert dataset.metadata.data_preprocessing_protocol
    names = read_manifest(data).labels
    found = {}
    for record in dataset.records("images"):
        values = {name.partition("/")[2]: value for name, value in record.items()}
        image, text = values["image"], values.get("text")
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        label = values.get("label")
        if isinstance(label, int | float | np.number):
            label = None if np.isnan(label) else names[int(label)]
        found[np.asarray(image.convert("RGB")).tobytes()] = (
            _text(label),
            _text(text),
            values["split"].decode() if isinstance(values["split"], bytes) else values["split"],
        )
    expected = {}
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        [row] = [row for row in records(data) if row["source"] == f"{number:02d}.png"]
        split = "train" if row["split"] == "train" else "test"
        expected[pixels.tobytes()] = row["label"], row["caption"], split
    assert found == expected


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        value = value.decode()
    return value if isinstance(value, str) else None


def test_parquet_has_the_types_of_hugging_face(data: Path, tmp_path: Path) -> None:
    export_dataset(data, "parquet", tmp_path / "out", DETAILS)
    files = sorted((tmp_path / "out" / "data").iterdir())
    assert [path.name for path in files] == ["test-00000-of-00001.parquet", "train-00000-of-00001.parquet"]
    schema = pq.read_schema(files[0])
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features["label"] == {"names": ["cat", "dog, wet"], "_type": "ClassLabel"}
    assert features["text"] == {"dtype": "string", "_type": "Value"}
    card = (tmp_path / "out" / "README.md").read_text()
    about = yaml.safe_load(card.split("---")[1])
    assert about["license"] == "cc-by-4.0"
    assert about["configs"][0]["data_files"] == [
        {"split": "train", "path": "data/train-*"},
        {"split": "test", "path": "data/test-*"},
    ]


def test_webdataset_has_text_members(data: Path, tmp_path: Path) -> None:
    export_dataset(data, "webdataset", tmp_path / "out")
    keys: dict[str, set[str]] = {}
    for path in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                keys.setdefault(name.partition(".")[0], set()).add(name.partition(".")[2])
    assert set(keys) == {row["key"] for row in records(data)}
    assert sum("txt" in extensions for extensions in keys.values()) == sum(bool(r["caption"]) for r in records(data))
    assert all({"png", "json"} <= extensions for extensions in keys.values())


@formats
def test_the_same_export_again_changes_nothing(data: Path, tmp_path: Path, to: str) -> None:
    first = export_dataset(data, to, tmp_path / "out", DETAILS)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "out").rglob("*.*")}
    again = export_dataset(data, to, tmp_path / "out", DETAILS)
    assert again == first.model_copy(update={"created": False})
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    # The sums are those that `sha256sum -c` verifies.
    for line in (tmp_path / "out" / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert sha256_file(tmp_path / "out" / name) == digest


def _damage(folder: Path) -> None:
    path = next(folder.rglob("*.png"))
    path.write_bytes(path.read_bytes()[:-1])


CONFLICTS: dict[str, Callable[[Path], object]] = {
    "damaged": _damage,
    "missing": lambda folder: next(folder.rglob("*.png")).unlink(),
    "one more": lambda folder: (folder / "more.png").write_bytes(b""),
    "no sums": lambda folder: (folder / "SHA256SUMS").unlink(),
    "something else": lambda folder: (folder / "croissant.json").unlink(),
    "broken": lambda folder: (folder / "croissant.json").write_text("[]"),
}


@pytest.mark.parametrize("change", CONFLICTS.values(), ids=CONFLICTS)
def test_a_folder_that_holds_something_else_stays(data: Path, tmp_path: Path, change: Callable[[Path], object]) -> None:
    export_dataset(data, "imagefolder", tmp_path / "out", DETAILS)
    change(tmp_path / "out")
    before = files_of(tmp_path / "out")
    with pytest.raises(UserError):
        export_dataset(data, "imagefolder", tmp_path / "out", DETAILS)
    assert files_of(tmp_path / "out") == before


def test_other_options_need_another_folder(data: Path, tmp_path: Path) -> None:
    export_dataset(data, "parquet", tmp_path / "out", DETAILS)
    with pytest.raises(UserError, match="other options"):
        export_dataset(data, "parquet", tmp_path / "out")
    with pytest.raises(UserError, match="other options"):
        export_dataset(data, "webdataset", tmp_path / "out", DETAILS)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        export_dataset(data, "parquet", tmp_path / "file")


@formats
def test_many_files_and_exceptions_in_between(
    data: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusion.data.export.base, "FILE_BYTES", 4000)
    export_dataset(data, to, tmp_path / "whole", DETAILS)
    if to != "imagefolder":
        assert len(list((tmp_path / "whole").rglob("*-of-*"))) > 4

    class Interrupted(Exception):
        pass

    def stop(*_: object) -> None:
        raise Interrupted

    for _ in range(2):
        with pytest.raises(Interrupted):
            export_dataset(data, to, tmp_path / "cut", DETAILS, stop)
        assert not (tmp_path / "cut").exists()
    export_dataset(data, to, tmp_path / "cut", DETAILS)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]


SCRIPT = """
import sys
from pathlib import Path
import diffusion.data.export.base
from diffusion.data.export.base import ExportDetails
from diffusion.data.export.export import export_dataset
diffusion.data.export.base.FILE_BYTES = 4000
print("ready", flush=True)
export_dataset(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), ExportDetails(licence="CC0-1.0"))
"""


@pytest.mark.slow
@pytest.mark.long
@formats
def test_killed_exports_end_the_same(data: Path, tmp_path: Path, to: str) -> None:
    def start(output: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", SCRIPT, str(data), to, str(output)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    begin = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    seconds = time.monotonic() - begin
    moments = random.Random(0)
    for _ in range(8):
        process = start(tmp_path / "cut")
        time.sleep(moments.uniform(0, 0.5) * seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if (tmp_path / "cut").exists():
            break
    assert start(tmp_path / "cut").wait() == 0
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_every_format_is_in_the_table_once() -> None:
    assert set(FORMATS) == set(SOURCES)
    assert {name: kind.scheme for name, kind in FORMATS.items()} == SOURCES


@pytest.fixture
def token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def test_the_hub_gets_one_commit_and_gives_the_same_content(data: Path, tmp_path: Path, hub: Hub, token: None) -> None:
    result = export_to_hub(data, "hf://me/faces", DETAILS)
    repo = hub.repos["dataset", "me/faces"]
    assert repo.private
    assert (result.created, result.pushed.commit, result.place) == (True, repo.refs["main"], "hf://datasets/me/faces")
    assert {"README.md", "croissant.json", "SHA256SUMS", "data/train-00000-of-00001.parquet"} <= set(repo.files)
    exports = work_folder(data) / "exports"
    assert not [path for path in exports.iterdir() if path.is_dir()]
    asked = len(hub.paths("", "PUT"))
    again = export_to_hub(data, "hf://datasets/me/faces", DETAILS)
    assert (again.created, again.pushed.commit, len(hub.paths("", "PUT"))) == (False, repo.refs["main"], asked)
    config = IngestConfig(source="hf://datasets/me/faces?split=all", size=SIZE, held_out=0.3)
    ingest(tmp_path / "again", config)
    manifest = read_manifest(tmp_path / "again")
    assert manifest.content_digest == read_manifest(data).content_digest
    assert manifest.licence == "cc-by-4.0"


def test_lost_answers_and_changed_files_are_pushed_again(data: Path, hub: Hub, token: None) -> None:
    hub.drop_commits, hub.drop_uploads = 1, 1
    result = export_to_hub(data, "hf://me/faces", DETAILS)
    repo = hub.repos["dataset", "me/faces"]
    assert len(repo.commits) == 2
    assert result.pushed.commit == repo.refs["main"]
    whole = dict(repo.files)
    # Somebody removes a file, and adds one of their own.
    repo.commit({name: value for name, value in whole.items() if ".parquet" not in name} | {"mine.txt": b"1"})
    assert export_to_hub(data, "hf://me/faces", DETAILS).created
    assert repo.files == whole | {"mine.txt": b"1"}
    other = export_to_hub(data, "hf://me/faces", DETAILS.model_copy(update={"licence": "CC0-1.0"}))
    assert other.created
    assert b"license: cc0-1.0" in repo.files["README.md"]


@pytest.mark.parametrize("uri", ["me/faces", "hf://faces", "hf://datasets/me/faces@main"])
def test_other_names_on_the_hub_are_errors(data: Path, hub: Hub, token: None, uri: str) -> None:
    with pytest.raises(UserError):
        export_to_hub(data, uri)


def test_a_push_without_token_is_an_error(data: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match="HF_TOKEN"):
        export_to_hub(data, "hf://me/faces")


def test_an_empty_or_damaged_data_set_is_an_error(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path)
    shard = folder / read_manifest(folder).shards[0].name
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="shard"):
        export_dataset(folder, "parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_result_says_what_is_unknown(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path)
    result: DatasetExport = export_dataset(folder, "parquet", tmp_path / "out")
    assert result.licence == "CC0-1.0"
    about = json.loads((tmp_path / "out" / "croissant.json").read_text())
    assert about["rai:dataBiases"] == ["Not recorded: to be filled in by the publisher."]
