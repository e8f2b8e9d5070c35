"""Program: an ingest on Ray from the working folder, whose data set has its shards on S3 alone: SOURCE REMOTE."""

import sys
from pathlib import Path

from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from flows.datasets.dvc import restore_data
from flows.datasets.remote_shards import RemoteShards
from flows.datasets.sync import bring_up_to_date, publish
from flows.storage.s3 import S3Objects

FOLDER = Path("data/blobs")

if __name__ == "__main__":
    source, remote = sys.argv[1:]
    config = IngestConfig(source=source, size=8, runner="ray", workers=2)
    restore_data(FOLDER, remote, without_shards=True)
    bring_up_to_date(FOLDER, remote, config, without_shards=True)
    ingest(FOLDER, config, objects=S3Objects(), remote=RemoteShards(FOLDER, remote))
    print(publish(FOLDER, remote))
