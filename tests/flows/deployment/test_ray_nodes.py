"""Ingest beyond one machine: a Ray cluster of two nodes, of which one dies in the middle."""

import threading
import time
from pathlib import Path

import pytest

from diffusion.data.fan_out import make_fan_out
from diffusion.data.ingest.chunks import Chunk, prepare_chunk
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.ingest import ingest
from tests.builders.ingested import files_of
from tests.builders.ray_cluster import two_nodes
from tests.builders.shapes import blob

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ray = pytest.importorskip("ray")


@pytest.mark.long
@pytest.mark.drill(
    "a Ray node dies while it ingests",
    "the second of two nodes is taken away at work",
    "the other one finishes, the same bytes",
)
def test_the_other_nodes_finish_with_the_same_bytes(images: Path, tmp_path: Path) -> None:
    for number in range(100, 1700):
        blob(number).save(images / "odd" / f"{number}.png")
    threads = IngestConfig(source=str(images), size=8)
    undisturbed = tmp_path / "undisturbed" / "set"
    ingest(undisturbed, threads)
    config = threads.model_copy(update={"runner": "ray", "workers": 2})
    begun, finished = tmp_path / "begun", tmp_path / "finished"
    begun.mkdir()
    finished.mkdir()

    def slowly(chunk: Chunk) -> str:
        node = ray.get_runtime_context().get_node_id()
        (begun / f"{chunk.first}-{node}").touch()
        time.sleep(1)
        prepared = prepare_chunk(chunk)
        (finished / f"{chunk.first}-{node}").touch()
        return prepared

    with two_nodes({}) as (cluster, second):
        doomed = second.node_id

        def kill() -> None:
            while not any(path.name.endswith(doomed) for path in begun.iterdir()):
                time.sleep(0.05)
            cluster.remove_node(second, allow_graceful=False)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        ingest(tmp_path / "set", config, fan_out=lambda _, chunks: make_fan_out(config)(slowly, chunks))
        killer.join(30)
    lost = {path.name for path in begun.iterdir()} - {path.name for path in finished.iterdir()}
    assert any(name.endswith(doomed) for name in lost), "the node died while it was at work"
    assert len({path.name.partition("-")[0] for path in finished.iterdir()}) > 2
    assert files_of(tmp_path / "set") == files_of(undisturbed)
