"""From a generated image back to the shards, with every break named; and the same image again, in another process."""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import dataclass
from importlib.metadata import version as installed
from operator import attrgetter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dvc.repo import Repo
from mlflow.client import MlflowClient
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusion.checkpoints import export
from diffusion.common.errors import UserError
from diffusion.common.files import canonical_json, sha256_bytes
from diffusion.common.image_grids import GRID, encode_png_with_metadata
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.manifest import Manifest, read_manifest
from diffusion.generation.config import UNCONDITIONAL, Conditions, make_request
from diffusion.generation.requests import generate_to_folder
from diffusion.process.samplers import sampling_config
from flows import sample
from flows.config import SamplingBatchConfig
from flows.datasets.catalog import Catalog
from flows.datasets.dvc import CodeVersion, DataVersion, record_data
from flows.provenance.reproduce import ImageComparison, Reproduction, changed_libraries, compare, reproduce
from flows.provenance.trace import trace
from flows.registry import model_versions
from flows.registry.model_versions import Version
from flows.registry.takedown_marks import ANCESTORS, TAKEDOWN
from flows.sampling import batch_format, generate_batch
from flows.sampling.batch_format import SamplingBatch
from flows.sampling.lookup import LocatedImage
from flows.storage.s3 import Location, Object, Store
from flows.tracking.runs import open_run
from tests.builders.command_line import servers_forgotten
from tests.builders.removals import REMOVAL
from tests.builders.shapes import disc
from tests.builders.training_runs import run as train

FOLDER = Path("data/blobs")
SOURCE = "s3://provenance/dvc"
SAMPLING = sampling_config(sampler="dpmpp_2m", steps=3, compute_batch=4)
CONDITIONS = Conditions(labels=("even", "odd", None))
SAMPLING_BATCH = SamplingBatchConfig()
outcome_of = attrgetter("images", "exact", "differences", "failure")
errors_of = attrgetter("largest_error", "differing_pixels")


@dataclass
class StoredBatch:
    """A batch on S3 and the records that its lineage leads through."""

    store: Store
    client: MlflowClient
    manifest: Manifest
    data: DataVersion
    run_id: str
    version: Version
    batch: SamplingBatch
    place: Location

    @property
    def image(self) -> str:
        """Address of the last sample, which is not in the first chunk."""
        return f"{self.place}/00000017.png"

    @property
    def png(self) -> bytes:
        return self.store.get(self.place.bucket, self.place.key("00000017.png"))

    def beside(self, name: str, change: dict[str, bytes | None]) -> Location:
        """The batch once more under the prefix ``name``, but for what is in ``change``."""
        place = Location(self.place.bucket, name)
        for key in self.store.list_keys(self.place.bucket, self.place.key("")):
            file = key.removeprefix(self.place.key(""))
            data = change.get(file, self.store.get(self.place.bucket, key))
            if data is not None:
                self.store.put_many(place.bucket, [Object(place.key(file), data)])
        return place


@pytest.fixture(scope="module")
def stored_batch(s3_server: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoredBatch]:
    """Images, a data set on S3, a run and a model in an MLflow without a server, and 18 samples on S3."""
    home = tmp_path_factory.mktemp("made")
    variables = {"MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db", "DARKROOM_BUCKET": "provenance"}
    with servers_forgotten(**s3_server, **variables), chdir(home):
        yield make(Store(), MlflowClient())


