"""The server of metrics, asked as a browser does for another page."""

import threading

import httpx
import pytest

from flows.local_stack.server_process import choose_ports
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
    [port] = choose_ports(1)
    threading.Thread(target=serve, args=("127.0.0.1", port), daemon=True).start()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=httpx.HTTPTransport(retries=5)) as client:
        assert client.get("/metrics", headers=headers).status_code == status
