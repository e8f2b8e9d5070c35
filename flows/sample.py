"""The flow ``sample``: a registered model in, pictures with a manifest on S3 out."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from mlflow.client import MlflowClient
from PIL import Image
from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.task_runners import ThreadPoolTaskRunner

from diffusion.config import Config
from diffusion.config_sampling import ANYTHING, Asked, SamplingConfig
from diffusion.errors import Held, UserError
from diffusion.fingerprint import fingerprint
from diffusion.grids import grid, save_png
from diffusion.model import load_model
from diffusion.sampling import label_names, meanings_of, require_drawing, require_read_whole
from diffusion.sampling import sample as draw
from flows import environment, prints, registry
from flows.derived import warn_of_takedown
from flows.params import Params
from flows.prints import Batch
from flows.progress import reporter
from flows.registry import Version
from flows.s3 import Location, Object, Store
from flows.steps import step

SHOWN = 64
JSON, JSON_LINES, PARQUET, PNG = (
    "application/json",
    "application/jsonl",
    "application/vnd.apache.parquet",
    "image/png",
)


class Prints(Config):
    """A finished batch."""

    uri: str
    """Its prefix on S3."""
    model: str
    """The exact version, models:/NAME/NUMBER."""
    count: int
    seed: int
    manifest: str
    """Its manifest.parquet on S3."""
    contact_sheet: Path
    """Its first pictures on one sheet, on this machine."""


# One chunk at a time: a single one keeps every core busy, and its bits depend on the number of threads.
@flow(
    name="sample",
    flow_run_name="sample-{count}-of-{model}",
    task_runner=ThreadPoolTaskRunner(max_workers=1),  # type: ignore[arg-type, unused-ignore]
)
def sample(
    params: Params, model: str, count: int, seed: int = 0, to: str | None = None, asked: Asked = ANYTHING
) -> Prints:
    """Print ``count`` pictures of ``seed`` that show what is ``asked``, drawn by the version that ``model`` names now.

    ``model`` is models:/NAME@ALIAS or models:/NAME/NUMBER; ``to`` is s3://BUCKET for its usual place there
    (prints/MODEL/VERSION/BATCH/), or s3://BUCKET/PREFIX for exactly that place.
    """
    version, weights = fetch(model)
    batch, place = begin(version, weights, params.sampling, count, seed, to, asked)
    parts = [print_chunk.submit(batch, place, weights, chunk) for chunk in range(len(batch.chunks()))]
    for part in parts:
        part.result()
    return finish(batch, place)


@step
def fetch(model: str) -> tuple[Version, Path]:
    """The version that ``model`` names now, and its weights as a local file."""
    version = registry.resolve(MlflowClient(), model)
    warn_of_takedown(version)
    return version, registry.fetch_weights(version, environment.settings().folder / "models")


def draws(model: str) -> bool:
    """Whether the version that ``model`` names now draws pictures of itself, and does not only enlarge them."""
    _, weights = fetch(model)
    return load_model(weights).config.low_resolution is None


@step
def begin(
    version: Version, weights: Path, sampling: SamplingConfig, count: int, seed: int, to: str | None, asked: Asked
) -> tuple[Batch, Location]:
    """Write down what is asked for; raises Held if the place holds a batch of something else."""
    if count < 1:
        raise UserError(f"count {count}: ask for at least one picture")
    loaded = load_model(weights)
    require_drawing(loaded, sampling, asked)
    require_read_whole(asked)
    meanings_of(loaded, asked)
    batch = Batch(
        model=version.model,
        version=version.number,
        run_id=version.run_id,
        content_digest=loaded.header.content_digest,
        weights_sha256=version.weights_sha256,
        seed=seed,
        count=count,
        sampling=sampling,
        fingerprint=fingerprint(sampling.compute_batch, sampling.precision, sampling.device),
        asked=None if asked == ANYTHING else asked,
    )
    place = Location.parse(to or f"s3://{environment.settings().bucket}")
    if not place.prefix:
        place = place / "prints" / batch.model / str(batch.version) / batch.name
    store = Store()
    store.require_conditional_puts(place.bucket, "prints")
    try:
        store.put_once(place.bucket, place.key("batch.json"), batch.json_bytes(), content_type=JSON)
    except Held as error:
        found = Batch.model_validate_json(store.get(place.bucket, place.key("batch.json")))
        other = found.fingerprint.differences(batch.fingerprint)
        raise Held(
            f"{place} holds a batch "
            + (f"begun under another fingerprint ({other})" if other else "of another request")
            + ": finish it where it was begun, or give --to another prefix"
        ) from error
    return batch, place


@step
def print_chunk(batch: Batch, place: Location, weights: Path, chunk: int) -> None:
    """Draw a chunk's pictures and put them on S3, their part of the manifest last; a finished one is left."""
    store = Store()
    part = place.key(prints.part_key(chunk))
    report = reporter()
    indices = batch.chunks()[chunk]
    if not store.exists(place.bucket, part):
        model, asked = load_model(weights), batch.asked or ANYTHING
        pictures = draw(model, indices, batch.seed, batch.sampling, asked=asked)
        labels = label_names(model, indices, batch.seed, asked)
        encoded = [prints.encode(batch, *each) for each in zip(indices, pictures, labels, strict=True)]
        objects = [Object(place.key(str(row["key"])), png, PNG, {"seed": str(batch.seed)}) for png, row in encoded]
        store.put_many(place.bucket, objects)
        rows = prints.part_bytes(row for _, row in encoded)
        store.put_once(place.bucket, part, rows, content_type=JSON_LINES)
    report("pictures printed", indices.stop, batch.count)


@step
def finish(batch: Batch, place: Location) -> Prints:
    """Write the manifest of all parts, and ``_SUCCESS`` after everything else."""
    store = Store()

    def parts() -> Iterator[list[dict[str, object]]]:
        for chunk in range(len(batch.chunks())):
            yield prints.part_rows(store.get(place.bucket, place.key(prints.part_key(chunk))))

    manifest = place.key("manifest.parquet")
    store.put_once(place.bucket, manifest, prints.parquet_bytes(parts()), content_type=PARQUET)
    store.put_once(place.bucket, place.key("_SUCCESS"), b"")
    first = [store.get(place.bucket, place.key(prints.picture_key(i))) for i in range(min(SHOWN, batch.count))]
    sheet = Path("prints", batch.model, str(batch.version), f"{batch.name}.png")
    save_png(sheet, grid(torch.stack([_pixels(png) for png in first])))
    done = Prints(
        uri=f"{place}/",
        model=f"models:/{batch.model}/{batch.version}",
        count=batch.count,
        seed=batch.seed,
        manifest=f"s3://{place.bucket}/{manifest}",
        contact_sheet=sheet,
    )
    create_markdown_artifact(
        f"{batch.count} pictures of {done.model} in `{done.uri}`, manifest `{done.manifest}`", key="prints"
    )
    return done


def _pixels(png: bytes) -> torch.Tensor:
    pixels = np.array(Image.open(io.BytesIO(png), formats=("PNG",)))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)
