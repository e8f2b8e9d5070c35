"""Sampling batches: planned, their chunks sampled while earlier images are uploaded, and finished with a manifest."""

import itertools
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from uuid import uuid4

from torch import Tensor

from diffusion.checkpoints import load_model
from diffusion.common.config import Config
from diffusion.common.device import resolve_device
from diffusion.common.errors import Held, UserError
from diffusion.common.fingerprint import Fingerprint, fingerprint
from diffusion.data.prefetch import ahead
from diffusion.data.shards import TarWriter
from diffusion.families.model import Model
from diffusion.generation.config import UNCONDITIONAL, Conditions
from diffusion.generation.generate import check_prompts, check_sampling, label_names, prompt_embeddings, sample
from diffusion.models.text_encoder import check_encoder
from diffusion.process.samplers import SamplingConfig
from flows import environment
from flows.config import SamplingBatchConfig
from flows.registry.model_versions import Version
from flows.sampling import sampling_batch
from flows.sampling.lookup import read_parts, success_of
from flows.sampling.request_table import KEPT, RequestTable
from flows.sampling.sampling_batch import BATCH, MANIFEST, RESUMED, SUCCESS, Batch, Row
from flows.storage.multipart import ABANDONED, PART_BYTES, abort_uploads, writing
from flows.storage.s3 import Location, Object, Store
from flows.storage.s3_errors import Denied, Missing

JSON, JSON_LINES, PNG, TAR = "application/json", "application/jsonl", "image/png", "application/x-tar"
DEFAULT_COUNT = 64
"""Images printed unless told."""
COPIED_AT_ONCE = 2**20
"""Bytes."""


class Drawn(NamedTuple):
    """Images that lie beside each other in a batch."""

    indices: range
    images: Tensor
    """(len(indices), C, H, W) uint8."""
    labels: list[str | None]
    conditions: Conditions


class Work(Config):
    """What a chunk took."""

    images: int
    """Drawn; none if the chunk was finished before."""
    process: str
    """In which process of which machine."""
    began: float
    """That process's clock, in seconds of all its cores together."""
    ended: float


class Cost(Config):
    """What the chunks of a batch took that were drawn now."""

    images: int = 0
    seconds: float = 0.0
    cpu_hours: float = 0.0
    """Of all processes that drew, from their first chunk to their last."""
    images_per_cpu_hour: float | None = None
    """None if none was drawn."""

    @property
    def words(self) -> str:
        """For people."""
        if self.images_per_cpu_hour is None:
            return "all of them were there"
        return (
            f"{self.images:,} drawn in {self.seconds:,.1f} s and {self.cpu_hours:.3g} CPU-hours: "
            f"{self.images_per_cpu_hour:,.0f} images per CPU-hour"
        )


Write = Callable[[Drawn], bytes]
"""Puts images where they belong; returns their part of the manifest."""


def generate_chunk(
    store: Store, batch: Batch, place: Location, weights: Path, chunk: int, table: RequestTable | None, at_once: int
) -> Work:
    """Draw a chunk's images and put them on S3, their part of the manifest last; a chunk that is whole is left.

    ``at_once``: compute batches drawn at the same time, on as many cores; meanwhile those before are uploaded, and no
    more than three times as many are held. Equal chunks give equal bytes; raises Held on a machine that would draw
    others.
    """
    process, began = f"{socket.gethostname()}:{os.getpid()}", time.process_time()
    indices, part = batch.chunks()[chunk], place.key(sampling_batch.part_key(chunk))
    if store.exists(place.bucket, part) and _has_images(store, batch, place, chunk):
        return Work(images=0, process=process, began=began, ended=time.process_time())
    require_fingerprint(batch)
    groups = _drawn(batch, weights, indices, table, at_once)
    with _output(store, batch, place, chunk) as write:
        lines = b"".join(ahead(write, groups, 1))
    store.put_once(place.bucket, part, lines, content_type=JSON_LINES)
    return Work(images=len(indices), process=process, began=began, ended=time.process_time())


def require_fingerprint(batch: Batch) -> None:
    """Raise Held unless this process draws the bits that ``batch`` was begun with."""
    if other := batch.fingerprint.differences(fingerprint_of(batch)):
        raise Held(
            f"this worker would draw other bits than the batch was begun with ({other}): let only machines like the "
            "one that began it draw, or begin another batch where they are"
        )


def fingerprint_of(batch: Batch) -> Fingerprint:
    """That of this process for ``batch``."""
    sampling = batch.sampling
    return fingerprint(sampling.compute_batch, sampling.precision, sampling.device)


