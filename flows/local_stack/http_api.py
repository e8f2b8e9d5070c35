"""MLflow's and Prefect's HTTP interfaces, for what must be small and quick: their libraries take seconds to load."""

import base64
import http.client
import json
import os
import urllib.request
from typing import Any
from urllib.parse import unquote, urlsplit

from diffusion.common.errors import DarkroomError, UserError

LARGEST = 64 * 2**20
"""Bytes of an answer that are read; a longer one is an error."""


class NotServing(DarkroomError):
    """The service does not answer as it should (yet)."""


def request_json(url: str, login: str = "", body: Any = None) -> Any:
    """The JSON answer to a GET, or to a POST of ``body``; raises NotServing without one in 3 s."""
    try:
        return json.loads(fetch(url, login, body))
    except ValueError as error:
        raise NotServing(f"{without_login(url)[0]}: {error}") from error


def query_mlflow(path: str, body: Any = None) -> Any:
    """What the MLflow server of the environment answers, ``path`` being below ``/api/2.0/mlflow/``."""
    login = ":".join(os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
    return request_json(
        f"{server_url('MLFLOW_TRACKING_URI')}/api/2.0/mlflow/{path}", "" if login == ":" else login, body
    )


def query_prefect(path: str, body: Any = None) -> Any:
    """What the Prefect server of the environment answers, ``path`` being below its ``/api/``."""
    return request_json(f"{server_url('PREFECT_API_URL')}/{path}", os.environ.get("PREFECT_API_AUTH_STRING", ""), body)


def server_url(variable: str) -> str:
    """The address of a server that the environment names; raises UserError if it does not."""
    if not (value := os.environ.get(variable)):
        raise UserError(f"{variable} is not set: it says where the server is that is asked")
    return value.rstrip("/")


def fetch(url: str, login: str = "", body: Any = None) -> bytes:
    """The answer to a GET, or to a POST of ``body``, as it comes; raises NotServing without one in 3 s."""
    url, named = without_login(url)
    login, headers = login or named, {"Content-Type": "application/json"}
    if login:
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, headers)
        # The environment's proxy has no business on the loopback address.
        proxies: dict[str, str] | None = {} if request.host.startswith("127.0.0.1") else None
        opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
        with opener.open(request, timeout=3) as answer:
            found = bytes(answer.read(LARGEST + 1))
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise NotServing(f"{url}: {error}") from error
    if len(found) > LARGEST:
        raise NotServing(f"{url}: answers with more than {LARGEST} bytes")
    return found


def without_login(url: str) -> tuple[str, str]:
    """``url`` as it may be shown, and the login in it, ``USER:PASSWORD``; empty if it has none."""
    parts = urlsplit(url)
    login, at, host = parts.netloc.rpartition("@")
    return parts._replace(netloc=host).geturl() if at else url, unquote(login)
