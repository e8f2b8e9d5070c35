"""Whether servers do their work: each is asked as its clients ask, with their password and by their name for it.

MLflow's ``/health`` says 200 while it refuses the name by which its clients call it, and Prefect's while it refuses
their password; so neither is asked.
"""

import base64
import http.client
import json
import os
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from diffusion.errors import DarkroomError, UserError

WORKER = "http://127.0.0.1:8080/health"
"""Where ``prefect worker start --with-healthcheck`` says whether it still gets work from Prefect."""
METRICS_PORT = 9464
"""Where ``darkroom metrics`` listens, unless told."""


class NotServing(DarkroomError):
    """The service does not answer as it should (yet)."""


def check(name: str) -> None:
    """Return if the server that the environment names does its work; raises NotServing or UserError that says why not.

    ``worker`` and ``metrics`` are those in the same container.
    """
    if name not in CHECKS:
        raise UserError(f"{name} is none of the servers whose health is known: {', '.join(CHECKS)}")
    CHECKS[name]()


def ask(url: str, login: str = "", question: Any = None) -> Any:
    """The JSON answer to a GET, or to a POST of ``question``; raises NotServing without one in 3 s."""
    try:
        return json.loads(_answer(url, login, question))
    except ValueError as error:
        raise NotServing(f"{url}: {error}") from error


def _answer(url: str, login: str = "", question: Any = None) -> bytes:
    headers = {"Content-Type": "application/json"}
    if login:
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    data = None if question is None else json.dumps(question).encode()
    request = urllib.request.Request(url, data, headers)
    # The environment's proxy has no business on the loopback address.
    proxies = {} if request.host.startswith("127.0.0.1") else None
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler(proxies)).open(request, timeout=3) as answer:
            return bytes(answer.read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise NotServing(f"{url}: {error}") from error


def _named(variable: str) -> str:
    if not (value := os.environ.get(variable)):
        raise UserError(f"{variable} is not set: it names the server whose health is asked for")
    return value.rstrip("/")


def _mlflow() -> None:
    login = ":".join(os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
    ask(f"{_named('MLFLOW_TRACKING_URI')}/api/2.0/mlflow/experiments/search?max_results=1", login.strip(":"))


def _prefect() -> None:
    # That needs the password and the database, which a version number does not.
    login = os.environ.get("PREFECT_API_AUTH_STRING", "")
    ask(f"{_named('PREFECT_API_URL')}/flows/count", login, {})


def _s3() -> None:
    # boto3 takes half a second that the other questions do not need.
    from flows.environment import settings
    from flows.s3 import PROBE, Store, client

    _named("AWS_ENDPOINT_URL_S3")
    # One key, so that the answer is as small where a million lie beside it.
    list(Store(client(attempts=1, read_timeout=3)).list_keys(settings().bucket, f"prints/{PROBE}"))


def _metrics() -> None:
    _answer(f"http://127.0.0.1:{METRICS_PORT}/metrics")


CHECKS: Mapping[str, Callable[[], None]] = {
    "mlflow": _mlflow,
    "prefect": _prefect,
    "s3": _s3,
    "worker": lambda: ask(WORKER),
    "metrics": _metrics,
}
