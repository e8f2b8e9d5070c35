"""Measures of stored images, shard by shard on any worker, in tables that are cached by the shard's digest."""

import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image

from diffusion.common.errors import UserError
from diffusion.common.extensions import extension_versions
from diffusion.common.files import digest_of, sha256_bytes, write_atomically
from diffusion.common.onnx_network import OnnxNetwork
from diffusion.common.progress import Progress
from diffusion.curation.config import CurationConfig, NsfwModel, threshold_fields
from diffusion.curation.rules import GROUP, LUMA, RULES, Rule
from diffusion.data.fan_out import FanOut
from diffusion.data.ingest.chunks import perceptual_hash
from diffusion.data.ingest.staging import RemoteDataset
from diffusion.data.manifest import STORED, Manifest, Part, measures_folder, read_records
from diffusion.data.shards import ShardStore, shard_file
from diffusion.data.versions.versions import count_stored
from diffusion.evaluation.config import EvaluationConfig

CHUNK_PIXELS = 2**22
"""Pixels of images in memory at a time, of eight images at least."""
MAX_MODEL_BYTES = 10**9
"""Size limit of a classifier's file, in bytes."""
PIXEL_RULES = tuple(name for name, rule in RULES.items() if rule.source == "pixels" and threshold_fields(name))
IMAGE_COLUMNS = (
    *("source", "source_sha256", "outcome", "reason", "leader", "key", "split", "width", "height", "offset", "size"),
    *("label", "labelled_by", "given_label"),
)


class Measure(Protocol):
    """A computation on images whose results are cached: picklable, as it may run on any worker."""

    @property
    def digest(self) -> str:
        """Return the digest of everything that determines the results."""

    def columns(self, images: np.ndarray) -> dict[str, pa.Array]:
        """Compute columns of ``images``, (N, H, W, 3) uint8."""


@dataclass(frozen=True)
class PixelMeasures:
    """Sharpness, entropy, border, text, brightness, contrast and the perceptual hash: a millisecond per image."""

    digest: str = digest_of(["pixels", 2, *PIXEL_RULES])

    def columns(self, images: np.ndarray) -> dict[str, pa.Array]:
        """Compute one column for each."""
        luma = images @ LUMA
        columns = {name: _column(RULES[name]().measure(images, luma)) for name in PIXEL_RULES}
        return columns | {"phash": pa.array([perceptual_hash(Image.fromarray(image)) for image in images])}


@dataclass(frozen=True)
class RuleMeasure:
    """What the rule ``name`` of another package measures."""

    name: str
    rule: Rule

    @property
    def digest(self) -> str:
        """Return the digest of the package's version and of all settings but the thresholds."""
        settings = self.rule.model_dump(mode="json", exclude={"min", "max"})
        return digest_of(["rule", self.name, extension_versions(GROUP).get(self.name), settings])

    def columns(self, images: np.ndarray) -> dict[str, pa.Array]:
        """Compute its column; raises UserError if the rule does not give one number for each image."""
        values = np.asarray(self.rule.measure(images, images @ LUMA), np.float64)
        if values.shape != (len(images),) or not np.isfinite(values).all():
            raise UserError(
                f"curation.rules.{self.name} does not give a finite number for each image: update "
                f"{extension_versions(GROUP).get(self.name, 'it')}"
            )
        return {self.name: _column(values)}


def _column(values: np.ndarray) -> pa.Array:
    return pa.array(np.asarray(values, np.float32))


@dataclass(frozen=True)
class Features:
    """Features of the network that ``config`` names."""

    config: EvaluationConfig

    @cached_property
    def digest(self) -> str:
        """Return the digest of the network and its preprocessing."""
        network = extractor_of(self.config)
        return digest_of(["features", 1, network.name, network.digest, network.preprocessing])

    def columns(self, images: np.ndarray) -> dict[str, pa.Array]:
        """Compute the features as lists of float32, rounded to 11 bits."""
        network = extractor_of(self.config)
        features = network(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))).numpy()
        # Half the space. Values at the edge of a rounding step may still differ between processors.
        values = pa.array(np.ascontiguousarray(features, np.float16).ravel())
        return {"features": pa.FixedSizeListArray.from_arrays(values, features.shape[1])}


