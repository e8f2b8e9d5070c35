"""A Ray cluster of two nodes on this machine, of which one may die."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

from tests.builders import ROOT

ENVIRONMENT = {
    # Tasks find our packages, say nothing to anybody, and find a dead node within seconds.
    "PYTHONPATH": str(ROOT),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}


@contextmanager
def two_nodes(variables: Mapping[str, str]) -> Iterator[tuple[Any, Any]]:
    """The cluster and its second node, each node its own processes with one core to give and ``variables``.

    Inside, RAY_ADDRESS names it.
    """
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**variables, **ENVIRONMENT}.items():
            patch.setenv(name, value)
        # Ray takes 127.0.0.1 for the machine's address to the outside.
        node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "node_ip_address": "127.0.0.2"}
        cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
        try:
            second = cluster.add_node(**node)
            cluster.wait_for_nodes()
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield cluster, second
        finally:
            ray.shutdown()
            cluster.shutdown()


def at_work(node: Any) -> bool:
    """Whether one of the test's tasks runs on ``node``: Ray names its processes after what they do."""
    [raylet] = node.all_processes["raylet"]
    try:
        children = psutil.Process(raylet.process.pid).children(recursive=True)
        names = [each.cmdline()[:1] for each in children]
    except psutil.NoSuchProcess:
        return False
    return any(name and name[0].startswith("ray::") and "IDLE" not in name[0] for name in names)
