"""Ingest on Ray nodes that share nothing but S3: nodes die, and the bytes are those of threads."""

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from flows.datasets.catalog import Catalog, Heads
from flows.datasets.checkout import checkout
from flows.storage.s3 import Object, S3Objects, Store
from tests.builders.ingested import files_of
from tests.builders.network_namespaces import (
    Node,
    driver,
    machines,
    start_head,
    start_ray,
    start_worker,
    wait_for_workers,
)
from tests.builders.s3_proxy import Request, proxied
from tests.builders.shapes import blob

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]


@dataclass
class Cluster:
    """A head and two workers, and what happens at their requests to S3."""

    nodes: list[Node]
    variables: dict[str, str]
    bucket: str
    watch: Callable[[Request], str | None] = field(default=lambda request: None)

    @property
    def place(self) -> tuple[str, str]:
        """The source, and the remote."""
        return f"s3://{self.bucket}/images", f"s3://{self.bucket}/dvc"

    def ingest(self) -> int:
        """Run the driver on the head until it ends."""
        return driver(self.nodes[0], *self.place).wait(600)

    @property
    def log(self) -> str:
        return (self.nodes[0].folder / "driver.log").read_text()[-4000:]

    def require_bytes_of_threads(self, tmp_path: Path) -> None:
        """Fail if the published version has other files than an ingest on threads, or anything else is left."""
        source, remote = self.place
        expected, here = tmp_path / "threads" / "blobs", tmp_path / "here" / "blobs"
        ingest(expected, IngestConfig(source=source, size=8), objects=S3Objects())
        catalog = Catalog.of("blobs", remote)
        checkout(here, Heads(catalog).newest(), lambda: remote)
        assert files_of(here) == files_of(expected)
        assert not list(catalog.store.list_keys(self.bucket, "staging/blobs/"))
        assert not list(self.nodes[0].folder.rglob("*.tar"))


@pytest.fixture
def cluster(bucket: str, store: Store, s3_environment: dict[str, str], tmp_path: Path) -> Iterator[Cluster]:
    path, objects = tmp_path / "image.png", list[Object]()
    # Three chunks, of which the last two have duplicates of images of the first.
    for number in range(1300):
        blob(number % 1000 if number < 1020 else number % 1280 if number >= 1280 else number).save(path)
        objects.append(Object(f"images/{number:04d}.png", path.read_bytes()))
    store.put_many(bucket, objects)
    with ExitStack() as stack:
        nodes, host = stack.enter_context(machines(3))
        made = Cluster(nodes, {**s3_environment, "DARKROOM_BUCKET": bucket}, bucket)
        url = stack.enter_context(proxied(s3_environment, lambda request: made.watch(request), host))
        made.variables["AWS_ENDPOINT_URL_S3"] = url
        start_ray(nodes, made.variables)
        yield made


@pytest.mark.drill
def test_nodes_killed_in_each_stage_change_nothing(cluster: Cluster, tmp_path: Path) -> None:
    stages, lock = [("GET", "images/"), ("PUT", "staging/"), ("GET", ".tar")], threading.Lock()

    def watch(request: Request) -> None:
        doomed = next((node for node in cluster.nodes[1:] if node.address == request.client), None)
        with lock:
            if doomed and stages and request.method == stages[0][0] and stages[0][1] in request.key:
                del stages[0]
                doomed.kill()
                threading.Timer(1, start_worker, [doomed]).start()

    cluster.watch = watch
    assert cluster.ingest() == 0, cluster.log
    assert not stages
    cluster.require_bytes_of_threads(tmp_path)


@pytest.mark.drill
def test_a_head_killed_while_s3_is_busy_changes_nothing(cluster: Cluster, tmp_path: Path) -> None:
    numbers, killed, lock = itertools.count(), threading.Event(), threading.Lock()

    def watch(request: Request) -> str | None:
        with lock:
            if not killed.is_set() and request.method == "PUT" and request.key.endswith(".parquet"):
                killed.set()
                cluster.nodes[0].kill()
        return "SlowDown" if next(numbers) % 5 == 0 else None

    cluster.watch = watch
    assert cluster.ingest() != 0
    assert killed.is_set(), cluster.log
    start_head(cluster.nodes[0])
    wait_for_workers(cluster.nodes[0], len(cluster.nodes) - 1)
    assert cluster.ingest() == 0, cluster.log
    cluster.require_bytes_of_threads(tmp_path)
