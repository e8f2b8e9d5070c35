"""Ingest beyond one machine: a Ray cluster of two nodes, of which one dies in the middle."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect import flow
from prefect.testing.utilities import prefect_test_harness

from diffusion.data.chunks import Chunk, PreparedChunk, prepare_chunk
from diffusion.data.config import IngestConfig
from diffusion.data.ingest import IngestResult, ingest
from flows.fan_out import prefect_fan_out, task_runner
from tests.conftest import blob
from tests.diffusion.test_ingest import files_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ray = pytest.importorskip("ray")


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[object, object]]:
    """A cluster with a node for the driver and one that may die, each its own processes with one core to give."""
    from ray.cluster_utils import Cluster

    for name, value in {
        # Tasks find our packages, say nothing to anybody, and find a dead node within seconds.
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_failure_threshold": "3",
    }.items():
        monkeypatch.setenv(name, value)
    # Ray takes 127.0.0.1 for the machine's address to the outside.
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "node_ip_address": "127.0.0.2"}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    try:
        second = cluster.add_node(**node)
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster, second
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_when_a_node_dies_in_the_middle_the_others_finish_with_the_same_bytes(
    nodes: tuple[object, object], pictures: Path, tmp_path: Path
) -> None:
    cluster, second = nodes
    for number in range(100, 1700):
        blob(number).save(pictures / "odd" / f"{number}.png")
    threads = IngestConfig(source=str(pictures), size=8)
    undisturbed = tmp_path / "undisturbed" / "set"
    ingest(undisturbed, threads)
    config = threads.model_copy(update={"runner": "ray", "workers": 2})
    begun, finished = tmp_path / "begun", tmp_path / "finished"
    begun.mkdir()
    finished.mkdir()

    def slowly(chunk: Chunk) -> PreparedChunk:
        node = ray.get_runtime_context().get_node_id()
        (begun / f"{chunk.first}-{node}").touch()
        time.sleep(1)
        prepared = prepare_chunk(chunk)
        (finished / f"{chunk.first}-{node}").touch()
        return prepared

    doomed = second.node_id  # type: ignore[attr-defined]

    def kill() -> None:
        while not any(path.name.endswith(doomed) for path in begun.iterdir()):
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)  # type: ignore[attr-defined]

    @flow(task_runner=task_runner(config))
    def make() -> IngestResult:
        run = prefect_fan_out(config)
        return ingest(tmp_path / "set", config, fan_out=lambda _, chunks: run(slowly, chunks))

    killer = threading.Thread(target=kill, daemon=True)
    with prefect_test_harness(server_startup_timeout=180):
        killer.start()
        make()
    killer.join(30)
    lost = {path.name for path in begun.iterdir()} - {path.name for path in finished.iterdir()}
    assert any(name.endswith(doomed) for name in lost), "the node died while it was at work"
    assert len({path.name.partition("-")[0] for path in finished.iterdir()}) > 2
    assert files_of(tmp_path / "set") == files_of(undisturbed)