def make(store: Store, client: MlflowClient) -> StoredBatch:
    store.ensure_bucket("provenance")
    Repo.init(no_scm=True).close()
    for number in range(36):
        path = Path("images", "even" if number % 2 == 0 else "odd", f"{number:03d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        disc(number).save(path)
    ingest(FOLDER, IngestConfig(source="images", size=8, held_out=0.33))
    data, manifest = record_data(FOLDER, SOURCE), read_manifest(FOLDER)
    Catalog.of("blobs", SOURCE, store).publish(manifest, data.digest)
    run = train(FOLDER, Path("run"))
    code = CodeVersion(commit="c0ffee", dirty=True)
    tracker = open_run("blobs", run.train_key, {}, manifest, code, data, SOURCE, restart=False)
    tracker.log_file(FOLDER / "manifest.json", "dataset")
    tracker.finish()
    export(run.final, weights := Path("weights.safetensors"))
    tags = {"darkroom.dataset": "blobs", "darkroom.dvc_digest": data.digest}
    version = model_versions.register("blobs", tracker.run_id, weights, SAMPLING, tags, run.images)
    client.set_registered_model_alias("blobs", "champion", str(version.number))
    batch, place = sample.begin.fn(version, weights, SAMPLING, SAMPLING_BATCH, 18, 5, None, CONDITIONS)
    for chunk in range(len(batch.chunks())):
        generate_batch.fetch_and_generate(batch, place, version, SAMPLING_BATCH, chunk)
    generate_batch.finish(store, batch, place)
    return StoredBatch(store, client, manifest, data, tracker.run_id, version, batch, place)


def repainted(png: bytes, by: int) -> bytes:
    """The same image with one of its pixels changed, and its texts kept."""
    image = Image.open(io.BytesIO(png))
    about = PngInfo()
    for name, text in image.text.items():  # type: ignore[attr-defined]
        about.add_text(name, text)
    pixels = np.array(image)
    pixels[3, 4] = (int(pixels[3, 4]) + by) % 256
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=about)
    return buffer.getvalue()


def pixels_of(png: bytes) -> bytes:
    return Image.open(io.BytesIO(png)).tobytes()


def test_sample_traces_to_batch_model_run_data_set_and_shards(stored_batch: StoredBatch) -> None:
    lineage = trace(stored_batch.image)
    assert lineage.broken == []
    assert lineage.takedowns == []
    assert lineage.image.as_generated is True
    assert (lineage.image.index, lineage.image.seed, lineage.image.label) == (17, 5, None)
    assert lineage.image.sha256 == sha256_bytes(stored_batch.png)
    assert (lineage.place, lineage.batch, lineage.finished) == (f"{stored_batch.place}/", stored_batch.batch, True)
    assert (lineage.batch.conditions, lineage.batch.sampling) == (CONDITIONS, SAMPLING)
    assert (lineage.model.uri, lineage.model.aliases) == ("models:/blobs/1", ["champion"])
    assert lineage.model.tags["darkroom.weights_sha256"] == sha256_bytes(Path("weights.safetensors").read_bytes())
    assert (lineage.run.run_id, lineage.run.git_commit, lineage.run.git_dirty) == (stored_batch.run_id, "c0ffee", True)
    assert lineage.data.version == sha256_bytes((FOLDER / "manifest.json").read_bytes())
    assert (lineage.data.dvc_digest, lineage.data.images) == (stored_batch.data.digest, 36)
    assert lineage.data.recorded is not None
    assert [shard.name for shard in lineage.data.shards] == [shard.name for shard in stored_batch.manifest.shards]
    for shard in lineage.data.shards:
        assert shard.where is not None
        where = Location.parse(shard.where)
        assert sha256_bytes(stored_batch.store.get(where.bucket, where.prefix)) == shard.sha256
    assert json.loads(lineage.model_dump_json())["data"]["shards"]


def test_whole_batch_traces_to_model_run_data_set_and_shards(stored_batch: StoredBatch) -> None:
    whole, one = trace(f"{stored_batch.place}/"), trace(stored_batch.image)
    assert whole.image is None
    assert (whole.batch, whole.run, whole.data) == (one.batch, one.run, one.data)