@dataclass(frozen=True)
class SmallImages:
    """Small, blurred copies of images, by which ``evaluation.metrics.registration`` compares near-duplicates."""

    digest: str = digest_of(["small", 1])

    def columns(self, images: np.ndarray) -> dict[str, pa.Array]:
        """Compute them as lists of 3·SIDE·SIDE 8-bit levels."""
        from diffusion.evaluation.metrics.registration import shrink_and_blur

        small = shrink_and_blur(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))
        levels = small.mul(255).round().byte().flatten(1).numpy()
        return {"small": pa.FixedSizeListArray.from_arrays(pa.array(levels.ravel()), levels.shape[1])}


@lru_cache(maxsize=2)
def extractor_of(config: EvaluationConfig) -> Any:
    """Open the network that ``config`` names, once per process."""
    # Imported here: pixels are measured without its libraries.
    from diffusion.evaluation.features.feature_extractor import make_extractor

    return make_extractor(config)


@dataclass(frozen=True)
class NsfwScores:
    """Scores of the classifier ``model``, whose file holds ``data``, as workers may not have it."""

    model: NsfwModel
    sha256: str
    data: bytes = field(repr=False, compare=False)

    @classmethod
    def from_model(cls, model: NsfwModel) -> "NsfwScores":
        """Check the classifier's file; raises UserError if it is missing, too large, or takes another input."""
        path = model.path
        if not path.is_file():
            raise UserError(f"no classifier at curation.nsfw.path = {path}: give the path of an .onnx file")
        if (size := path.stat().st_size) > MAX_MODEL_BYTES:
            raise UserError(
                f"curation.nsfw.path = {path} has {size:,} bytes, over the limit of {MAX_MODEL_BYTES:,}: use another"
            )
        data = path.read_bytes()
        scores = cls(model, sha256_bytes(data), data)
        _classifier(scores)
        return scores

    @property
    def digest(self) -> str:
        """Return the digest of the file and the input."""
        return digest_of(["nsfw", 1, self.sha256, self.model.model_dump(mode="json", exclude={"path"})])

    def columns(self, images: np.ndarray) -> dict[str, pa.Array]:
        """Compute the scores; raises UserError if they are not in [0, 1]."""
        from diffusion.evaluation.features.feature_extractor import resize

        network, size = _classifier(self)
        x = resize(torch.from_numpy(images.transpose(0, 3, 1, 2)).float(), size).numpy()
        x = x if self.model.channels == "RGB" else x[:, ::-1]
        x = x.transpose(0, 2, 3, 1) if self.model.layout == "NHWC" else x
        to_channels = (1, 1, 1, 3) if self.model.layout == "NHWC" else (1, 3, 1, 1)
        mean, std = (np.array(values, np.float32).reshape(to_channels) for values in (self.model.mean, self.model.std))
        name = network.session.get_inputs()[0].name
        (scores,) = network.run(None, {name: np.ascontiguousarray((x - mean) / std)})
        try:
            nsfw_scores = scores.reshape(len(images), -1)[:, self.model.output]
        except IndexError as error:
            words = f"{self.model.path} gives scores {scores.shape}: set curation.nsfw.output to one of them"
            raise UserError(words) from error
        if not ((nsfw_scores >= 0) & (nsfw_scores <= 1)).all():
            raise UserError(
                f"{self.model.path} gives scores outside 0 to 1 (curation.nsfw.output = {self.model.output}): "
                "export it with its softmax or sigmoid"
            )
        return {"nsfw": pa.array(nsfw_scores.astype(np.float32))}


