"""Samples say under which conditions they were generated, and what is written suffices to generate them again."""

import io

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffusion.checkpoints import load_model
from diffusion.common.files import sha256_bytes
from diffusion.common.fingerprint import fingerprint
from diffusion.families.model import Model
from diffusion.generation.config import UNCONDITIONAL, Conditions
from diffusion.generation.generate import label_names, sample
from diffusion.process.samplers import SamplingConfig, sampling_config
from flows.sampling.batch_format import SamplingBatch, chunk_size, encode, part_bytes, part_rows, write_parquet
from tests.builders import sampling_batches
from tests.builders.small_datasets import ingest_blobs, write_blobs
from tests.builders.training_runs import run

SAMPLING = sampling_config(sampler="dpmpp_2m", steps=3, compute_batch=8)


def batch(conditions: Conditions | None = None, sampling: SamplingConfig = SAMPLING) -> SamplingBatch:
    about = fingerprint(sampling.compute_batch, sampling.precision, "auto")
    return sampling_batches.batch(4, sampling=sampling, fingerprint=about, conditions=conditions, chunk=None)


def test_unconditional_batch_name_and_bytes_omit_conditions() -> None:
    plain = batch(sampling=sampling_config())
    assert plain.name == "seed7-count4-dpmpp_2m_sde16-ac665ff5"
    assert b"guidance" not in plain.json_bytes()
    assert b"conditions" not in plain.json_bytes()
    assert SamplingBatch.model_validate_json(plain.json_bytes()) == plain


def test_batches_with_different_conditions_have_different_names() -> None:
    batches = [
        batch(),
        batch(Conditions(labels=("even",))),
        batch(Conditions(labels=("even", "odd"))),
        batch(Conditions(labels=("odd", "even"))),
        batch(Conditions(prompts=("even",))),
        batch(Conditions(labels=("even",)), SAMPLING.model_copy(update={"guidance": 3.0})),
        batch(
            Conditions(labels=("even",)), SAMPLING.model_copy(update={"guidance": 3.0, "guidance_interval": (0.1, 5)})
        ),
    ]
    assert len({each.name for each in batches}) == len(batches)
    assert all(SamplingBatch.model_validate_json(each.json_bytes()) == each for each in batches)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model that was trained for a moment, with what autoguidance needs."""
    folder = tmp_path_factory.mktemp("model")
    dataset = ingest_blobs(write_blobs(folder / "images"), folder / "data" / "blobs")
    return load_model(run(dataset, folder / "run").final)


@pytest.mark.parametrize(
    ("conditions", "kind"),
    [(None, "guidance"), (None, "autoguidance"), (Conditions(labels=("odd", None, "even")), "guidance")],
)
def test_a_stored_batch_regenerates_its_images(model: Model, conditions: Conditions | None, kind: str) -> None:
    planned_batch = batch(conditions, SAMPLING.model_copy(update={kind: 2.0}))
    stored_batch = SamplingBatch.model_validate_json(planned_batch.json_bytes())
    images = sample(
        model, range(4), stored_batch.seed, stored_batch.sampling, conditions=stored_batch.conditions or UNCONDITIONAL
    )
    labels = label_names(model, range(4), stored_batch.seed, stored_batch.conditions or UNCONDITIONAL)
    encoded = [encode(planned_batch, *each) for each in zip(range(4), images, labels, strict=True)]
    rows = part_rows(part_bytes(row for _, row in encoded), "part")
    sink = io.BytesIO()
    write_parquet(sink, iter([rows]), planned_batch)
    table = pq.read_table(sink).to_pylist()
    assert [row["label"] for row in table] == (labels if conditions is None else ["odd", None, "even", "odd"])
    assert all((row[kind], row["prompt"], row["negative_prompt"]) == (2.0, None, None) for row in table)
    assert ("autoguidance" in table[0]) == (kind == "autoguidance")
    again = sample(
        model, [2], stored_batch.seed, stored_batch.sampling, conditions=stored_batch.conditions or UNCONDITIONAL
    )[0]
    assert sha256_bytes(again.permute(1, 2, 0).contiguous().numpy().tobytes()) == table[2]["pixels_sha256"]
    text = Image.open(io.BytesIO(encoded[0][0])).text
    assert text.get("darkroom:label") == (None if conditions is None else "odd")


def test_prompts_are_stored_in_png_and_manifest_in_any_script() -> None:
    planned_batch = batch(Conditions(prompts=("ein grünes Haus", "красный дом"), negative_prompt="fog"))
    png, row = encode(planned_batch, 1, torch.zeros(1, 8, 8, dtype=torch.uint8), None)
    assert Image.open(io.BytesIO(png)).text["darkroom:prompt"] == "красный дом"
    assert (row["prompt"], row["negative_prompt"], row["label"]) == ("красный дом", "fog", None)
    plain, _ = encode(batch(), 1, torch.zeros(1, 8, 8, dtype=torch.uint8), "even")
    assert "darkroom:label" not in Image.open(io.BytesIO(plain)).text


@pytest.mark.parametrize("compute_batch", [1, 8, 64, 1000])
@pytest.mark.parametrize("count", [1, 257, 40_000, 100_000, 1_000_000])
def test_large_batches_have_hundreds_of_small_chunks(count: int, compute_batch: int) -> None:
    size = chunk_size(count, compute_batch)
    assert size % compute_batch == 0
    assert size >= 4 * compute_batch
    assert size <= max(4096, 4 * compute_batch)
    assert -(-count // size) <= 256 or size > 4096 - compute_batch


def test_the_format_changes_the_batch_name_the_chunk_does_not() -> None:
    plain = batch()
    cut, tars = (plain.model_copy(update=change) for change in ({"chunk": 16, "count": 20}, {"format": "tar"}))
    assert cut.name == plain.model_copy(update={"count": 20}).name
    assert cut.chunks() == [range(16), range(16, 20)]
    assert plain.model_copy(update={"count": 40}).chunks() == [range(32), range(32, 40)]
    assert tars.name != plain.name
    assert tars.key(33) == "samples-00001.tar/00000033.png"
    for each in (cut, tars):
        assert SamplingBatch.model_validate_json(each.json_bytes()) == each