def test_copied_sample_traces_to_its_batch_among_equal_seeds(stored_batch: StoredBatch, tmp_path: Path) -> None:
    other = SAMPLING.model_copy(update={"steps": 2})
    batch, place = sample.begin.fn(
        stored_batch.version, Path("weights.safetensors"), other, SAMPLING_BATCH, 18, 5, None, UNCONDITIONAL
    )
    generate_batch.fetch_and_generate(batch, place, stored_batch.version, SAMPLING_BATCH, 1)
    for at in (stored_batch.place, place):
        copy = tmp_path / "copy.png"
        copy.write_bytes(stored_batch.store.get(at.bucket, at.key("00000017.png")))
        lineage = trace(str(copy))
        assert lineage.broken == []
        assert lineage.batch is not None
        assert lineage.place == f"{at}/"
    copy.write_bytes(repainted(stored_batch.png, 90))
    lineage = trace(str(copy))
    assert lineage.batch is None
    assert lineage.model is not None
    assert "no batch of" in lineage.broken[0]
    with pytest.raises(UserError, match="give the address that it was sampled to"):
        reproduce(str(copy))


def test_grid_of_a_batch_traces_to_it(stored_batch: StoredBatch, tmp_path: Path) -> None:
    sheet = sample.write_contact_sheet(stored_batch.store, stored_batch.batch, stored_batch.place)
    copy = tmp_path / "sent by mail.png"
    copy.write_bytes(sheet.read_bytes())
    assert trace(str(copy)) == trace(f"{stored_batch.place}/")
    with Image.open(copy) as grid:
        assert grid.height == 3 * (8 * 8 + 2 * 2), "a row for each of even, odd and neither"
    write_grid(copy, f"{stored_batch.place}-elsewhere/")
    with pytest.raises(UserError, match="no batch"):
        trace(str(copy))


def write_grid(path: Path, batch: str) -> None:
    path.write_bytes(encode_png_with_metadata(Image.new("L", (8, 8)), {"model": "models:/blobs/1", GRID: batch}))


def test_grid_of_a_request_traces_to_it(stored_batch: StoredBatch, tmp_path: Path) -> None:
    request = make_request({"task": "sample", "count": 2, "seed": 9, "label": ["even", "odd"]})
    origin = {"model": stored_batch.version.uri, "run_id": stored_batch.run_id}
    result = generate_to_folder(Path("weights.safetensors"), request, SAMPLING, tmp_path / "out", origin)
    chain, of_image = trace(str(result.grid)), trace(str(result.folder / "00000001.png"))
    assert (chain.image, chain.broken) == (None, [])
    assert (chain.request, chain.model, chain.data) == (of_image.request, of_image.model, of_image.data)


def test_image_generated_on_request_traces_to_request_and_model(stored_batch: StoredBatch, tmp_path: Path) -> None:
    request = make_request({"task": "interpolate", "count": 3, "seed": 5, "to_seed": 6, "label": "even"})
    origin, folder = {"model": stored_batch.version.uri, "run_id": stored_batch.run_id}, tmp_path / "way"
    generate_to_folder(Path("weights.safetensors"), request, SAMPLING, folder, origin)
    image = folder / "00000001.png"
    lineage = trace(str(image))
    assert lineage.broken == []
    assert lineage.image.as_generated is True
    assert lineage.batch is None
    assert (lineage.request.request["task"], lineage.request.request["to_seed"]) == ("interpolate", 6)
    assert lineage.data.version == stored_batch.manifest.digest
    with pytest.raises(UserError, match="the same command makes it again"):
        reproduce(str(image))
    image.write_bytes(repainted(image.read_bytes(), 90))
    assert "was altered" in trace(str(image)).broken[0]
    (folder / "request.json").write_text("{}")
    assert "no request.json beside it" in " ".join(trace(str(image)).broken)


