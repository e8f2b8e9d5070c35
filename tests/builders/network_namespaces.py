"""Machines of their own on this one: network namespaces joined by a bridge, each with folders that no other sees."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import pytest

from tests.builders import ROOT
from tests.builders.ray_cluster import ENVIRONMENT
from tests.builders.servers import plain
from tests.builders.waiting import wait_for

HIDE_OTHERS = 'for folder in $OTHERS; do mount -t tmpfs none "$folder" || exit 9; done; cd "$HOME" && exec "$@"'
"""Script of a process in a namespace, whose mounts are its own: what others write is not there."""
RAY = [
    # On a busy machine a node gives up after half a minute; others of a lost head run until they miss it.
    *("sh", "-c", 'until "$@"; do sleep 1; done', "sh"),
    *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--object-store-memory=80000000"),
]


@dataclass
class Node:
    """A machine with the address ``address``, which the others reach."""

    name: str
    address: str
    folder: Path
    others: Sequence[Path]
    variables: dict[str, str] = field(default_factory=dict)

    def start(self, log: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a process there in its folder, which is its HOME, too; what it says goes to the file ``log``."""
        environment = plain() | ENVIRONMENT | {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"} | self.variables
        environment |= {"HOME": str(self.folder), "TMPDIR": str(self.folder / "tmp")}
        environment["OTHERS"] = " ".join(map(str, self.others))
        with (self.folder / log).open("wb") as file:
            arguments = ["ip", "netns", "exec", self.name, "sh", "-c", HIDE_OTHERS, "sh", *command]
            return subprocess.Popen(arguments, env=environment, stdout=file, stderr=subprocess.STDOUT)

    def kill(self) -> None:
        """Kill everything that runs there, as when it loses power."""
        answer = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        for pid in answer.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def machines(count: int) -> Iterator[tuple[list[Node], str]]:
    """``count`` nodes, and the address at which this process is reached from them; skips without root or ``ip``."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the program ip (apt-get install iproute2)")
    # Interfaces of a deleted namespace are there until the last of its processes has ended.
    number = uuid4().hex[:6]
    bridge, network = f"drk{number}", f"10.213.{int(number[:2], 16)}"
    names = [f"{bridge}-{place}" for place in range(count)]
    try:
        _ip("link", "add", bridge, "type", "bridge")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this system does not let root make a bridge: {error.stderr}")
    # Sockets have short names.
    root = Path(tempfile.mkdtemp(prefix="drk"))
    nodes = list[Node]()
    try:
        _ip("addr", "add", f"{network}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        folders = [root / str(place) for place in range(count)]
        for place, (name, folder) in enumerate(zip(names, folders, strict=True)):
            (folder / "tmp").mkdir(parents=True)
            address, inner = f"{network}.{place + 2}", f"d{number}i{place}"
            _ip("netns", "add", name)
            nodes.append(Node(name, address, folder, [other for other in folders if other != folder]))
            _ip("link", "add", f"d{number}o{place}", "type", "veth", "peer", "name", inner)
            _ip("link", "set", f"d{number}o{place}", "master", bridge, "up")
            _ip("link", "set", inner, "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", inner)
            for device in (inner, "lo"):
                _ip("-n", name, "link", "set", device, "up")
            # By its route to the outside Ray finds a machine's own address.
            _ip("-n", name, "route", "add", "default", "via", f"{network}.1")
        yield nodes, f"{network}.1"
    finally:
        for node in nodes:
            node.kill()
            subprocess.run(["ip", "netns", "del", node.name], check=False)
        subprocess.run(["ip", "link", "del", bridge], check=False)
        shutil.rmtree(root, ignore_errors=True)


def start_ray(nodes: Sequence[Node], variables: Mapping[str, str]) -> None:
    """Start a cluster of which the first node is the head, without a core to give, and each other one has one core."""
    head, *workers = nodes
    for node in nodes:
        node.variables = {**variables, "RAY_ADDRESS": f"{head.address}:6379"}
    start_head(head)
    for worker in workers:
        start_worker(worker)
    wait_for_workers(head, len(workers))


def start_head(head: Node) -> None:
    """Start the head, once the last one is forgotten."""
    place = ["--head", "--port=6379", f"--temp-dir={head.folder / 'ray'}", "--include-dashboard=false"]
    head.start("ray.log", *RAY, *place, f"--node-ip-address={head.address}", "--num-cpus=0")
    log = head.folder / "ray.log"
    wait_for(lambda: "Ray runtime started" in log.read_text(), 600, log.read_text)


def wait_for_workers(head: Node, count: int) -> None:
    """Wait until ``count`` nodes have joined the head."""
    wait = "import ray, time; ray.init('auto', log_to_driver=False)\n"
    wait += f"while ray.cluster_resources().get('CPU', 0) < {count}: time.sleep(0.1)"
    assert head.start("wait.log", sys.executable, "-c", wait).wait(600) == 0, (head.folder / "wait.log").read_text()


def start_worker(worker: Node) -> None:
    """Join a node to the cluster, and again whenever it has lost the head."""
    worker.start(
        "ray.log",
        *RAY,
        f"--address={worker.variables['RAY_ADDRESS']}",
        f"--node-ip-address={worker.address}",
        "--num-cpus=1",
    )


def driver(node: Node, *arguments: str) -> subprocess.Popen[bytes]:
    """Start ``tests/builders/ray_driver.py`` on a node."""
    return node.start("driver.log", sys.executable, str(ROOT / "tests" / "builders" / "ray_driver.py"), *arguments)
