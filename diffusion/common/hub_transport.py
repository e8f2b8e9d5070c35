"""Requests of ``huggingface_hub`` by the project's own HTTP client; imported only where that library is installed."""

import os
from functools import cache

import httpx2
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils import hf_raise_for_status

from diffusion.common.errors import UserError
from diffusion.common.http_client import HttpClient, HttpResponse, origin

CREDENTIALS = ("authorization", "cookie")
"""Headers of the Hub alone; uploads to other places need the rest."""
MAX_ANSWER = 2**26
"""Maximum bytes of an answer that is not a file."""
MAX_REDIRECTS = 5
"""Maximum redirects of a POST; the client follows redirects of a GET itself."""


def endpoint() -> str:
    """Return the address of the Hub; raises UserError for one that is not of HTTP."""
    address = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or constants.ENDPOINT
    if not address.startswith(("http://", "https://")):
        raise UserError(f"HF_ENDPOINT is {address}: give https://HOST, or unset it")
    return address


class _Transport(httpx2.BaseTransport):
    """Sends requests by ``client``; only ``endpoint`` gets credentials, wherever links and redirects lead."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Return the answer, read to its end; raises HttpError, before the library would wait and try again."""
        url, headers = str(request.url), dict(request.headers)
        if origin(url) != origin(endpoint()):
            for name in CREDENTIALS:
                headers.pop(name, None)
        assert isinstance(request.stream, httpx2.SyncByteStream)
        with self._client.stream(request.method, url, headers, request.stream, max_bytes=MAX_ANSWER) as response:
            return httpx2.Response(response.status, headers=response.headers.raw, content=b"".join(response.pieces))


@cache
def use_http_client(client: HttpClient) -> None:
    """Let the library send all its requests by ``client``."""
    # It would upload by an HTTP client of its own.
    constants.HF_HUB_DISABLE_XET = True
    set_client_factory(
        lambda: httpx2.Client(
            transport=_Transport(client), follow_redirects=True, max_redirects=MAX_REDIRECTS, timeout=None
        )
    )


def raise_for_status(response: HttpResponse, url: str) -> None:
    """Raise what the library raises for the status of ``response`` to a GET of ``url``."""
    request = httpx2.Request("GET", url)
    hf_raise_for_status(httpx2.Response(response.status, headers=response.headers.raw, request=request))