def test_altered_sample_is_distinguished_from_a_resaved_one(stored_batch: StoredBatch) -> None:
    anew = io.BytesIO()
    Image.open(io.BytesIO(stored_batch.png)).save(anew, "PNG")
    changes = {"saved": anew.getvalue(), "altered": repainted(stored_batch.png, 90), "spoilt": stored_batch.png[:60]}
    words = {}
    for name, data in changes.items():
        lineage = trace(f"{stored_batch.beside(name, {'00000017.png': data})}/00000017.png")
        assert lineage.image.as_generated is False
        assert lineage.data is not None
        (words[name],) = lineage.broken
    assert "was saved again: its pixels are those that were generated" in words["saved"]
    assert "was altered" in words["altered"]
    assert "was altered" in words["spoilt"]


def test_image_under_the_name_of_another_is_detected(stored_batch: StoredBatch) -> None:
    other = stored_batch.store.get(stored_batch.place.bucket, stored_batch.place.key("00000001.png"))
    lineage = trace(f"{stored_batch.beside('swapped', {'00000017.png': other})}/00000017.png")
    assert "says of itself that it is another image" in lineage.broken[1]


def test_trace_names_missing_links_and_reports_the_rest(stored_batch: StoredBatch) -> None:
    stored_batch.client.delete_run(stored_batch.run_id)
    try:
        lineage = trace(stored_batch.image)
        assert f"mlflow runs restore --run-id {stored_batch.run_id}" in lineage.broken[0]
        assert lineage.run is not None
        assert lineage.data is not None
    finally:
        stored_batch.client.restore_run(stored_batch.run_id)
    batch_without_links = stored_batch.batch.model_copy(update={"version": 7, "run_id": "0" * 32})
    place = stored_batch.beside(
        "gone", {"batch.json": batch_without_links.json_bytes(), "manifest/part-00001.jsonl": None}
    )
    lineage = trace(f"{place}/00000017.png")
    assert (lineage.model, lineage.run, lineage.data) == (None, None, None)
    assert "has no row of" in lineage.broken[0]
    assert {"models:/blobs/7 is not in the registry (any more)", f"run {'0' * 32} is not in MLflow (any more)"} < set(
        lineage.broken
    )


def test_trace_without_a_run_uses_the_data_set_catalog(stored_batch: StoredBatch) -> None:
    (logged,) = Path().glob(f"mlruns/*/{stored_batch.run_id}/artifacts/dataset/manifest.json")
    logged.rename("manifest.json.away")
    try:
        lineage = trace(stored_batch.image)
    finally:
        Path("manifest.json.away").rename(logged)
    assert "keeps no manifest" in lineage.broken[0]
    assert lineage.data.version == stored_batch.manifest.digest


def test_lost_shards_are_named_and_others_found_anywhere(stored_batch: StoredBatch) -> None:
    (shard,) = stored_batch.manifest.shards
    md5 = hashlib.md5((FOLDER / shard.name).read_bytes()).hexdigest()
    key = f"dvc/files/md5/{md5[:2]}/{md5[2:]}"
    away, data = Path("away"), stored_batch.store.get("provenance", key)
    stored_batch.store.delete_many("provenance", [key])
    try:
        assert trace(stored_batch.image).data.shards[0].where == str(FOLDER / shard.name)  # type: ignore[union-attr]
        shutil.move(FOLDER, away)
        cached = Path(".dvc/cache/files/md5") / md5[:2] / md5[2:]
        assert trace(stored_batch.image).data.shards[0].where == str(cached.resolve())  # type: ignore[union-attr]
        cached.rename("cached")
        lineage = trace(stored_batch.image)
        assert lineage.broken == [f"shards that lie neither on {SOURCE} nor here: {shard.name}"]
    finally:
        stored_batch.store.put_once("provenance", key, data)
        shutil.move(away, FOLDER)
        Path("cached").rename(cached)


