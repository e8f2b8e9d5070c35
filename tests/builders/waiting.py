"""Waiting for what another process does."""

import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import httpx

T = TypeVar("T")


def wait_for(ask: Callable[[], T | None], seconds: float = 300, why: Callable[[], object] = lambda: "") -> T:
    """Ask until there is an answer, which is returned; fails after ``seconds``, and says ``why``."""
    deadline = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < deadline, why()
        time.sleep(0.1)
    return answer


def wait_until_served(url: str, process: "subprocess.Popen[Any]", seconds: float = 300) -> None:
    """Ask until the server at ``url`` answers with success; fails if its process ends before."""

    def ask() -> bool:
        assert process.poll() is None, process.communicate()
        with suppress(httpx.TransportError):
            return httpx.get(url).is_success
        return False

    wait_for(ask, seconds)