@lru_cache(maxsize=2)
def _classifier(scores: NsfwScores) -> tuple[OnnxNetwork, int]:
    """Open the classifier, and find the height and width of its input."""
    path = scores.model.path
    network = OnnxNetwork(path, scores.data)
    inputs, outputs = network.session.get_inputs(), network.session.get_outputs()
    kinds, shape = [argument.type for argument in (*inputs, *outputs)], inputs[0].shape
    if kinds == ["tensor(float)"] * 2 and len(shape) == 4:
        count, *rest = shape
        sides, channels = (rest[:2], rest[2]) if scores.model.layout == "NHWC" else (rest[1:], rest[0])
        fixed_sides = {side for side in sides if isinstance(side, int)}
        size = scores.model.size or min(fixed_sides, default=None)
        if channels == 3 and not isinstance(count, int) and size is not None and fixed_sides <= {size}:
            return network, size
    types = ", ".join(f"{argument.type} {tuple(argument.shape)}" for argument in inputs)
    raise UserError(
        f"{path} takes {types}, which is not a batch of float images as curation.nsfw says (layout "
        f"{scores.model.layout}, size {scores.model.size}): correct these, or export it with a dynamic first dimension"
    )


@dataclass(frozen=True)
class ShardTask:
    """The measuring of the images in the shard of ``part``, of the data set in ``folder``."""

    folder: Path
    part: Part
    measure: str
    """Digest of the measure."""
    rows: pa.Table
    """Columns key, offset and size of its images."""
    store: ShardStore | None = None
    """None: the shard lies in the folder."""

    @property
    def path(self) -> Path:
        """Return the path of the table."""
        assert self.part.shard is not None
        return measures_folder(self.folder) / f"{self.part.shard.sha256[:32]}-{self.measure[:16]}.parquet"

    def read(self, keys: Sequence[str]) -> pa.Table:
        """Read the table, in the order of ``keys``; raises an error of the file or of Arrow if it is damaged."""
        table = pq.read_table(self.path, page_checksum_verification=True)
        return table.take(pc.index_in(pa.array(keys, pa.string()), table["key"]))

    def write(self, table: pa.Table) -> None:
        """Write the table."""
        write_atomically(self.path, lambda partial: pq.write_table(table, partial, write_page_checksum=True))

    def is_done(self, keys: Sequence[str]) -> bool:
        """Whether there is a whole table that has all ``keys``."""
        with suppress(OSError, pa.ArrowInvalid):
            return bool(self.read(keys)["key"].null_count == 0)
        return False