def test_trace_reports_takedowns_from_mlflow_tags_and_catalog(stored_batch: StoredBatch) -> None:
    tables = [part.records.sha256 for part in stored_batch.manifest.parts]
    Catalog.of("blobs", SOURCE, stored_batch.store).publish_removal(REMOVAL.model_copy(update={"tables": tables}))
    stored_batch.client.set_model_version_tag("blobs", "1", TAKEDOWN, "feedc0de0123")
    # Of a version that was trained from another one.
    stored_batch.client.set_model_version_tag("blobs", "1", ANCESTORS, json.dumps([("0" * 64, "others")]))
    try:
        (one, other) = sorted(trace(stored_batch.image).takedowns, key=lambda each: each.reason or "")
    finally:
        stored_batch.client.delete_model_version_tag("blobs", "1", TAKEDOWN)
        stored_batch.client.delete_model_version_tag("blobs", "1", ANCESTORS)
        stored_batch.store.delete_many(
            "provenance", stored_batch.store.list_keys("provenance", "datasets/blobs/removals/")
        )
    assert (one.name, one.reason, one.images) == ("feedc0de0123", None, None)
    assert (other.name, other.reason, other.images) == (REMOVAL.name, "consent withdrawn", 1)


@pytest.mark.parametrize("what", ["nowhere.png", "s3://provenance/nowhere/00000000.png", "s3://provenance/nowhere"])
def test_tracing_a_missing_sample_is_a_user_error(stored_batch: StoredBatch, what: str) -> None:
    for verb in (trace, reproduce):
        with pytest.raises(UserError, match=r"nowhere") as error:
            verb(what)
        assert "\n" not in str(error.value)


def test_image_without_darkroom_metadata_is_an_error(stored_batch: StoredBatch, tmp_path: Path) -> None:
    disc(1).save(tmp_path / "mine.png")
    (tmp_path / "notes.png").write_text("no image")
    for name in ("mine.png", "notes.png"):
        with pytest.raises(UserError, match="names no registered model that made it"):
            trace(str(tmp_path / name))


@pytest.mark.slow
def test_samples_are_reproduced_bit_for_bit_by_the_shipped_code(stored_batch: StoredBatch, tmp_path: Path) -> None:
    reproduction = reproduce(str(stored_batch.place), count=17, out=tmp_path)
    assert outcome_of(reproduction) == (17, 17, "", None)
    assert errors_of(reproduction) == (0, 0)
    assert (reproduction.code, reproduction.moved) == ("shipped", [])
    for index in range(17):
        name = batch_format.image_key(index)
        sample = stored_batch.store.get(stored_batch.place.bucket, stored_batch.place.key(name))
        assert (tmp_path / name).read_bytes() == sample


@pytest.mark.slow
def test_another_fingerprint_is_named_with_the_largest_error(stored_batch: StoredBatch) -> None:
    """A generated image of another machine, which made one pixel of the second image brighter."""
    other = stored_batch.batch.fingerprint.model_copy(update={"batch": 16, "device": "AVX9"})
    part = stored_batch.store.get(stored_batch.place.bucket, stored_batch.place.key("manifest/part-00001.jsonl"))
    rows = batch_format.part_rows(part, "part")
    png = repainted(stored_batch.png, 3)
    rows[-1] |= {"sha256": sha256_bytes(png), "pixels_sha256": sha256_bytes(pixels_of(png))}
    place = stored_batch.beside(
        "elsewhere",
        {
            "batch.json": stored_batch.batch.model_copy(update={"fingerprint": other}).json_bytes(),
            "manifest/part-00001.jsonl": batch_format.part_bytes(rows),
            "00000017.png": png,
        },
    )
    reproduction = reproduce(f"{place}/00000017.png")
    assert reproduction.differences == f"batch: 16 → 4, device: AVX9 → {stored_batch.batch.fingerprint.device}"
    assert (reproduction.exact, errors_of(reproduction), reproduction.failure) == (0, (3, 1), None)


