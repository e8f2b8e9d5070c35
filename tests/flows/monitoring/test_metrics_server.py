"""The server of metrics, asked as a browser does for another page."""

import socket
import threading

import httpx
import pytest

from flows.monitoring.prometheus import serve


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:9999"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}, 403),
    ],
)
def test_metrics_are_refused_to_other_pages(no_servers: None, headers: dict[str, str], status: int) -> None:
    with socket.socket() as held:
        # Until the server listens: the system gives the port to no other process, and two sockets may be bound to it.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        threading.Thread(target=serve, args=("127.0.0.1", port), daemon=True).start()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=httpx.HTTPTransport(retries=5)) as client:
            assert client.get("/metrics", headers=headers).status_code == status
