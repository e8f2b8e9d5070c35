"""Health checks of the servers, with the same URL and credentials as their clients.

MLflow's and Prefect's ``/health`` endpoints are not used: they return 200 even if the host name or the password is
rejected.
"""

import os
from collections.abc import Callable, Mapping

from tenacity import Retrying, stop_after_delay, wait_fixed

from diffusion.common.errors import DarkroomError, UserError
from flows.environment import SERVER_TITLES, SERVER_VARIABLES, Server, settings
from flows.local_stack.http_api import NotServing, fetch, query_mlflow, query_prefect


def check(name: str) -> list[str]:
    """Check a server; returns what could not be tested, one line each.

    ``name`` is one of ``CHECKS``, located by the environment, s3, or a http:// URL. Raises NotServing or UserError with
    the reason if the server does not work.
    """
    if name == "s3":
        return _s3()
    if name.startswith("http://"):
        fetch(name)
    elif name in CHECKS:
        CHECKS[name]()
    else:
        raise UserError(f"{name} is no server with a health check: use {', '.join(CHECKS)}, s3, or a http:// address")
    return []


def require(*servers: Server) -> None:
    """Wait until each of ``servers`` works; raises DarkroomError for one that does not within 10 s.

    The clients of MLflow and Prefect would retry silently for minutes. A file store of MLflow is not checked, nor is
    S3, whose client fails within seconds.
    """
    for server in servers:
        variable = SERVER_VARIABLES[server][0]
        if server == "s3" or not os.environ.get(variable, "").startswith("http"):
            continue
        try:
            for attempt in Retrying(stop=stop_after_delay(10), wait=wait_fixed(1), reraise=True):
                with attempt:
                    CHECKS[server]()
        except NotServing as error:
            raise DarkroomError(
                f"{SERVER_TITLES[server]} does not answer ({error}): is it running, and is {variable} right?"
            ) from error


def _s3() -> list[str]:
    """What could not be tested of the S3 server; raises UserError without an answer or conditional writes."""
    # boto3 takes half a second to import, which the other checks save.
    from flows.storage.s3 import PROBE, Denied, Store, client

    bucket = settings().bucket
    store = Store(client(attempts=1, read_timeout=3))
    # A prefix of one key, so that the listing is short in any bucket.
    list(store.list_keys(bucket, f"samples/{PROBE}"))
    try:
        store.require_conditional_puts(bucket, "samples")
    except Denied:
        return ["s3: these keys may not write to samples/, so whether the server honours If-None-Match was not tested"]
    return []


CHECKS: Mapping[str, Callable[[], object]] = {
    "mlflow": lambda: query_mlflow("experiments/search?max_results=1"),
    # Needs the password and the database, unlike the version number.
    "prefect": lambda: query_prefect("flows/count", {}),
}