@pytest.mark.slow
def test_request_unknown_to_shipped_code_is_a_one_line_error(
    stored_batch: StoredBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = json.loads(stored_batch.batch.json_bytes())
    raw["conditions"]["labels"] = ["neither"]
    place = stored_batch.beside("newer", {"batch.json": canonical_json(raw).encode()})
    monkeypatch.setattr("flows.provenance.reproduce.fetch_requirements", lambda _: ["torch==1.0"])
    with pytest.raises(UserError, match=r"knows no class 'neither'.*torch: 1.0 → .*--installed") as error:
        reproduce(f"{place}/00000017.png")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_sample_in_a_tar_traces_and_reproduces_like_a_file(stored_batch: StoredBatch, tmp_path: Path) -> None:
    tars, folder = SamplingBatchConfig(format="tar", chunk=8), tmp_path / "again"
    weights = Path("weights.safetensors")
    batch, place = sample.begin.fn(stored_batch.version, weights, SAMPLING, tars, 18, 5, None, CONDITIONS)
    for chunk in range(len(batch.chunks())):
        generate_batch.fetch_and_generate(batch, place, stored_batch.version, tars, chunk)
    image = f"{place}/samples-00002.tar/00000017.png"
    lineage, file = trace(image), trace(stored_batch.image)
    assert (lineage.image.as_generated, lineage.data) == (True, file.data)  # type: ignore[union-attr]
    assert "no batch of" not in " ".join(lineage.broken)
    reproduction = reproduce(str(place), out=folder)
    assert outcome_of(reproduction) == (18, 18, "", None)
    assert reproduce(image).exact == 1
    png = (folder / "00000017.png").read_bytes()
    assert pixels_of(png) == pixels_of(stored_batch.png)
    (tmp_path / "copy.png").write_bytes(png)
    assert trace(str(tmp_path / "copy.png")).image.as_generated is True  # type: ignore[union-attr]
    for nowhere in ("samples-00001.tar/00000017.png", "samples-00002.tar/00000018.png", "samples-00002.tar/x.png"):
        with pytest.raises(UserError, match=r"is not an image of a sampling batch"):
            trace(f"{place}/{nowhere}")


@pytest.mark.slow
def test_samples_of_a_request_table_are_reproduced_from_the_table(stored_batch: StoredBatch, tmp_path: Path) -> None:
    table, weights = tmp_path / "wanted.csv", Path("weights.safetensors")
    labels = ["odd", "even", "", *["even"] * 8, "odd", "odd"]
    table.write_text("\n".join(["label", *(label or '""' for label in labels)]))
    batch, place = sample.begin.fn(
        stored_batch.version, weights, SAMPLING, SAMPLING_BATCH, None, 5, None, UNCONDITIONAL, str(table)
    )
    table.unlink()
    generate_batch.fetch_and_generate(batch, place, stored_batch.version, SAMPLING_BATCH, 0)
    shutil.rmtree(".darkroom/requests")
    reproduction = reproduce(str(place))
    assert (reproduction.images, reproduction.exact, reproduction.failure) == (13, 13, None)
    assert reproduce(f"{place}/00000011.png").exact == 1
    lineage = trace(f"{place}/00000011.png")
    assert (lineage.image.label, lineage.batch.requests) == ("odd", batch.requests)  # type: ignore[union-attr]
    stored_batch.store.delete_many(place.bucket, [place.key("requests.parquet")])
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"label": labels[::-1], "prompt": pa.nulls(13, pa.string())}), other)
    stored_batch.store.put_once(place.bucket, place.key("requests.parquet"), other.read_bytes())
    shutil.rmtree(".darkroom/requests")
    with pytest.raises(UserError, match="is not the table that the batch was begun with"):
        reproduce(str(place))


