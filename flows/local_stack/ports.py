"""Free ports on the loopback address."""

import random
import socket
from collections.abc import Collection, Iterable
from itertools import islice

from diffusion.common.errors import DarkroomError

GRPC = 10_000
"""Offset of SeaweedFS's gRPC port from each of its ports."""
RANGE = range(10_000, 22_000)
"""Candidate ports; even with ``GRPC`` added they are below the ephemeral ports."""


def is_free(port: int) -> bool:
    """Whether ``port`` is free to listen on."""
    with socket.socket() as probe:
        # As servers do: ports in TIME_WAIT count as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def are_free(ports: Iterable[int]) -> bool:
    """Whether all of ``ports`` and their gRPC ports are free."""
    return all(is_free(port) and is_free(port + GRPC) for port in ports)


def choose(count: int, taken: Collection[int]) -> list[int]:
    """Choose ``count`` different free ports, none of them in ``taken``."""
    candidates = (port for port in random.SystemRandom().sample(RANGE, 1000) if port not in taken)
    chosen = list(islice((port for port in candidates if are_free([port])), count))
    if len(chosen) < count:
        raise DarkroomError(f"no {count} free ports between {RANGE.start} and {RANGE.stop}")
    return chosen
