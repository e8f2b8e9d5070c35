"""Data sets in a catalog on S3."""

import shutil
from pathlib import Path

from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from diffusion.data.manifest import Manifest, read_manifest, work_folder
from flows.datasets.catalog import Catalog
from flows.datasets.dvc import record_data
from tests.builders.shapes import blob

FOLDER = Path("data/blobs")


class Place:
    """The working folder with its images, a DVC repository and a bucket of its own."""

    def __init__(self, bucket: str, images: Path) -> None:
        self.bucket = bucket
        self.source = f"s3://{bucket}/dvc"
        self.images = images
        self.catalog = Catalog.of(FOLDER.name, self.source)

    def version(self, *numbers: int) -> Manifest:
        """Ingest more images, push and publish."""
        for number in numbers:
            blob(number).save(self.images / "odd" / f"{number}.png")
        ingest(FOLDER, IngestConfig(source=str(self.images), size=8, held_out=0.33))
        self.publish()
        return read_manifest(FOLDER)

    def publish(self) -> None:
        version = record_data(FOLDER, self.source)
        self.catalog.publish(read_manifest(FOLDER), version.digest)

    def reach(self) -> str:
        return self.source

    def forget(self) -> None:
        """As on another machine: nothing but what lies on S3."""
        for path in (FOLDER, work_folder(FOLDER), Path(".dvc/cache")):
            shutil.rmtree(path, ignore_errors=True)
        FOLDER.with_suffix(".dvc").unlink()
