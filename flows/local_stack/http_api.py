"""Requests to MLflow and Prefect, whose own clients take seconds to import, and health checks with them.

The checks use the same URL and credentials as the clients, and not the servers' ``/health`` endpoints, which return 200
even if the host name or the password is rejected.
"""

import base64
import json
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any
from urllib.parse import unquote, urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from diffusion.common.errors import DarkroomError, UserError
from diffusion.common.http_client import HttpClient, HttpError
from diffusion.common.parsing import parse_json
from flows.environment import SECRET_VARIABLE, SERVER_TITLES, SERVER_VARIABLES, Server, settings

MAX_ANSWER = 64 * 2**20  # bytes
RESTART_SECONDS = 1
"""Seconds in which a server that is being restarted is back."""


class NotServingError(DarkroomError):
    """The service does not answer correctly (yet)."""


class LoginRejectedError(UserError):
    """The server rejects user or password."""


def request_json(url: str, login: str = "", body: Any = None, timeout: float = 3) -> Any:
    """Send a GET, or a POST of ``body``; returns the JSON response. Raises as ``fetch`` does."""
    try:
        return parse_json(fetch(url, login, body, timeout))
    except ValueError as error:
        raise NotServingError(f"{split_login(url)[0]}: {error}") from error


def query_mlflow(path: str, timeout: float = 3) -> Any:
    """Query the environment's MLflow server; ``path`` is below ``/api/2.0/mlflow/``."""
    login = ":".join(os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
    url = f"{server_url('MLFLOW_TRACKING_URI')}/api/2.0/mlflow/{path}"
    return request_json(url, "" if login == ":" else login, timeout=timeout)


def search_mlflow(resource: str, filter_: str = "", timeout: float = 3) -> list[dict[str, Any]]:
    """All entities of a ``resource``, such as registered-models, in the environment's MLflow server."""
    entities: list[dict[str, Any]] = []
    fields = {"filter": filter_, "max_results": "1000"}
    while True:
        query = urlencode({name: text for name, text in fields.items() if text})
        answer = query_mlflow(f"{resource}/search?{query}", timeout=timeout)
        entities += answer.get(resource.replace("-", "_"), ())
        if not (token := answer.get("next_page_token", "")):
            return entities
        fields["page_token"] = token


def query_prefect(path: str, body: Any = None) -> Any:
    """Query the environment's Prefect server; ``path`` is below ``/api/``."""
    return request_json(f"{server_url('PREFECT_API_URL')}/{path}", os.environ.get("PREFECT_API_AUTH_STRING", ""), body)


def server_url(variable: str) -> str:
    """Server URL in an environment variable; raises UserError if it is not set."""
    if not (value := os.environ.get(variable)):
        raise UserError(f"{variable} is not set: set it to the URL of the server")
    return value.rstrip("/")


def fetch(url: str, login: str = "", body: Any = None, timeout: float = 3) -> bytes:
    """Send a GET, or a POST of ``body``; returns the raw response.

    Raises NotServingError without one within ``timeout`` seconds, LoginRejectedError if the server rejects user or
    password.
    """
    url, url_login = split_login(url)
    login, headers = login or url_login, {"Content-Type": "application/json"}
    if login:
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    method, data = ("GET", b"") if body is None else ("POST", json.dumps(body).encode())
    # No proxy for the loopback address.
    client = HttpClient(timeout, use_proxies=urlsplit(url).hostname != "127.0.0.1")
    with closing(client):
        try:
            with client.stream(method, url, headers, data, max_bytes=MAX_ANSWER) as response:
                if response.status == 401:
                    raise LoginRejectedError(f"{url}: wrong user or password")
                if not 200 <= response.status < 300:
                    raise NotServingError(f"{url}: {response.reason}")
                return b"".join(response.pieces)
        except HttpError as error:
            raise NotServingError(f"{url}: {error}") from error


def split_login(url: str) -> tuple[str, str]:
    """Split ``url`` into the URL without login, and the login ``USER:PASSWORD``, which may be empty."""
    parts = urlsplit(url)
    login, separator, host = parts.netloc.rpartition("@")
    return parts._replace(netloc=host).geturl() if separator else url, unquote(login)


def check(name: str) -> list[str]:
    """Check a server; returns what could not be tested, one line each.

    ``name`` is one of ``CHECKS``, s3, or a http:// URL. Raises NotServingError or UserError if the server does not
    work.
    """
    if name == "s3":
        return _s3()
    if name.startswith("http://"):
        fetch(name)
    elif name in CHECKS:
        CHECKS[name]()
    else:
        raise UserError(
            f"{name} is not a server with a health check: use {', '.join(CHECKS)}, s3, or a http:// address"
        )
    return []


def require(*servers: Server) -> None:
    """Wait until each of ``servers`` works; raises DarkroomError for one that does not within 10 s.

    The clients of MLflow and Prefect would retry silently for minutes. Where nothing listens the error comes at once;
    a busy server is waited for. A wrong login is not retried: UserError. A file store of MLflow is not checked.
    """
    for server in servers:
        _require_listening(server)
    for server in servers:
        variable = SERVER_VARIABLES[server][0]
        if server == "s3":
            require_s3_login()
        elif os.environ.get(variable, "").startswith("http"):
            condition = retry_if_exception_type(NotServingError)
            try:
                Retrying(retry=condition, stop=stop_after_delay(10), wait=wait_fixed(1), reraise=True)(CHECKS[server])
            except LoginRejectedError as error:
                hint = "MLFLOW_TRACKING_USERNAME and " if server == "mlflow" else ""
                raise UserError(f"{SERVER_TITLES[server]} at {error}: set {hint}{SECRET_VARIABLE[server]}") from error
            except NotServingError as error:
                raise DarkroomError(
                    f"{SERVER_TITLES[server]} does not answer ({error}): is it running, is {variable} right, or has "
                    "another program locked its database?"
                ) from error


def _require_listening(server: Server) -> None:
    """Raise DarkroomError if nothing listens at the address of ``server``, unless it is reached through a proxy."""
    names = SERVER_VARIABLES[server][: 2 if server == "s3" else 1]
    variable = next((name for name in names if os.environ.get(name, "").startswith("http")), None)
    if variable is None:
        return  # Amazon's S3, or a file store
    url = urlsplit(split_login(os.environ[variable])[0])
    if url.hostname is None or (url.scheme in getproxies() and not proxy_bypass(url.hostname)):
        return
    moment = Retrying(
        retry=retry_if_exception_type(OSError),
        stop=stop_after_delay(RESTART_SECONDS),
        wait=wait_fixed(0.3),
        reraise=True,
    )
    try:
        address = url.hostname, url.port or (443 if url.scheme == "https" else 80)
        moment(socket.create_connection, address, timeout=2).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DarkroomError(
            f"{SERVER_TITLES[server]} does not answer ({url.scheme}://{url.netloc}: {reason}): is it running, and is "
            f"{variable} right?"
        ) from error


def require_s3_login() -> None:
    """Raise UserError if the S3 server does not answer or does not know the keys; what they may do is not checked."""
    from flows.storage.s3 import PROBE, Store
    from flows.storage.s3_errors import AccessDeniedError, WrongCredentialsError

    try:
        next(Store().list_keys(settings().bucket, f"samples/{PROBE}"), None)
    except WrongCredentialsError:
        raise
    except AccessDeniedError:  # these keys may not list everything, as a command may not need
        pass


def _s3() -> list[str]:
    """What could not be tested of the S3 server; raises UserError without an answer or conditional writes."""
    # boto3 takes half a second to import, which the other checks save.
    from flows.storage.s3 import PROBE, Store, client
    from flows.storage.s3_errors import AccessDeniedError

    bucket = settings().bucket
    store = Store(client(attempts=1, read_timeout=3))
    # A prefix of one key, so that the listing is short in any bucket.
    list(store.list_keys(bucket, f"samples/{PROBE}"))
    try:
        store.require_conditional_puts(bucket, "samples")
    except AccessDeniedError:
        return ["s3: these keys may not write to samples/, so whether the server honours If-None-Match was not tested"]
    return []


CHECKS: Mapping[str, Callable[[], object]] = {
    "mlflow": lambda: query_mlflow("experiments/search?max_results=1"),
    # Needs the password and the database, unlike the version number.
    "prefect": lambda: query_prefect("flows/count", {}),
}
