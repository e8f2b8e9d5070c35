"""Flows of a registered model: ``sample`` to S3 with a manifest, and ``generate`` to a local folder."""

import io
import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.client import MlflowClient
from PIL import Image
from prefect import flow
from prefect.artifacts import create_markdown_artifact

from diffusion.checkpoints import load_model
from diffusion.common.config import Config
from diffusion.common.device import resolve_device
from diffusion.common.errors import ConflictError, DarkroomError
from diffusion.common.escaping import pluralize
from diffusion.common.files import write_bytes
from diffusion.common.image_grids import GRID, encode_png_with_metadata, make_captioned_grid
from diffusion.data.fan_out import make_fan_out
from diffusion.generation.config import UNCONDITIONAL, Conditions, read_request
from diffusion.generation.requests import GenerationResult, generate_to_folder
from diffusion.process.samplers import SamplingConfig
from flows import environment
from flows.config import Params, SamplingBatchConfig
from flows.deployment.tasks import artifact_key, retryable_task
from flows.registry import model_versions
from flows.registry.model_versions import Version
from flows.registry.takedown_marks import warn_of_takedown
from flows.sampling import generate_batch
from flows.sampling.batch_format import MANIFEST, SamplingBatch
from flows.sampling.generate_batch import GenerationCost, Work
from flows.sampling.lookup import read_image, read_rows
from flows.storage.s3 import Location, Store
from flows.storage.s3_errors import MissingObjectError
from flows.tracking.console import bar, reporter

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # number of attempts for a batch that is deleted while it is generated


class SamplingBatchResult(Config):
    """A finished sampling batch."""

    uri: str
    model: str
    count: int
    seed: int
    manifest: str
    contact_sheet: Path
    """Local image grid of the first images."""
    took: GenerationCost


@flow(name="sample", flow_run_name="sample-of-{model}")
def sample(
    params: Params,
    model: str,
    count: int | None = None,
    seed: int = 0,
    to: str | None = None,
    conditions: Conditions = UNCONDITIONAL,
    requests: str | None = None,
) -> SamplingBatchResult:
    """Generate ``count`` images of ``seed`` under ``conditions`` with the version ``model``.

    ``model`` is models:/NAME@ALIAS or models:/NAME/NUMBER; ``to`` is s3://BUCKET, for samples/MODEL/VERSION/BATCH/ in
    it, or s3://BUCKET/PREFIX. ``requests`` replaces the count: a table with a label or a prompt for each image.
    """
    version, weights = fetch(model)
    config = params.sampling_batch
    for _ in range(ATTEMPTS):
        batch, place = begin(version, weights, params.sampling, config, count, seed, to, conditions, requests)
        try:
            cost = generate_chunks(batch, place, version, config)
        except MissingObjectError:
            if not generate_batch.is_deleted(Store(), place):
                raise
            continue
        if (result := finish(batch, place, cost)) is not None:
            return result
        logger.warning("images of %s were deleted meanwhile and are generated again", place)
    raise DarkroomError(
        f"images of {place} were deleted {ATTEMPTS} times while they were generated: make sure that only `darkroom gc` "
        "deletes there, and that retention.unfinished_days is longer than a chunk takes"
    )


@flow(name="generate", flow_run_name="{fields[task]}-by-{model}")
def generate(
    params: Params,
    model: str,
    fields: dict[str, Any],
    image: Path | None = None,
    mask: Path | None = None,
    output: Path | None = None,
) -> GenerationResult:
    """Generate the images of a request into the folder ``output``, by default a new one in samples/.

    ``fields`` are the fields of a ``GenerationRequest``, except the images in the files ``image`` and ``mask``.
    """
    version, weights = fetch(model)
    request, origin = read_request(fields, image, mask), {"model": version.uri, "run_id": version.run_id}
    return retryable_task(generate_to_folder)(weights, request, params.sampling, output, origin, reporter())


@retryable_task
def fetch(model: str) -> tuple[Version, Path]:
    """Resolve ``model`` to a version, and fetch its weights to a local file."""
    version = model_versions.resolve(MlflowClient(), model)
    warn_of_takedown(version)
    return version, model_versions.cached_weights(version)


