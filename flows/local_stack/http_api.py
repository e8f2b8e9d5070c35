"""Minimal HTTP client for MLflow and Prefect, whose own clients take seconds to import."""

import base64
import http.client
import json
import os
import urllib.request
from typing import Any
from urllib.parse import unquote, urlsplit

from diffusion.common.errors import DarkroomError, UserError

LARGEST = 64 * 2**20
"""Largest accepted response, in bytes."""


class NotServing(DarkroomError):
    """The service does not answer correctly (yet)."""


def request_json(url: str, login: str = "", body: Any = None) -> Any:
    """Send a GET, or a POST of ``body``; returns the JSON response. Raises NotServing without one within 3 s."""
    try:
        return json.loads(fetch(url, login, body))
    except ValueError as error:
        raise NotServing(f"{without_login(url)[0]}: {error}") from error


def query_mlflow(path: str, body: Any = None) -> Any:
    """Query the environment's MLflow server; ``path`` is below ``/api/2.0/mlflow/``."""
    login = ":".join(os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
    url = f"{server_url('MLFLOW_TRACKING_URI')}/api/2.0/mlflow/{path}"
    return request_json(url, "" if login == ":" else login, body)


def query_prefect(path: str, body: Any = None) -> Any:
    """Query the environment's Prefect server; ``path`` is below ``/api/``."""
    return request_json(f"{server_url('PREFECT_API_URL')}/{path}", os.environ.get("PREFECT_API_AUTH_STRING", ""), body)


def server_url(variable: str) -> str:
    """Server URL in an environment variable; raises UserError if it is not set."""
    if not (value := os.environ.get(variable)):
        raise UserError(f"{variable} is not set: set it to the URL of the server")
    return value.rstrip("/")


def fetch(url: str, login: str = "", body: Any = None) -> bytes:
    """Send a GET, or a POST of ``body``; returns the raw response. Raises NotServing without one within 3 s."""
    url, named = without_login(url)
    login, headers = login or named, {"Content-Type": "application/json"}
    if login:
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, headers)
        # No proxy for the loopback address.
        proxies: dict[str, str] | None = {} if request.host.startswith("127.0.0.1") else None
        with urllib.request.build_opener(urllib.request.ProxyHandler(proxies)).open(request, timeout=3) as answer:
            content = bytes(answer.read(LARGEST + 1))
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise NotServing(f"{url}: {error}") from error
    if len(content) > LARGEST:
        raise NotServing(f"{url}: answers with more than {LARGEST} bytes")
    return content


def without_login(url: str) -> tuple[str, str]:
    """Split ``url`` into the URL without login, and the login ``USER:PASSWORD``, which may be empty."""
    parts = urlsplit(url)
    login, at, host = parts.netloc.rpartition("@")
    return parts._replace(netloc=host).geturl() if at else url, unquote(login)