@pytest.mark.parametrize(
    ("what", "count", "words"), [("/00000017.png", 2, "leave it out"), ("", 19, "the batch has 18 images")]
)
def test_reproduce_count_without_effect_is_an_error(
    stored_batch: StoredBatch, what: str, count: int, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        reproduce(f"{stored_batch.place}{what}", count=count)


def original(pixels: np.ndarray, array: np.ndarray | None = None) -> LocatedImage:
    """An image with ``pixels``, and a row that says its pixels were those of ``array``, by default its own."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    row = {"pixels_sha256": sha256_bytes((pixels if array is None else array).tobytes())}
    return LocatedImage(buffer.getvalue(), None, 0, row)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_errors_are_counted_in_levels_and_pixels(shape: tuple[int, ...]) -> None:
    there = np.random.default_rng(0).integers(0, 200, shape, dtype=np.uint8)
    again = there.copy()
    again[1, 2] += 9
    again[4, 6] -= min(again[4, 6].min(), 2)
    differences = compare("x", again, original(there))
    errors = np.abs(again.astype(int) - there)
    assert (differences.exact, differences.altered, differences.largest_error) == (False, False, 9)
    assert differences.mean_error == pytest.approx(errors.mean())
    assert differences.differing_pixels == errors.reshape(35, -1).any(1).sum()
    same = compare("x", there, original(there))
    assert (same.exact, same.largest_error, same.differing_pixels) == (True, 0, 0)


def test_altered_image_is_compared_by_the_digest_of_the_sample() -> None:
    sample = np.zeros((4, 4), np.uint8)
    altered = original(sample + 9, sample)
    assert compare("x", sample, altered).model_dump(exclude={"key"}) == {
        "exact": True,
        "altered": True,
        "largest_error": 0,
        "mean_error": 0,
        "differing_pixels": 0,
    }
    assert compare("x", sample + 9, altered).largest_error is None
    missing_image = LocatedImage(b"", None, 0, altered.row)
    assert (compare("x", sample, missing_image).exact, compare("x", sample, missing_image).altered) == (True, True)


def outcome(
    stored_batch: StoredBatch, mean: float, differences: str, altered: bool = False, code: str = "shipped"
) -> str | None:
    exact = mean == 0
    one = ImageComparison(key="x", exact=exact, altered=altered, largest_error=9, mean_error=mean, differing_pixels=1)
    return Reproduction(
        where="",
        model="models:/blobs/1",
        code=code,
        images=1,
        exact=int(exact),
        fingerprint=stored_batch.batch.fingerprint,
        differences=differences,
        moved=[],
        largest_error=9,
        mean_error=mean,
        differing_pixels=1,
        other=[one] if altered or not exact else [],
        altered=["x"] if altered else [],
        folder=None,
    ).failure


def test_only_small_errors_on_another_fingerprint_are_tolerated(stored_batch: StoredBatch) -> None:
    assert outcome(stored_batch, 0, "") is None
    assert outcome(stored_batch, 0.5, "torch: 2 → 3") is None
    assert "not the same inside an equal fingerprint" in (outcome(stored_batch, 0.5, "") or "")
    assert "Try --installed" in (outcome(stored_batch, 0.5, "") or "")
    assert "report it" in (outcome(stored_batch, 0.5, "", code="installed") or "")
    assert "further off than other arithmetic explains" in (outcome(stored_batch, 5, "torch: 2 → 3") or "")
    assert "altered or lost since sampling: x" in (outcome(stored_batch, 0, "", altered=True) or "")


def test_changed_library_versions_are_named() -> None:
    numpy = installed("numpy")
    assert changed_libraries([f"numpy=={numpy}", "torch==1.0", "no-such-thing==2", "", "pandas"]) == [
        f"torch: 1.0 → {installed('torch').split('+')[0]}",
        "no-such-thing: 2 → not installed",
    ]


def test_shipped_code_gets_no_keys_of_the_environment(
    stored_batch: StoredBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hush")
    script = f"import os; open({str(tmp_path / 'seen')!r}, 'w').write(repr(os.environ)); raise SystemExit(1)"
    monkeypatch.setattr("flows.provenance.reproduce.BEGIN", script)
    with pytest.raises(UserError):
        reproduce(str(stored_batch.place), count=1)
    seen = (tmp_path / "seen").read_text()
    assert "PATH" in seen
    assert "hush" not in seen
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in seen