def _drawn(batch: Batch, weights: Path, indices: range, table: RequestTable | None, at_once: int) -> Iterator[Drawn]:
    """The images, as many compute batches at a time as are computed ``at_once``."""
    model, size = load_model(weights), at_once * batch.sampling.compute_batch
    for start in range(indices.start, indices.stop, size):
        group = range(start, min(start + size, indices.stop))
        conditions = conditions_of(batch, table, group)
        images = sample(model, group, batch.seed, batch.sampling, conditions=conditions, at_once=at_once)
        yield Drawn(group, images, label_names(model, group, batch.seed, conditions), conditions)


def table_of(store: Store, batch: Batch, place: Location) -> RequestTable | None:
    """The table that ``batch`` is drawn by, as a file of this machine."""
    folder = environment.settings().folder / "requests"
    return RequestTable.fetched(batch.requests, store, place, folder) if batch.requests else None


def conditions_of(batch: Batch, table: RequestTable | None, indices: range) -> Conditions:
    """What images number ``indices``, and those computed beside them, are to show."""
    conditions = batch.conditions or UNCONDITIONAL
    if table is None:
        return conditions
    return table.conditions(indices, batch.sampling.compute_batch, conditions.negative_prompt)


def _output(store: Store, batch: Batch, place: Location, chunk: int) -> AbstractContextManager[Write]:
    if batch.format == "png":
        return nullcontext(partial(_put_files, store, batch, place))
    return _tar(store, batch, place, sampling_batch.tar_key(chunk))


def _put_files(store: Store, batch: Batch, place: Location, drawn: Drawn) -> bytes:
    encoded = list(_encoded(batch, drawn))
    seed = {"seed": str(batch.seed)}
    store.put_many(place.bucket, [Object(place.key(row["key"]), png, PNG, seed) for png, row in encoded])
    return sampling_batch.part_bytes(row for _, row in encoded)


@contextmanager
def _tar(store: Store, batch: Batch, place: Location, name: str) -> Iterator[Write]:
    with writing(store, place.bucket, place.key(name), TAR, PART_BYTES) as file:
        tar = TarWriter(file)

        def add(png: bytes, row: Row) -> Row:
            return sampling_batch.placed(row, name, tar.add(f"{row['index']:08d}", png, sampling_batch.shard_json(row)))

        yield lambda drawn: sampling_batch.part_bytes(add(*each) for each in _encoded(batch, drawn))
        tar.close()


def _encoded(batch: Batch, drawn: Drawn) -> Iterator[tuple[bytes, Row]]:
    for index, image, label in zip(drawn.indices, drawn.images, drawn.labels, strict=True):
        yield sampling_batch.encode(batch, index, image, label, drawn.conditions)


def _has_images(store: Store, batch: Batch, place: Location, chunk: int) -> bool:
    """Whether all images of a chunk are there."""
    if batch.format == "tar":
        return store.exists(place.bucket, place.key(sampling_batch.tar_key(chunk)))
    expected = [place.key(sampling_batch.image_key(index)) for index in batch.chunks()[chunk]]
    # Without its last letter: what comes after it begins with it.
    keys = store.list_keys(place.bucket, place.key(""), after=expected[0][:-1])
    return list(islice(keys, len(expected))) == expected


def unfinished(store: Store, batch: Batch, place: Location) -> list[int]:
    """The chunks of which something is missing: an image, the tar, or the part of the manifest."""
    prefix = place.key("")
    missing = [1 + (len(indices) if batch.format == "png" else 1) for indices in batch.chunks()]
    for key in store.list_keys(place.bucket, prefix):
        if (chunk := sampling_batch.chunk_of(batch, key.removeprefix(prefix))) is not None:
            missing[chunk] -= 1
    return [chunk for chunk, number in enumerate(missing) if number]


def is_deleted(store: Store, place: Location) -> bool:
    """Whether ``darkroom gc`` deletes the batch at ``place``, or has deleted one there."""
    return sampling_batch.is_usual(place) and store.exists(place.bucket, f"{sampling_batch.DELETED}/{place.prefix}")


def finish(store: Store, batch: Batch, place: Location) -> bool:
    """Write the manifest of all parts, and ``_SUCCESS`` with the digests of all records; what is there is left.

    Returns False if something of the batch is missing, or ``darkroom gc`` deletes it. Raises UserError if a part is not
    of this batch.
    """
    try:
        if is_deleted(store, place) or unfinished(store, batch, place):
            return False
        _finish(store, batch, place)
    except Missing:
        if is_deleted(store, place):
            return False
        raise
    # gc writes its mark before it deletes anything, and takes it back only weeks later: where there is none, all was
    # there when _SUCCESS was written.
    if not is_deleted(store, place):
        return True
    # Whoever may not delete leaves it to the next gc.
    with suppress(Denied):
        store.delete_many(place.bucket, [place.key(SUCCESS)])
    return False