def measure_shard(measures: Mapping[str, Measure], task: ShardTask) -> tuple[ShardTask, pa.Table]:
    """Measure the images of a shard by one of ``measures``; returns the table, which is ``task``'s to ``write``."""
    assert task.part.shard is not None
    columns: list[dict[str, pa.Array]] = []
    with shard_file(task.folder, task.part.shard, task.store) as path:
        step = max(8, CHUNK_PIXELS // read_images(path, task.rows.slice(0, 1)).size)
        for start in range(0, len(task.rows), step):
            images = read_images(path, task.rows.slice(start, step))
            columns.append(measures[task.measure].columns(images))
    tables = [pa.table(chunk) for chunk in columns]
    return task, pa.concat_tables(tables).append_column("key", task.rows["key"].combine_chunks())


def stored_rows(folder: Path, part: Part) -> pa.Table:
    """Read the records, IMAGE_COLUMNS, of the images in the shard of ``part``."""
    return read_records(folder, part, IMAGE_COLUMNS).filter(pc.field("outcome").isin(STORED))


def read_images(shard: Path, rows: pa.Table) -> np.ndarray:
    """Read the images that ``rows`` describe from their shard, grey ones as RGB: (N, H, W, 3) uint8."""
    images = []
    with shard.open("rb") as file:
        for offset, size in zip(rows["offset"].to_pylist(), rows["size"].to_pylist(), strict=True):
            file.seek(offset)
            image = Image.open(io.BytesIO(file.read(size)), formats=("PNG",))
            images.append(np.asarray(image.convert("RGB")))
    return np.stack(images)


@dataclass(frozen=True)
class Measurements:
    """All stored images of a version, kept or dropped, in the order of their keys."""

    records: pa.Table
    """IMAGE_COLUMNS, and ``part``, the place of the part in the manifest."""
    columns: dict[str, np.ndarray]
    """Measures by name, each (N,) float64: ``side``, ``aspect``, and what pixels, a classifier and other packages give
    if they are needed."""
    phashes: list[str]
    """Perceptual hashes; empty if they are not needed."""
    matrices: dict[str, torch.Tensor]
    """``features`` (N, D) float32, and ``small`` (N, 3·SIDE·SIDE) uint8, if they are needed."""
    store: ShardStore | None
    """Store of the shards that are not in the data set's folder."""

    def __len__(self) -> int:
        return len(self.records)


def measure(
    folder: Path,
    manifest: Manifest,
    config: CurationConfig,
    evaluation: EvaluationConfig,
    fan_out: FanOut,
    progress: Progress,
    *,
    everything: bool = False,
    remote: RemoteDataset | None = None,
) -> Measurements:
    """Measure what the rules of ``config`` need, or ``everything`` that they could, of all images of ``manifest``.

    Tables of measured shards are reused. ``remote`` has the shards that are not in ``folder``. Raises UserError for a
    shard that is missing or damaged, and for a network that is unavailable or does not fit.
    """
    names = {limit.name for limit in config.limits}
    measures: list[Measure] = [
        RuleMeasure(name, rule) for name, rule in config.rules.items() if everything or name in names
    ]
    if everything or names.intersection(PIXEL_RULES) or config.near_duplicates is not None:
        measures.append(PixelMeasures())
    if everything or config.compares_features:
        measures.append(Features(evaluation))
    if everything or config.semantic_duplicates is not None:
        measures.append(SmallImages())
    if config.nsfw is not None and (everything or config.max_nsfw is not None):
        measures.append(NsfwScores.from_model(config.nsfw))
    parts = [(number, part) for number, part in enumerate(manifest.parts) if part.shard is not None]
    part_rows = [stored_rows(folder, part) for _, part in parts]
    keys = [rows["key"].to_pylist() for rows in part_rows]
    stores = [remote.only(part.shard) if remote and part.shard else None for _, part in parts]
    by_digest = {each.digest: each for each in measures}
    tasks = [
        [
            ShardTask(folder, part, digest, rows.select(["key", "offset", "size"]), store)
            for (_, part), rows, store in zip(parts, part_rows, stores, strict=True)
        ]
        for digest in by_digest
    ]
    missing = [task for row in tasks for task, names in zip(row, keys, strict=True) if not task.is_done(names)]
    total, done = sum(count_stored(task.part) for task in missing), 0
    if missing:
        progress("images measured", 0, total)
    for task, table in fan_out(partial(measure_shard, by_digest), missing):
        task.write(table)
        done += len(table)
        progress("images measured", done, total)
    pairs = zip(part_rows, parts, strict=True)
    records = pa.concat_tables(
        [rows.append_column("part", pa.array(np.full(len(rows), number))) for rows, (number, _) in pairs]
    )
    order = np.argsort(np.array(records["key"].to_pylist()))
    tables = [[task.read(names) for task, names in zip(row, keys, strict=True)] for row in tasks]
    return _assemble(records.take(order), order, tables, remote)


def _assemble(
    records: pa.Table, order: np.ndarray, tables: Sequence[Sequence[pa.Table]], store: ShardStore | None
) -> Measurements:
    """Put the tables of each measure, shard by shard, into the ``order`` of ``records``."""
    width, height = records["width"].to_numpy(), records["height"].to_numpy()
    sides = np.minimum(width, height).astype(float)
    columns = {"side": sides, "aspect": np.maximum(width, height) / sides}
    phashes, matrices = list[str](), dict[str, torch.Tensor]()
    for shard_tables in tables:
        for name in set(shard_tables[0].column_names) - {"key"}:
            pieces = [table[name] for table in shard_tables]
            if (dtype := {"features": np.float32, "small": np.uint8}.get(name)) is not None:
                rows = np.argsort(order)  # of each image in the order of the shards
                matrix, start = np.empty((len(order), pieces[0].type.list_size), dtype), 0
                for piece in pieces:
                    matrix[rows[start : start + len(piece)]] = pc.list_flatten(piece).to_numpy().reshape(len(piece), -1)
                    start += len(piece)
                matrices[name] = torch.from_numpy(matrix)
                continue
            values = np.concatenate([piece.to_numpy(zero_copy_only=False) for piece in pieces])[order]
            if name == "phash":
                phashes = values.tolist()
            else:
                columns[name] = values.astype(float)
    return Measurements(records, columns, phashes, matrices, store)
