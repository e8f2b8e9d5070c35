"""What somebody altered who can write to the bucket, or to MLflow's tags, is noticed, named, and not run."""

import io
import json
import py_compile
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import dataclass
from functools import cached_property
from importlib.util import cache_from_source
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow.client import MlflowClient
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusion.common.errors import UserError
from diffusion.common.files import canonical_json, sha256_bytes
from diffusion.generation.config import Conditions
from diffusion.process.samplers import sampling_config
from flows import sample
from flows.config import Params, SamplingBatchConfig
from flows.provenance.reproduce import reproduce
from flows.provenance.trace import Trace, trace
from flows.registry import dependencies, model_versions
from flows.registry.model_versions import CODE, WEIGHTS, Version
from flows.retrain import RetrainRequest
from flows.sampling import batch_format, generate_batch
from flows.sampling.batch_format import SamplingBatch
from flows.sampling.consistency import find_disagreements
from flows.sampling.lookup import find
from flows.storage.s3 import Location, Object, Store
from flows.storage.tags import parse_model_uri
from tests.builders.built_datasets import BuiltDataset, image_record
from tests.builders.command_line import servers_forgotten
from tests.builders.small_models import write_model

BUCKET = "tampering"
SAMPLING = sampling_config(sampler="dpmpp_2m", steps=2, compute_batch=4)
CONDITIONS = Conditions(labels=("even", "odd"))
IMAGE, CHUNK = 5, 1
"""An image that is not in the first of the two chunks."""
NAME, PART = f"0000000{IMAGE}.png", f"manifest/part-0000{CHUNK}.jsonl"


@dataclass
class Samples:
    """A registered model of random weights, and batches of it, as files and in tars."""

    store: Store
    client: MlflowClient
    version: Version
    places: dict[str, Location]

    def files(self, kind: str) -> dict[str, bytes]:
        place = self.places[kind]
        keys = self.store.list_keys(place.bucket, place.key(""))
        return {key.removeprefix(place.key("")): self.store.get(place.bucket, key) for key in keys}

    def beside(self, name: str, files: dict[str, bytes]) -> Location:
        """A batch of these files under the prefix ``name``."""
        place = Location(BUCKET, name)
        self.store.put_many(BUCKET, [Object(place.key(file), data) for file, data in files.items()])
        return place

    @cached_property
    def usual(self) -> Trace:
        """What is said of an image before anything was altered: there is no data set behind the model."""
        return trace(f"{self.places['png']}/{NAME}")

    def disagreements(self, place: Location, index: int | None) -> list[str]:
        batch = find(str(place), self.store, BUCKET).batch
        assert batch is not None
        return find_disagreements(self.store, batch, place, index)

    @property
    def model_folder(self) -> Path:
        """Where the files of the registered model lie, as they lie in the bucket of a real server."""
        source = self.client.get_model_version_download_uri(self.version.model, str(self.version.number))
        return Path(urlparse(source).path)


@pytest.fixture(scope="module")
def samples(
    s3_server: dict[str, str], mlflow_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Samples]:
    home = tmp_path_factory.mktemp("sampled")
    (home / "mlflow.db").write_bytes(mlflow_template.read_bytes())
    variables = {"MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db", "DARKROOM_BUCKET": BUCKET}
    with servers_forgotten(**s3_server, **variables), chdir(home):
        yield _sampled(Store(), MlflowClient())


def _sampled(store: Store, client: MlflowClient) -> Samples:
    store.ensure_bucket(BUCKET)
    weights = write_model(Path("weights.safetensors"), 1, 0, classes={"even": 3, "odd": 1})
    run = client.create_run(client.create_experiment("blobs"))
    version = model_versions.register("blobs", run.info.run_id, weights, SAMPLING, {}, 0)
    places = {}
    for kind in ("png", "tar"):
        config = SamplingBatchConfig(format=kind, chunk=4)  # type: ignore[arg-type]
        batch, place = sample.begin.fn(version, weights, SAMPLING, config, 8, 5, None, CONDITIONS)
        for chunk in range(len(batch.chunks())):
            generate_batch.fetch_and_generate(batch, place, version, config, chunk)
        generate_batch.finish(store, batch, place)
        places[kind] = place
    return Samples(store, client, version, places)