def _finish(store: Store, batch: Batch, place: Location) -> None:
    manifest, parts = place.key(MANIFEST), dict[str, str]()

    def rows() -> Iterator[list[Row]]:
        for name, digest, found in read_parts(store, batch, place):
            parts[name] = digest
            yield found

    if not store.exists(place.bucket, manifest):
        with writing(store, place.bucket, manifest, sampling_batch.PARQUET) as file:
            sampling_batch.write_parquet(file, rows(), batch)
    else:
        deque(rows(), maxlen=0)
    # All is there: what killed processes, or slower ones, have begun to upload is needed by nobody.
    abort_uploads(store, Location(place.bucket, place.key("")))
    success = success_of(store, batch, place, parts)
    store.put_once(place.bucket, place.key(SUCCESS), success.data, content_type=JSON)


def cost_of(works: Iterable[Work], seconds: float) -> Cost:
    """What ``works`` took together, in ``seconds``."""
    images, clocks = 0, dict[str, tuple[float, float]]()
    for work in works:
        if work.images:
            images += work.images
            began, ended = clocks.get(work.process, (work.began, work.ended))
            clocks[work.process] = min(began, work.began), max(ended, work.ended)
    hours = sum(ended - began for began, ended in clocks.values()) / 3600
    rate = images / hours if hours else None
    return Cost(images=images, seconds=seconds, cpu_hours=hours, images_per_cpu_hour=rate)


def plan(
    store: Store,
    version: Version,
    weights: Path,
    sampling: SamplingConfig,
    config: SamplingBatchConfig,
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
    size = config.chunk or sampling_batch.chunk_size(number, sampling.compute_batch)
    if number > min(sampling_batch.MOST_IMAGES, sampling_batch.CHUNKS_AT_MOST * size):
        raise UserError(
            f"{number} images are too many for one batch in chunks of {size}: ask for several batches of at most "
            f"{min(sampling_batch.MOST_IMAGES, sampling_batch.CHUNKS_AT_MOST * size)}, each with a seed of its own"
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
        chunk=None if size == sampling_batch.CHUNK_BATCHES * sampling.compute_batch else size,
        format=config.format,
    )
    return batch, table


def _require_sense(
    sampling: SamplingConfig,
    config: SamplingBatchConfig,
    count: int | None,
    conditions: Conditions,
    requests: str | None,
) -> None:
    if count is not None and count < 1:
        raise UserError(f"count {count}: ask for at least one image")
    if requests is not None and count is not None:
        raise UserError(f"{requests} says how many images there are, one for each row: leave the count out")
    if requests is not None and (conditions.labels or conditions.prompts):
        raise UserError(f"{requests} says what each image is to show: leave labels and prompts out, or the table")
    if config.runner == "threads" and config.workers > 1 and resolve_device(sampling.device).type == "cuda":
        raise UserError(
            f"sampling_batch.workers = {config.workers} does nothing on a GPU with runner = threads, as one chunk "
            "keeps "
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
    folder = Location(bucket) / "samples" / batch.model / str(batch.version)
    names = (batch.name if number == 1 else f"{batch.name}.{number}" for number in itertools.count(1))
    return next(place for name in names if not is_deleted(store, place := folder / name))


def begin(store: Store, batch: Batch, place: Location, table: RequestTable | None) -> None:
    """Write down ``batch`` at ``place``, for whoever draws it; raises Held if a batch of something else is there.

    Raises UserError for a server that would let two jobs overwrite each other.
    """
    store.require_conditional_puts(place.bucket, "samples")
    abort_uploads(store, Location(place.bucket, place.key("")), ABANDONED)
    about, data = place.key(BATCH), batch.json_bytes()
    try:
        put = store.put_once(place.bucket, about, data, content_type=JSON)
    except Held as error:
        found = sampling_batch.parse_batch(store.get(place.bucket, about), f"{place}/batch.json")
        how = "of another request"
        if other := found.fingerprint.differences(batch.fingerprint):
            how = f"begun under another fingerprint ({other})"
        elif found.model_copy(update={"chunk": batch.chunk}) == batch:
            how = f"in chunks of {found.chunk_size} images (sampling_batch.chunk), and this has {batch.chunk_size}"
        raise Held(
            f"{place} holds a batch {how}: finish it where and as it was begun, or give --to another prefix"
        ) from error
    if put == "already there" and sampling_batch.is_usual(place) and not store.exists(place.bucket, place.key(SUCCESS)):
        # What is drawn at first may lie there as well, so that nothing else tells `darkroom gc` that the batch is not
        # abandoned.
        store.put_once(place.bucket, f"{RESUMED}/{place.prefix}/{uuid4().hex}", b"")
    if table is not None and not store.exists(place.bucket, place.key(KEPT)):
        with (
            writing(store, place.bucket, place.key(KEPT), sampling_batch.PARQUET) as kept,
            table.path.open("rb") as rows,
        ):
            while piece := rows.read(COPIED_AT_ONCE):
                kept.write(piece)
