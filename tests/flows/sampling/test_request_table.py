"""Tables of requests: one meaning in three formats, a few rows at a time, and mistakes named by their row."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion.checkpoints import export
from diffusion.common.errors import UserError
from diffusion.generation.config import UNCONDITIONAL, Conditions
from diffusion.process.samplers import sampling_config
from flows.config import SamplingBatchConfig
from flows.registry.model_versions import Version
from flows.sampling.batch_format import SamplingBatch
from flows.sampling.generate_batch import plan
from flows.sampling.request_table import RequestTable
from flows.storage.s3 import Location, Store
from tests.builders.small_models import write_model

VERSION = Version(model="blobs", number=3, run_id="r", weights_sha256="d" * 64, tags={})
SAMPLING = sampling_config(sampler="dpmpp_2m", steps=2, compute_batch=4)
ROWS = [("even", 'a "red", bird'), (None, "grün"), ("odd", None), (None, None)]


def write(path: Path, rows: list[tuple[str | None, str | None]] = ROWS) -> Path:
    records = [{"label": label, "prompt": prompt} for label, prompt in rows]
    if path.suffix == ".parquet":
        pq.write_table(
            pa.Table.from_pylist(records, pa.schema([("prompt", pa.string()), ("label", pa.string())])), path
        )
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({k: v for k, v in each.items() if v}) + "\n" for each in records))
    else:
        quoted = ('"' + (text or "").replace('"', '""') + '"' for row in rows for text in row)
        lines = [f"{label},{next(quoted)}" for label in quoted]
        path.write_text("\n".join(["label,prompt", *lines]), encoding="utf-8-sig")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_request_table_is_read_equally_in_every_format(tmp_path: Path, suffix: str) -> None:
    table = RequestTable.from_file(write(tmp_path / f"table{suffix}"), tmp_path / "kept")
    assert (table.count, table.about.columns) == (4, ("label", "prompt"))
    assert table.rows(range(4)) == [(*row, None) for row in ROWS]
    assert table.rows(range(3, 6)) == [(None, None, None)] * 3
    assert table.about == RequestTable.from_file(write(tmp_path / "other.jsonl"), tmp_path).about
    other = RequestTable.from_file(write(tmp_path / "less.csv", ROWS[:3]), tmp_path)
    assert other.about.digest != table.about.digest


def test_conditions_of_an_image_come_from_its_table_row(tmp_path: Path) -> None:
    rows: list[tuple[str | None, str | None]] = [(f"label {n}" if n % 3 else None, None) for n in range(2500)]
    table = RequestTable.from_file(write(tmp_path / "table.csv", rows), tmp_path)
    for indices in (range(8), range(5, 6), range(1020, 1040), range(1023, 1025), range(2496, 2500)):
        conditions = table.conditions(indices, 4, Conditions(negative_prompt="fog"))
        assert [conditions.label(index) for index in indices] == [rows[index][0] for index in indices]
        assert (conditions.prompts, conditions.negative_prompt) == ((), "fog")
        assert len(conditions.labels) <= len(indices) + 6


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    peaks = []
    for count in (3000, 12_000):
        source = write(tmp_path / f"{count}.csv", [(f"label {n}", None) for n in range(count)])
        tracemalloc.start()
        RequestTable.from_file(source, tmp_path).conditions(range(64), 64)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


def test_stored_request_table_is_verified_on_download(store: Store, bucket: str, tmp_path: Path) -> None:
    written_table = RequestTable.from_file(write(tmp_path / "table.csv"), tmp_path)
    place, other = Location(bucket, "batch"), Location(bucket, "other")
    store.put_once(bucket, place.key("requests.parquet"), written_table.path.read_bytes())
    table = RequestTable.fetch(written_table.about, store, place, tmp_path / "elsewhere")
    assert (table.about, table.rows(range(4))) == (written_table.about, written_table.rows(range(4)))
    foreign = write(tmp_path / "foreign.parquet", ROWS[:1])
    store.put_once(bucket, other.key("requests.parquet"), foreign.read_bytes())
    with pytest.raises(UserError, match="is not the table that the batch was begun with"):
        RequestTable.fetch(written_table.about, store, other, tmp_path / "third")


def planned(store: Store, tmp_path: Path, table: str, classes: dict[str, int], **changes: object) -> SamplingBatch:
    weights = write_model(tmp_path / "weights.safetensors", 1, 0, classes=classes)
    arguments = {"sampling": SAMPLING, "count": None, "conditions": UNCONDITIONAL} | changes
    batch, _ = plan(
        store,
        VERSION,
        weights,
        arguments["sampling"],
        SamplingBatchConfig(),
        arguments["count"],
        0,
        arguments["conditions"],
        table,
    )  # type: ignore[arg-type]
    return batch


def test_a_batch_has_an_image_per_row_of_its_table(store: Store, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("label\neven\nodd\neven\n")
    store.put_once(bucket, "tables/t.csv", (tmp_path / "t.csv").read_bytes())
    here = planned(store, tmp_path, str(tmp_path / "t.csv"), {"even": 1, "odd": 1})
    there = planned(store, tmp_path, f"s3://{bucket}/tables/t.csv", {"even": 1, "odd": 1})
    assert here == there
    assert here.count == 3
    assert here.requests.columns == ("label",)
    assert SamplingBatch.model_validate_json(here.json_bytes()) == here


@pytest.mark.parametrize(("rows", "guidance"), [("odd\neven\n", 2.0), ('odd\n""\n', None)])
def test_chosen_guidance_applies_to_wholly_conditional_tables(
    store: Store, tmp_path: Path, rows: str, guidance: float | None
) -> None:
    (tmp_path / "t.csv").write_text(f"label\n{rows}")
    plain = write_model(tmp_path / "plain.safetensors", 1, 0, classes={"even": 1, "odd": 1}, guide=2)
    config = SamplingBatchConfig()
    for kind, expected in (("guidance", guidance), ("autoguidance", 2)):
        export(plain, model_file := tmp_path / f"{kind}.safetensors", SAMPLING.with_changes({kind: 2}))
        batch, _ = plan(store, VERSION, model_file, SAMPLING, config, None, 0, UNCONDITIONAL, str(tmp_path / "t.csv"))
        assert getattr(batch.sampling, kind) == expected


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.csv", "label,seed\neven,3\n", r"record 1: 'seed' is not a column .*: the columns are label, prompt, size"),
        ("t.jsonl", '{"label": "odd"}\n{"text": "x"}\n', r"record 2: 'text' is not a column of a request table"),
        ("t.csv", "label\nodd\nodder\n", r"record 2: the model knows no class 'odder': use one of even, odd"),
        ("t.csv", "prompt\na red bird\n", r"record 1: the model was trained without captions"),
        ("t.csv", "label\n", "asks for nothing"),
        ("t.csv", 'label\n""\n""\n', "asks for nothing"),
        ("t.csv", "label\nodd,even\n", "more fields than the header"),
        ("t.jsonl", '{"label": ["odd"]}\n', "give one text for label"),
        ("t.jsonl", "[1]\n", "is not a JSON object"),
        ("t.jsonl", '{"label": "' + "x" * 10_001 + '"}', "its label has over 10,000 characters"),
        ("t.parquet", "no parquet", "cannot be read as Parquet"),
        ("t.txt", "label\nodd\n", "ends in .csv, .jsonl or .parquet"),
    ],
)
def test_request_table_error_is_one_line_with_its_position(
    store: Store, tmp_path: Path, name: str, text: str, words: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words) as refusal:
        planned(store, tmp_path, str(tmp_path / name), {"even": 1, "odd": 1})
    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"count": 3}, "one for each row: leave the count out"),
        ({"conditions": Conditions(labels=("odd",))}, "leave labels and prompts out, or the table"),
        ({"conditions": Conditions(negative_prompt="fog")}, "record 1: .*negative|captions"),
        ({"sampling": SAMPLING.model_copy(update={"guidance": 3.0})}, "record 2: sampling.guidance .* there is none"),
    ],
)
def test_options_contradicting_a_request_table_are_an_error(
    store: Store, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    (tmp_path / "t.csv").write_text('label\nodd\n""\n')
    with pytest.raises(UserError, match=words):
        planned(store, tmp_path, str(tmp_path / "t.csv"), {"even": 1, "odd": 1}, **changes)


def test_missing_request_table_is_named(store: Store, bucket: str, tmp_path: Path) -> None:
    for where in (str(tmp_path / "t.csv"), f"s3://{bucket}/t.csv"):
        with pytest.raises(UserError, match=r"t\.csv"):
            planned(store, tmp_path, where, {"even": 1, "odd": 1})