def brightened(png: bytes) -> bytes:
    image = Image.open(io.BytesIO(png))
    about = PngInfo()
    for name, text in image.text.items():  # type: ignore[attr-defined]
        about.add_text(name, text)
    buffer = io.BytesIO()
    Image.fromarray(255 - np.array(image)).save(buffer, "PNG", pnginfo=about)
    return buffer.getvalue()


def relabelled_part(data: bytes) -> bytes:
    rows = batch_format.part_rows(data, "part")
    return batch_format.part_bytes(row | {"label": "even"} for row in rows)


def relabelled_table(data: bytes) -> bytes:
    sink, file = io.BytesIO(), pq.ParquetFile(io.BytesIO(data))
    with pq.ParquetWriter(sink, file.schema_arrow) as writer:
        for group in range(file.num_row_groups):
            rows = [row | {"label": "even"} for row in file.read_row_group(group).to_pylist()]
            writer.write_table(pa.Table.from_pylist(rows, file.schema_arrow))
    return sink.getvalue()


def other_steps(data: bytes) -> bytes:
    about = json.loads(data)
    about["sampling"]["steps"] = 3
    return canonical_json(about).encode()


def other_digest(data: bytes) -> bytes:
    return data.replace(data[-20:-3], b"0" * 17)


Change = Callable[[bytes], bytes]
RECORDS: list[tuple[str, Change | None]] = [
    (PART, relabelled_part),
    (PART, lambda _: b"junk\n"),
    (PART, lambda data: data.replace(b'"seed":5', b'"seed":' + b"9" * 5000)),
    (PART, None),
    ("manifest.parquet", relabelled_table),
    ("manifest.parquet", lambda _: b"junk"),
    ("manifest.parquet", None),
    ("batch.json", other_steps),
    ("_SUCCESS", lambda _: b""),
    ("_SUCCESS", lambda data: data.replace(PART.encode(), b"manifest/part-00009.jsonl")),
]


@pytest.mark.parametrize(("name", "change"), RECORDS)
def test_a_record_of_a_batch_that_was_altered_is_named(
    samples: Samples, tmp_path: Path, name: str, change: Change | None
) -> None:
    assert samples.disagreements(samples.places["png"], None) == []
    files = samples.files("png")
    original = files.pop(name)
    if change is not None:
        files[name] = change(original)
        assert files[name] != original
    place = samples.beside(tmp_path.name, files)
    for index in (IMAGE, None):
        disagreements = samples.disagreements(place, index)
        assert any(f"{place}/{name}" in words for words in disagreements), disagreements
        assert not any("\n" in words for words in disagreements)


@pytest.mark.parametrize(
    ("kind", "added"),
    [
        ("png", "logo.gif"),
        ("png", "00000008.png"),
        ("png", "000000001.png"),
        ("png", "samples-00000.tar"),
        ("png", "manifest/part-00002.jsonl"),
        ("png", "more/00000001.png"),
        ("tar", "00000001.png"),
        ("tar", "samples-00002.tar"),
    ],
)
def test_an_object_that_was_added_to_a_batch_is_named(samples: Samples, tmp_path: Path, kind: str, added: str) -> None:
    place = samples.beside(f"{tmp_path.name}-{kind}", samples.files(kind) | {added: b"added"})
    (words,) = samples.disagreements(place, None)
    assert f"{place}/{added}" in words
    batch = find(str(place), samples.store, BUCKET).batch
    assert generate_batch.list_unfinished_chunks(samples.store, batch, place) == []


@pytest.mark.parametrize(("kind", "gone"), [("png", NAME), ("tar", f"samples-0000{CHUNK}.tar")])
def test_images_that_are_gone_from_a_batch_are_counted(samples: Samples, tmp_path: Path, kind: str, gone: str) -> None:
    files = samples.files(kind)
    del files[gone]
    (words,) = samples.disagreements(samples.beside(f"{tmp_path.name}-{kind}", files), None)
    assert words.startswith("1 ")


def test_trace_lists_disagreements_of_the_records(samples: Samples) -> None:
    files = samples.files("png")
    place = samples.beside("relabelled", files | {PART: relabelled_part(files[PART])})
    new = [words for words in trace(f"{place}/{NAME}").broken if words not in samples.usual.broken]
    assert [name in words for words, name in zip(new, ("_SUCCESS", "batch.json", "manifest.parquet"), strict=True)]
    assert all(PART in words for words in new)


