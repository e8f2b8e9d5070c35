"""Program: an ingest on Ray from the working folder, whose data set has its shards on S3 alone: SOURCE REMOTE."""

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ray

from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.prefetch import yield_in_order
from flows.datasets.dvc import restore_data
from flows.datasets.remote_shards import RemoteShards
from flows.datasets.sync import bring_up_to_date, publish
from flows.storage.s3 import S3Objects

FOLDER = Path("data/blobs")


class Future:
    """A result that Ray has, or will have."""

    def __init__(self, reference: Any) -> None:
        self.reference = reference

    def result(self) -> Any:
        return ray.get(self.reference)


def fan_out(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Run on any node, again on another one if it dies."""
    task = ray.remote(num_cpus=1, max_retries=5, retry_exceptions=True)(work)
    yield from yield_in_order((Future(task.remote(item)) for item in items), 4)


if __name__ == "__main__":
    source, remote = sys.argv[1:]
    config = IngestConfig(source=source, size=8, runner="ray")
    ray.init("auto")
    restore_data(FOLDER, remote, without_shards=True)
    bring_up_to_date(FOLDER, remote, config, without_shards=True)
    ingest(FOLDER, config, objects=S3Objects(), fan_out=fan_out, remote=RemoteShards(FOLDER, remote))
    print(publish(FOLDER, remote))
