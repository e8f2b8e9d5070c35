"""Whether servers do their work: each is asked as its clients ask, with their password and by their name for it.

MLflow's ``/health`` says 200 while it refuses the name by which its clients call it, and Prefect's while it refuses
their password; so neither is asked.
"""

import os
from collections.abc import Callable, Mapping

from tenacity import Retrying, stop_after_delay, wait_fixed

from diffusion.common.errors import DarkroomError, UserError
from flows.environment import SERVER_TITLES, SERVER_VARIABLES, Server, settings
from flows.local_stack.http_api import NotServing, fetch, query_mlflow, query_prefect, server_url


def check(name: str) -> list[str]:
    """Return if the server does its work, with what it lacks all the same, a line each.

    ``name`` is one of ``CHECKS``, which the environment says where to find, or a URL that has to answer. Raises
    NotServing or UserError that says why the server does not do its work.
    """
    if name.startswith("http://"):
        fetch(name)
    elif name == "s3":
        return _s3()
    elif name in CHECKS:
        CHECKS[name]()
    else:
        raise UserError(
            f"{name} is none of the servers whose health is known: {', '.join(CHECKS)}, s3, or a http:// address"
        )
    return []


def require(*servers: Server) -> None:
    """Return when each of ``servers`` does its work; raises DarkroomError that names one which does not in 10 s.

    Clients of MLflow and Prefect would try for minutes, and say nothing meanwhile. A file in MLflow's place is not
    asked, and neither is S3, whose client tries for seconds.
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
    """What the server lacks; raises UserError if it has no answer, or no conditional writes."""
    # boto3 takes half a second that the other questions do not need.
    from flows.storage.multipart import honours_conditional_completion
    from flows.storage.s3 import PROBE, Store, client
    from flows.storage.s3_errors import Denied

    server, bucket = server_url("AWS_ENDPOINT_URL_S3"), settings().bucket
    store = Store(client(attempts=1, read_timeout=3))
    # One key, so that the answer is as small where a million lie beside it.
    list(store.list_keys(bucket, f"samples/{PROBE}"))
    try:
        store.require_conditional_puts(bucket, "samples")
        conditional = honours_conditional_completion(store, bucket, "samples")
    except Denied:
        return [
            "s3: these keys may not write to samples/, so it was not tried whether the server honours If-None-Match"
        ]
    if conditional:
        return []
    return [
        f"s3: {server} ignores If-None-Match when an upload in parts is completed: sampling in tars stays safe by the "
        "sums beside them (KEY.sha256); objects that others upload in parts can be overwritten"
    ]


CHECKS: Mapping[str, Callable[[], object]] = {
    "mlflow": lambda: query_mlflow("experiments/search?max_results=1"),
    # That needs the password and the database, which a version number does not.
    "prefect": lambda: query_prefect("flows/count", {}),
}