def test_only_the_altered_image_is_named(samples: Samples) -> None:
    files = samples.files("png")
    place = samples.beside("brightened", files | {NAME: brightened(files[NAME])})
    (words,) = set(trace(f"{place}/{NAME}").broken) - set(samples.usual.broken)
    assert f"{place}/{NAME} was altered" in words


def test_json_beside_an_image_in_a_tar_is_verified(samples: Samples) -> None:
    tar = f"samples-0000{CHUNK}.tar"
    assert samples.disagreements(samples.places["tar"], IMAGE) == []
    files = samples.files("tar")
    altered = files[tar].replace(b'"label":"odd"', b'"label":"eve"')
    assert altered != files[tar]
    place = samples.beside("relabelled-tar", files | {tar: altered})
    (words,) = samples.disagreements(place, IMAGE)
    assert f"{place}/{tar}/{NAME.replace('.png', '.json')}" in words


def test_a_batch_with_a_part_of_another_is_not_finished(samples: Samples) -> None:
    files = {name: data for name, data in samples.files("png").items() if name not in ("manifest.parquet", "_SUCCESS")}
    files[PART] = files["manifest/part-00000.jsonl"]
    place = samples.beside("mixed", files)
    batch = batch_format.parse_batch(files["batch.json"], "batch.json")
    with pytest.raises(UserError, match=f"{PART} is not of this batch"):
        generate_batch.finish(samples.store, batch, place)
    assert not samples.store.exists(BUCKET, place.key("_SUCCESS"))


def test_texts_with_unicodes_ends_of_lines_stay_in_their_row() -> None:
    rows = batch_format.part_rows(batch_format.part_bytes([row_with("a\u2028b\x85c"), row_with("d")]), "part")
    assert [row["prompt"] for row in rows] == ["a\u2028b\x85c", "d"]


def row_with(prompt: str) -> batch_format.Row:
    return {
        **dict.fromkeys(("content_digest", "weights_sha256", "sha256", "pixels_sha256"), "0" * 64),
        **dict.fromkeys(("label", "negative_prompt", "guidance")),
        **{"key": "00000000.png", "index": 0, "seed": 1, "model": "blobs", "version": 1, "run_id": "r"},
        **{"fingerprint": "{}", "prompt": prompt},
    }


def touches(path: Path) -> str:
    return f"open({str(path)!r}, 'w').close()\n"


def changed_module(code: Path, mark: Path) -> None:
    with (code / "diffusion" / "generation" / "generate.py").open("a") as file:
        file.write(touches(mark))


def planted_sitecustomize(code: Path, mark: Path) -> None:
    (code / "sitecustomize.py").write_text(touches(mark))


def planted_library(code: Path, mark: Path) -> None:
    (code / "pydantic.py").write_text(touches(mark))


def planted_bytecode(code: Path, mark: Path) -> None:
    """Bytecode that Python takes for current without looking at the source."""
    source = code / "diffusion" / "generation" / "generate.py"
    evil = mark.with_name("evil.py")
    evil.write_text(source.read_text() + touches(mark))
    target = Path(cache_from_source(str(source)))
    py_compile.compile(str(evil), str(target), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)


def missing_module(code: Path, mark: Path) -> None:
    (code / "diffusion" / "generation" / "super_resolution.py").unlink()


def changed_script(code: Path, mark: Path) -> None:
    with (code.parent / "pyfunc_model.py").open("a") as file:
        file.write(touches(mark))


def link(code: Path, mark: Path) -> None:
    (code / "diffusion" / "beside.py").symlink_to(code / "diffusion" / "common" / "errors.py")