def samples_from_noise(model: str) -> bool:
    """Whether ``model`` generates images from noise, unlike a super-resolution model."""
    _, weights = fetch(model)
    return load_model(weights).config.low_resolution is None


@retryable_task
def begin(
    version: Version,
    weights: Path,
    sampling: SamplingConfig,
    config: SamplingBatchConfig,
    count: int | None,
    seed: int,
    to: str | None,
    conditions: Conditions,
    requests: str | None = None,
) -> tuple[SamplingBatch, Location]:
    """Plan the batch and record it on S3; raises ConflictError if ``to`` holds a different batch."""
    store = Store()
    batch, table = generate_batch.plan(store, version, weights, sampling, config, count, seed, conditions, requests)
    place = Location.parse(to or f"s3://{environment.settings().bucket}")
    if not place.prefix:
        place = generate_batch.find_default_place(store, batch, place.bucket)
    elif generate_batch.is_deleted(store, place):
        raise ConflictError(
            f"`darkroom gc` deletes the objects at {place}, or did so recently: give --to another prefix"
        )
    generate_batch.begin(store, batch, place, table)
    return batch, place


@retryable_task
def generate_chunks(
    batch: SamplingBatch, place: Location, version: Version, config: SamplingBatchConfig
) -> GenerationCost:
    """Generate the missing chunks."""
    start_time, missing_chunks, chunks = (
        time.monotonic(),
        generate_batch.list_unfinished_chunks(Store(), batch, place),
        batch.chunks(),
    )
    show, works = bar(artifact_key("sampling", batch.model)), list[Work]()
    image_count = batch.count - sum(len(chunks[chunk]) for chunk in missing_chunks)
    show("images generated", image_count, batch.count)
    gpus = int(resolve_device(batch.sampling.device).type != "cpu")
    generate = partial(generate_batch.fetch_and_generate, batch, place, version, config)
    for chunk, work in zip(missing_chunks, make_fan_out(config, gpus=gpus)(generate, missing_chunks), strict=True):
        works.append(work)
        image_count += len(chunks[chunk])
        show("images generated", image_count, batch.count)
    return generate_batch.sum_costs(works, time.monotonic() - start_time)


@retryable_task
def finish(batch: SamplingBatch, place: Location, cost: GenerationCost) -> SamplingBatchResult | None:
    """Write the manifest from its parts, then ``_SUCCESS``; returns None if images were deleted meanwhile."""
    store = Store()
    if not generate_batch.finish(store, batch, place):
        return None
    result = SamplingBatchResult(
        uri=f"{place}/",
        model=f"models:/{batch.model}/{batch.version}",
        count=batch.count,
        seed=batch.seed,
        manifest=f"{place}/{MANIFEST}",
        contact_sheet=write_contact_sheet(store, batch, place),
        took=cost,
    )
    images_text = f"{pluralize(batch.count, 'image')} of {result.model} in `{result.uri}`"
    text = f"{images_text}, manifest `{result.manifest}`\n\n{cost.words}"
    create_markdown_artifact(text, key=artifact_key("samples", batch.model), description=f"images of {result.model}")
    return result


def write_contact_sheet(store: Store, batch: SamplingBatch, place: Location) -> Path:
    """Write a grid of the first images of a batch, which can be traced to it; returns its path."""
    count = min(64, batch.count)
    chunks = range(-(-count // batch.chunk_size))
    rows = [row for chunk in chunks for row in read_rows(store, place, batch, chunk)][:count]
    pngs = (io.BytesIO(read_image(store, place, batch, row["index"], row)) for row in rows)
    images = [np.atleast_3d(np.array(Image.open(png, formats=("PNG",)))) for png in pngs]
    texts = [", ".join(filter(None, (row["label"], row["prompt"]))) for row in rows]
    grid = make_captioned_grid([torch.from_numpy(image).permute(2, 0, 1) for image in images], texts)
    origin = {"model": f"models:/{batch.model}/{batch.version}", "run_id": batch.run_id, "seed": str(batch.seed)}
    path = Path("samples", batch.model, str(batch.version), f"{batch.name}.png")
    write_bytes(path, encode_png_with_metadata(grid, origin | {GRID: f"{place}/"}))
    return path
