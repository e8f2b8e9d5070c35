"""Sampling batches on S3."""

import io
from typing import Any

import pyarrow.parquet as pq

from diffusion.common.fingerprint import fingerprint
from diffusion.process.samplers import sampling_config
from flows.sampling.batch_format import SamplingBatch
from flows.storage.s3 import Location, Store

SAMPLING = sampling_config(sampler="dpmpp_2m", steps=2, compute_batch=8, precision="fp32")


def batch(count: int, **changes: Any) -> SamplingBatch:
    return SamplingBatch(
        model="blobs",
        version=3,
        run_id="r",
        content_digest="c" * 64,
        weights_sha256="d" * 64,
        seed=7,
        count=count,
        sampling=SAMPLING,
        fingerprint=fingerprint(SAMPLING.compute_batch, SAMPLING.precision, SAMPLING.device),
        chunk=16,
    ).model_copy(update=changes)


def stored_files(store: Store, place: Location) -> dict[str, bytes]:
    return {
        key.removeprefix(place.key("")): store.get(place.bucket, key)
        for key in store.list_keys(place.bucket, place.key(""))
    }


def rows_of(files: dict[str, bytes]) -> list[dict[str, Any]]:
    return list(pq.read_table(io.BytesIO(files["manifest.parquet"])).to_pylist())