def no_code(code: Path, mark: Path) -> None:
    for path in sorted(code.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.fixture
def code(samples: Samples) -> Iterator[Path]:
    """The folder of the code that the version ships, put back afterwards."""
    folder = samples.model_folder / "code"
    script = folder.parent / "pyfunc_model.py"
    before = {path: path.read_bytes() for path in (*folder.rglob("*"), script) if path.is_file()}
    yield folder
    for path in (*folder.rglob("*"), script):
        if path.is_symlink() or (path.is_file() and path not in before):
            path.unlink()
    for path, data in before.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


TAMPERED = [
    changed_module,
    planted_sitecustomize,
    planted_library,
    planted_bytecode,
    missing_module,
    changed_script,
    link,
    no_code,
]


@pytest.mark.parametrize("tamper", TAMPERED)
def test_code_that_was_altered_after_its_registration_is_not_run(
    samples: Samples, code: Path, tmp_path: Path, tamper: Callable[[Path, Path], None]
) -> None:
    mark, where = tmp_path / "ran", f"{samples.places['png']}/{NAME}"
    assert samples.version.code_sha256 is not None
    assert samples.usual.model.code_sha256 == samples.version.code_sha256
    tamper(code, mark)
    with pytest.raises(UserError, match=samples.version.uri) as error:
        reproduce(where)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    assert not mark.exists()
    (words,) = set(trace(where).broken) - set(samples.usual.broken)
    assert words == str(error.value)


def test_code_runs_only_if_version_and_batch_agree(samples: Samples) -> None:
    files, name, number = samples.files("png"), samples.version.model, str(samples.version.number)
    about = json.loads(files["batch.json"])
    assert about["code_sha256"] == samples.version.code_sha256
    for change in ({"code_sha256": "0" * 64}, {"code_sha256": None}):
        fields = {name: value for name, value in (about | change).items() if value is not None}
        place = samples.beside(
            f"code-{fields.get('code_sha256')}", files | {"batch.json": canonical_json(fields).encode()}
        )
        with pytest.raises(UserError, match="do not agree"):
            reproduce(f"{place}/{NAME}")
        assert any(CODE in words for words in trace(f"{place}/{NAME}").broken)
    samples.client.delete_model_version_tag(name, number, CODE)
    try:
        with pytest.raises(UserError, match=f"has no tag {CODE}"):
            reproduce(f"{samples.places['png']}/{NAME}")
        assert any(CODE in words for words in trace(f"{samples.places['png']}/{NAME}").broken)
    finally:
        samples.client.set_model_version_tag(name, number, CODE, str(samples.version.code_sha256))


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        (WEIGHTS, "../../../x"),
        (WEIGHTS, "/etc/passwd"),
        (WEIGHTS, "A" * 64),
        (WEIGHTS, "0" * 64 + "\n"),
        (CODE, "0"),
        ("darkroom.dataset", "../../x"),
        ("darkroom.dataset", "a' or 'b"),
        ("darkroom.dvc_digest", "../../x.dir"),
        ("darkroom.content_digest", "' OR '1'='1"),
        ("darkroom.autoencoder", "http://127.0.0.1/"),
        ("darkroom.takedown", "\x1b[2J"),
    ],
)
def test_a_malformed_tag_is_named(samples: Samples, tag: str, value: str) -> None:
    client, name, number = samples.client, samples.version.model, str(samples.version.number)
    before = client.get_model_version(name, number).tags.get(tag)
    client.set_model_version_tag(name, number, tag, value)
    try:
        with pytest.raises(UserError, match=f"{samples.version.uri} has the tag {tag}") as error:
            sample.fetch.fn(samples.version.uri)
        assert str(error.value).isprintable()
        if tag == "darkroom.takedown":
            assert any(tag in words for words in trace(str(samples.places["png"])).broken)
    finally:
        if before is None:
            client.delete_model_version_tag(name, number, tag)
        else:
            client.set_model_version_tag(name, number, tag, before)


