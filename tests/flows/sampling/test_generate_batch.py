"""Sampling batches on a real S3 server: in files and tars, by tables, side by side, and in bounded memory."""

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import webdataset as wds

from diffusion.common.errors import ConflictError, UserError
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.generation import generate
from diffusion.generation.config import Conditions
from flows.sampling import generate_batch
from flows.sampling.batch_format import SamplingBatch, image_key, part_bytes, part_key, part_rows
from flows.sampling.generate_batch import Work, sum_costs
from flows.sampling.request_table import RequestTable
from flows.storage.s3 import Location, Object, S3Objects, Store, client
from tests.builders.archives import peak
from tests.builders.s3_proxy import Request, proxied
from tests.builders.sampling_batches import batch, rows_of, stored_files
from tests.builders.small_models import write_model


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_model(tmp_path / "weights.safetensors", 1, 0, classes={"even": 3, "odd": 1})


def generate_all(
    store: Store, planned_batch: SamplingBatch, place: Location, weights: Path, table: RequestTable | None = None
) -> None:
    for chunk in range(len(planned_batch.chunks())):
        generate_batch.generate_chunk(store, planned_batch, place, weights, chunk, table, 1)
    generate_batch.finish(store, planned_batch, place)


def test_tar_batches_equal_png_files_and_are_readable_by_webdataset(
    store: Store, bucket: str, weights: Path, tmp_path: Path
) -> None:
    files, tars, again = (Location(bucket, name) for name in ("files", "tars", "again"))
    generate_all(store, batch(20), files, weights)
    for place in (tars, again):
        generate_all(store, batch(20, format="tar"), place, weights)
    plain, packed = stored_files(store, files), stored_files(store, tars)
    assert packed == stored_files(store, again)
    names = [f"samples-0000{chunk}.tar" for chunk in range(2)]
    parts = [f"manifest/part-0000{chunk}.jsonl" for chunk in range(2)]
    assert sorted(packed) == sorted([*names, *parts, "manifest.parquet", "_SUCCESS"])
    rows = rows_of(packed)
    assert [row["index"] for row in rows] == list(range(20))
    assert [row["sha256"] for row in rows] == [row["sha256"] for row in rows_of(plain)]
    for row in rows:
        png = packed[row["tar"]][row["offset"] : row["offset"] + row["size"]]
        assert png == plain[f"{row['index']:08d}.png"]
        assert store.get_span(bucket, tars.key(row["tar"]), row["offset"], row["size"]) == png
        assert row["key"] == f"{row['tar']}/{row['index']:08d}.png"
    for name in names:
        (tmp_path / name).write_bytes(packed[name])
    samples = list(wds.WebDataset([str(tmp_path / name) for name in names], shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{index:08d}" for index in range(20)]
    for sample, row in zip(samples, rows, strict=True):
        assert {name: sample["json"][name] for name in ("seed", "index", "label", "sha256")} == {
            name: row[name] for name in ("seed", "index", "label", "sha256")
        }
        assert sample["json"]["model"] == "models:/blobs/3"


def test_sampled_tars_are_ingested_from_s3(store: Store, bucket: str, weights: Path, tmp_path: Path) -> None:
    place = Location(bucket, "tars")
    generate_all(store, batch(32, format="tar"), place, weights)
    source = f"wds:{place}/samples-*.tar"
    result = ingest(tmp_path / "set", IngestConfig(source=source, size=8, held_out=0.33), objects=S3Objects())
    assert result.kept == len({row["pixels_sha256"] for row in rows_of(stored_files(store, place))})
    assert result.quarantined == []


def test_parallel_chunks_equal_sequential_ones(store: Store, bucket: str, weights: Path) -> None:
    alone, beside = Location(bucket, "alone"), Location(bucket, "beside")
    generate_all(store, batch(64), alone, weights)
    with ThreadPoolExecutor(4) as pool:
        works = [
            pool.submit(generate_batch.generate_chunk, store, batch(64), beside, weights, n, None, 1 + n)
            for n in range(4)
        ]
        assert [work.result().images for work in works] == [16] * 4
    generate_batch.finish(store, batch(64), beside)
    assert stored_files(store, beside) == stored_files(store, alone)


def test_finished_chunks_are_skipped_and_unfinished_ones_named(store: Store, bucket: str, weights: Path) -> None:
    planned_batch, place = batch(40, format="tar"), Location(bucket, "half")
    assert generate_batch.list_unfinished_chunks(store, planned_batch, place) == [0, 1, 2]
    assert generate_batch.generate_chunk(store, planned_batch, place, weights, 1, None, 1).images == 16
    assert generate_batch.list_unfinished_chunks(store, planned_batch, place) == [0, 2]
    assert generate_batch.generate_chunk(store, planned_batch, place, weights, 1, None, 1).images == 0


def test_another_fingerprint_prevents_sampling(store: Store, bucket: str, weights: Path) -> None:
    planned_batch = batch(8)
    elsewhere = planned_batch.model_copy(
        update={"fingerprint": planned_batch.fingerprint.model_copy(update={"device": "AVX9"})}
    )
    with pytest.raises(ConflictError, match=r"would generate other bits .*device: AVX9 → "):
        generate_batch.generate_chunk(store, elsewhere, Location(bucket, "x"), weights, 0, None, 1)
    assert list(store.list_keys(bucket)) == []


def test_sampling_overlaps_uploads_with_a_bounded_queue(
    s3_environment: dict[str, str], bucket: str, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks, ahead, second, really = list[int](), list[int](), threading.Event(), generate.sample

    def counted(model: Any, indices: range, *arguments: Any, **options: Any) -> Any:
        images = really(model, indices, *arguments, **options)
        chunks.append(indices.start)
        if len(chunks) == 2:
            second.set()
        return images

    def hold_first_image(request: Request) -> None:
        if request.method == "PUT" and request.key.endswith("00000000.png"):
            # Nothing could set it if sampling waited for the upload.
            assert second.wait(60)
            time.sleep(0.5)
            ahead.extend(chunks)

    # It samples as ever, and only tells when.
    monkeypatch.setattr(generate, "sample", counted)
    with proxied(s3_environment, hold_first_image) as url:
        slow = Store(client(variables={**s3_environment, "AWS_ENDPOINT_URL_S3": url}))
        generate_batch.generate_chunk(slow, batch(64, chunk=64), Location(bucket, "x"), weights, 0, None, 1)
    assert ahead in ([0, 8], [0, 8, 16])
    assert chunks == list(range(0, 64, 8))


@pytest.mark.slow
def test_sampling_memory_does_not_grow_with_the_count(store: Store, bucket: str, tmp_path: Path) -> None:
    weights = write_model(tmp_path / "large.safetensors", 1, 0, channels=3, size=32)
    peaks = []
    # The first has what is loaded once.
    for count in (16, 32, 192):
        planned_batch, place = batch(count), Location(bucket, str(count))
        chunks = range(len(planned_batch.chunks()))

        def generate(
            planned_batch: SamplingBatch = planned_batch, place: Location = place, chunks: range = chunks
        ) -> None:
            for number in chunks:
                generate_batch.generate_chunk(store, planned_batch, place, weights, number, None, 1)

        peaks.append(peak(generate))
    sizes = [each.size for each in store.list_objects(bucket, "192/")]
    # What is on its way at the same time differs by chance.
    assert peaks[2] - peaks[1] < sum(sizes) / 2


def test_manifest_writing_holds_the_rows_of_one_chunk(
    store: Store, bucket: str, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Location(bucket, "one")
    generate_all(store, batch(16), one, weights)
    row = part_rows(store.get(bucket, one.key("manifest/part-00000.jsonl")), "part")[0]
    # Thousands of images would have to be there, which nothing is read of.
    monkeypatch.setattr(generate_batch, "list_unfinished_chunks", lambda *_: [])
    peaks = []
    for chunks in (4, 24):
        planned_batch, place = batch(128 * chunks, chunk=128), Location(bucket, str(chunks))
        rows = ([row | {"index": i, "key": image_key(i)} for i in indices] for indices in planned_batch.chunks())
        objects = [Object(place.key(part_key(n)), part_bytes(each)) for n, each in enumerate(rows)]
        store.put_many(bucket, objects)
        peaks.append(peak(lambda: generate_batch.finish(store, planned_batch, place)))  # noqa: B023
    assert pq.read_metadata(io.BytesIO(store.get(bucket, "24/manifest.parquet"))).num_rows == 128 * 24
    assert peaks[1] - peaks[0] < 3 * len(store.get(bucket, "24/manifest.parquet"))


def test_missing_images_are_regenerated_before_finishing(store: Store, bucket: str, weights: Path) -> None:
    for planned_batch in (batch(5, chunk=2), batch(5, chunk=2, format="tar")):
        place = Location(bucket, planned_batch.format)
        for chunk in range(3):
            generate_batch.generate_chunk(store, planned_batch, place, weights, chunk, None, 1)
        before = stored_files(store, place)
        name = "00000003.png" if planned_batch.format == "png" else "samples-00001.tar"
        store.delete_many(bucket, [place.key(name)])
        assert not generate_batch.finish(store, planned_batch, place)
        assert set(stored_files(store, place)) == set(before) - {name}
        assert generate_batch.list_unfinished_chunks(store, planned_batch, place) == [1]
        assert generate_batch.generate_chunk(store, planned_batch, place, weights, 1, None, 1).images == 2
        assert generate_batch.finish(store, planned_batch, place)
        assert before.items() < stored_files(store, place).items()


def test_request_table_sets_conditions_of_each_image(store: Store, bucket: str, weights: Path, tmp_path: Path) -> None:
    labels = ["odd", "even", None, *["even", "odd", "odd"] * 6]
    (tmp_path / "wanted.csv").write_text("\n".join(["label,prompt", *(f"{label or ''}," for label in labels)]))
    table = RequestTable.from_file(tmp_path / "wanted.csv", tmp_path)
    by_table, by_list = Location(bucket, "table"), Location(bucket, "list")
    generate_batch.begin(store, batch(21, requests=table.about), by_table, table)
    generate_all(store, batch(21, requests=table.about), by_table, weights, table)
    generate_all(store, batch(21, conditions=Conditions(labels=tuple(labels))), by_list, weights)
    of_table, of_list = rows_of(stored_files(store, by_table)), rows_of(stored_files(store, by_list))
    assert [row["label"] for row in of_table] == labels
    # The last compute batch is filled up with other neighbours, which no image sees.
    assert [row["pixels_sha256"] for row in of_table] == [row["pixels_sha256"] for row in of_list]


def test_location_of_another_batch_is_not_overwritten(store: Store, bucket: str, tmp_path: Path) -> None:
    place, planned_batch = Location(bucket, "here"), batch(40)
    generate_batch.begin(store, planned_batch, place, None)
    generate_batch.begin(store, planned_batch, place, None)
    other_fingerprint = planned_batch.fingerprint.model_copy(update={"torch": "9"})
    for other, words in (
        (batch(41), "of another request"),
        (batch(40, chunk=24), "in chunks of 16 images .*and this has 24"),
        (batch(40, fingerprint=other_fingerprint), "another fingerprint .torch: .* → 9"),
    ):
        with pytest.raises(ConflictError, match=words):
            generate_batch.begin(store, other, place, None)
    assert SamplingBatch.model_validate_json(store.get(bucket, "here/batch.json")) == planned_batch


def test_unreadable_batch_at_the_location_is_named(store: Store, bucket: str) -> None:
    store.put_once(bucket, "here/batch.json", b"{}")
    with pytest.raises(UserError, match=rf"s3://{bucket}/here/batch\.json is damaged, or of a newer Darkroom"):
        generate_batch.begin(store, batch(20), Location(bucket, "here"), None)


def test_processor_time_of_a_shared_process_counts_once() -> None:
    works = [
        Work(images=10, process="a", began=1, ended=6),
        Work(images=10, process="a", began=2, ended=9),
        Work(images=5, process="b", began=0, ended=2),
        Work(images=0, process="c", began=0, ended=50),
    ]
    cost = sum_costs(works, 7)
    assert (cost.images, cost.seconds) == (25, 7)
    assert cost.cpu_hours == pytest.approx(10 / 3600)
    assert cost.images_per_cpu_hour == pytest.approx(25 * 360)
    assert sum_costs([works[-1]], 1).images_per_cpu_hour is None
