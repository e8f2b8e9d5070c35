"""What a batch of prints is to be, decided before anything is drawn, and written down where it will lie."""

import itertools
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

from diffusion.checkpoints import load_model
from diffusion.config_sampling import UNCONDITIONAL, Conditions
from diffusion.device import resolve_device
from diffusion.errors import Held, UserError
from diffusion.fingerprint import fingerprint
from diffusion.model import Model
from diffusion.samplers import SamplingConfig
from diffusion.sampling import check_prompts, check_sampling, prompt_embeddings
from diffusion.text import check_encoder
from flows import environment, prints
from flows.batch_records import SUCCESS
from flows.params import PrintsConfig
from flows.printing import is_deleted
from flows.prints import RESUMED, Batch
from flows.registry import Version
from flows.request_table import KEPT, RequestTable
from flows.s3 import Location, Store
from flows.s3_multipart import ABANDONED, abort_uploads, writing

DEFAULT_COUNT = 64
"""Pictures printed unless told."""
JSON = "application/json"
COPIED_AT_ONCE = 2**20
"""Bytes."""


def plan(
    store: Store,
    version: Version,
    weights: Path,
    sampling: SamplingConfig,
    config: PrintsConfig,
    count: int | None,
    seed: int,
    conditions: Conditions,
    requests: str | None,
) -> tuple[Batch, RequestTable | None]:
    """The batch that is asked for, and the table that it is asked by.

    Raises UserError for what contradicts itself, would have no effect, or the model cannot do.
    """
    _require_sense(sampling, config, count, conditions, requests)
    model = load_model(weights)
    table = _table(store, model, sampling, conditions, requests)
    if table is None:
        check_sampling(model, sampling, conditions)
        check_prompts(conditions)
    prompt_embeddings(model, conditions)
    number = table.count if table else DEFAULT_COUNT if count is None else count
    size = config.chunk or prints.chunk_size(number, sampling.compute_batch)
    if number > min(prints.MOST_PICTURES, prints.CHUNKS_AT_MOST * size):
        raise UserError(
            f"{number} images are too many for one batch in chunks of {size}: ask for several batches of at most "
            f"{min(prints.MOST_PICTURES, prints.CHUNKS_AT_MOST * size)}, each with a seed of its own"
        )
    batch = Batch(
        model=version.model,
        version=version.number,
        run_id=version.run_id,
        content_digest=model.header.content_digest,
        weights_sha256=version.weights_sha256,
        code_sha256=version.code_sha256,
        seed=seed,
        count=number,
        sampling=sampling,
        fingerprint=fingerprint(sampling.compute_batch, sampling.precision, sampling.device),
        conditions=None if conditions == UNCONDITIONAL else conditions,
        requests=table.about if table else None,
        chunk=None if size == prints.CHUNK_BATCHES * sampling.compute_batch else size,
        format=config.format,
    )
    return batch, table


def _require_sense(
    sampling: SamplingConfig, config: PrintsConfig, count: int | None, conditions: Conditions, requests: str | None
) -> None:
    if count is not None and count < 1:
        raise UserError(f"count {count}: ask for at least one picture")
    if requests is not None and count is not None:
        raise UserError(f"{requests} says how many pictures there are, one for each row: leave the count out")
    if requests is not None and (conditions.labels or conditions.prompts):
        raise UserError(f"{requests} says what each picture is to show: leave labels and prompts out, or the table")
    if config.runner == "threads" and config.workers > 1 and resolve_device(sampling.device).type == "cuda":
        raise UserError(
            f"prints.workers = {config.workers} does nothing on a GPU with prints.runner = threads, as one chunk keeps "
            "it busy: set it to 1, or use processes"
        )


def _table(
    store: Store, model: Model, sampling: SamplingConfig, conditions: Conditions, requests: str | None
) -> RequestTable | None:
    if requests is None:
        return None
    folder = environment.settings().folder / "requests"
    if requests.startswith("s3://"):
        where = Location.parse(requests)
        with TemporaryDirectory() as scratch:
            source = Path(scratch, where.prefix.rpartition("/")[2])
            store.fetch(where.bucket, where.prefix, source)
            table = RequestTable.made(source, folder)
    else:
        table = RequestTable.made(Path(requests), folder)
    # What guidance leads to stands in the rows.
    check_sampling(model, sampling.unguided(), UNCONDITIONAL)
    if "prompt" in table.about.columns:
        check_encoder(model.header.encoder)
    table.check(model, sampling, conditions.negative_prompt, requests)
    return table


def usual_place(store: Store, batch: Batch, bucket: str) -> Location:
    """Where ``batch`` lies in ``bucket`` unless told: the first of its prefixes that no deletion is marked in."""
    folder = Location(bucket) / "prints" / batch.model / str(batch.version)
    names = (batch.name if number == 1 else f"{batch.name}.{number}" for number in itertools.count(1))
    return next(place for name in names if not is_deleted(store, place := folder / name))


def begin(store: Store, batch: Batch, place: Location, table: RequestTable | None) -> None:
    """Write down ``batch`` at ``place``, for whoever draws it; raises Held if a batch of something else is there.

    Raises UserError for a server that would let two jobs overwrite each other.
    """
    store.require_conditional_puts(place.bucket, "prints")
    abort_uploads(store, Location(place.bucket, place.key("")), ABANDONED)
    about, data = place.key("batch.json"), batch.json_bytes()
    try:
        put = store.put_once(place.bucket, about, data, content_type=JSON)
    except Held as error:
        found = prints.parse_batch(store.get(place.bucket, about), f"{place}/batch.json")
        how = "of another request"
        if other := found.fingerprint.differences(batch.fingerprint):
            how = f"begun under another fingerprint ({other})"
        elif found.model_copy(update={"chunk": batch.chunk}) == batch:
            how = f"cut into chunks of {found.chunk_size} pictures (prints.chunk), and this is into {batch.chunk_size}"
        raise Held(
            f"{place} holds a batch {how}: finish it where and as it was begun, or give --to another prefix"
        ) from error
    if put == "already there" and prints.is_usual(place) and not store.exists(place.bucket, place.key(SUCCESS)):
        # What is drawn at first may lie there as well, so that nothing else tells `darkroom gc` that the batch is not
        # abandoned.
        store.put_once(place.bucket, f"{RESUMED}/{place.prefix}/{uuid4().hex}", b"")
    if table is not None and not store.exists(place.bucket, place.key(KEPT)):
        with writing(store, place.bucket, place.key(KEPT), prints.PARQUET) as kept, table.path.open("rb") as rows:
            while piece := rows.read(COPIED_AT_ONCE):
                kept.write(piece)
