"""Batches that gc meets."""

from pathlib import Path

from flows.sampling import generate_batch
from flows.sampling.batch_format import SamplingBatch
from flows.storage.s3 import Location, Store
from flows.storage.s3_errors import MissingObjectError
from tests.builders.sampling_batches import batch

BATCHES = [batch(4, chunk=2), batch(4, chunk=2, format="tar")]


def generate(store: Store, sampling_batch: SamplingBatch, bucket: str, weights: Path) -> Location:
    """As the flow ``sample`` does, without Prefect; returns where the finished batch lies."""
    while True:
        place = generate_batch.find_default_place(store, sampling_batch, bucket)
        generate_batch.begin(store, sampling_batch, place, None)
        try:
            for chunk in generate_batch.list_unfinished_chunks(store, sampling_batch, place):
                generate_batch.generate_chunk(store, sampling_batch, place, weights, chunk, None, 1)
        except MissingObjectError:
            assert generate_batch.is_deleted(store, place)
            continue
        if generate_batch.finish(store, sampling_batch, place):
            return place