def test_weights_are_fetched_only_by_a_digest(samples: Samples, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights_sha256"):
        Version(model="blobs", number=1, run_id="r", weights_sha256="../x", tags={})
    with pytest.raises(UserError, match=f"has no tag {WEIGHTS}"):
        model_versions.cached_weights(samples.version.model_copy(update={"weights_sha256": ""}), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "uri",
    [
        "models:/x/" + "9" * 10,
        "models:/x/" + "9" * 5000,
        "models:/x/²",
        "models:/x/٣",
        "models:/x/-1",
        "models:/x/0",
        "models:/../1",
        "models:/x\n/1",
        "models:/a'b/1",
        f"models:/{'x' * 300}/1",
        "models:/x@a b",
    ],
)
def test_invalid_model_uri_fails_without_a_request(uri: str) -> None:
    with pytest.raises(UserError, match="names no model version") as error:
        parse_model_uri(uri)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "texts",
    [
        {"model": "models:/blobs/" + "9" * 30},
        {"model": "models:/blobs/" + "9" * 5000},
        {"model": "models:/../1"},
        {"seed": "9" * 4000},
        {"seed": "-1"},
        {"seed": "٣"},
        {"index": "9" * 4000},
        {"index": "1e9"},
        {"run_id": "../../x"},
        {"content_digest": "x"},
        {"task": "x" * 1000},
    ],
)
def test_image_with_invalid_png_metadata_is_not_recognized(
    texts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = PngInfo()
    usual = {"model": "models:/blobs/1", "run_id": "r", "content_digest": "0" * 64, "seed": "1", "index": "0"}
    for name, text in (usual | texts).items():
        about.add_text(f"darkroom:{name}", text)
    Image.new("L", (4, 4)).save(tmp_path / "x.png", pnginfo=about)
    for name in ("AWS_ENDPOINT_URL_S3", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody answers
    with pytest.raises(UserError, match="names no registered model"):
        find(str(tmp_path / "x.png"), Store(), BUCKET)


@pytest.mark.parametrize(
    "change",
    [
        {"count": 10**18},
        {"count": 10**7, "chunk": 1},
        {"chunk": -4},
        {"seed": 2**70},
        {"model": "../x"},
        {"version": 10**12},
        {"run_id": "a/b"},
        {"weights_sha256": "../x"},
        {"requests": {"digest": "../../x", "columns": ["label"]}},
        {"sampling": {"compute_batch": 10**9}},
    ],
)
def test_invalid_batch_description_is_an_error(samples: Samples, change: dict[str, object]) -> None:
    about = json.loads(samples.files("png")["batch.json"])
    with pytest.raises(UserError, match="somewhere is damaged"):
        batch_format.parse_batch(canonical_json(about | change).encode(), "somewhere")
    assert isinstance(batch_format.parse_batch(canonical_json(about).encode(), "somewhere"), SamplingBatch)


def test_a_batch_that_cannot_be_read_hides_no_other(
    samples: Samples, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = f"samples/blobs/{samples.version.number}/a-batch/batch.json"
    samples.store.put_many(BUCKET, [Object(key, b"junk")])
    (tmp_path / "copy.png").write_bytes(samples.files("png")[NAME])
    try:
        batch = find(str(tmp_path / "copy.png"), samples.store, BUCKET)
    finally:
        samples.store.delete_many(BUCKET, [key])
    assert batch.place in samples.places.values()
    assert key in caplog.text


def test_an_object_of_absurd_size_is_rejected_unread(samples: Samples) -> None:
    samples.store.put_many(BUCKET, [Object("large", b"x" * 1000)])
    for read in (samples.store.get, lambda *of: samples.store.fetch(of[0], of[1], Path("never"), of[2])):
        with pytest.raises(UserError, match="has 1000 bytes"):
            read(BUCKET, "large", 999)
    assert not Path("never").exists()
    assert samples.store.get(BUCKET, "large", 1000) == b"x" * 1000


def test_notes_that_cannot_be_read_are_named(
    samples: Samples, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = BuiltDataset(tmp_path / "data" / "blobs", 8, "blobs").version(
        [image_record(np.zeros((8, 8), np.uint8), "a")]
    )
    params = Params.model_validate({"training": {"dataset": "blobs", "init_from": "models:/blobs/1"}})
    request = RetrainRequest.of(params, manifest, 1, 0, None, CONDITIONS)
    note = f"retrained/{request.model}/{request.key}.json"
    for junk in (b"junk", b"[]", b'{"verdict": 1}'):
        samples.store.client.put_object(Bucket=BUCKET, Key=note, Body=junk)
        assert request.find_earlier_result() is None
        assert note in caplog.text
    begun = dependencies.resolve_start(params, "models:/blobs/1")
    assert begun is not None
    (key,) = (key for key in samples.store.list_keys(BUCKET, "starts/") if key.endswith(".json"))
    samples.store.client.put_object(Bucket=BUCKET, Key=key, Body=b"junk")
    with pytest.raises(UserError, match=key):
        dependencies.resolve_start(params, "models:/blobs/1")
    assert sha256_bytes(samples.store.get(BUCKET, key)) == sha256_bytes(b"junk")
