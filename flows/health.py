"""Whether servers do their work: each is asked as its clients ask, with their password and by their name for it.

MLflow's ``/health`` says 200 while it refuses the name by which its clients call it, and Prefect's while it refuses
their password; so neither is asked.
"""

import os
from collections.abc import Callable, Mapping

from tenacity import Retrying, stop_after_delay, wait_fixed

from diffusion.errors import DarkroomError, UserError
from flows.asking import NotServing, ask_mlflow, ask_prefect, fetch, named
from flows.environment import CALLED, NAMED_BY, Server, settings


def check(name: str) -> None:
    """Return if the server does its work; raises NotServing or UserError that says why not.

    ``name`` is one of ``CHECKS``, which the environment says where to find, or a URL that has to answer.
    """
    if name.startswith("http://"):
        fetch(name)
    elif name in CHECKS:
        CHECKS[name]()
    else:
        raise UserError(
            f"{name} is none of the servers whose health is known: {', '.join(CHECKS)}, or a http:// address"
        )


def require(*servers: Server) -> None:
    """Return when each of ``servers`` does its work; raises DarkroomError that names one which does not in 10 s.

    Clients of MLflow and Prefect would try for minutes, and say nothing meanwhile. A file in MLflow's place is not
    asked, and neither is S3, whose client tries for seconds.
    """
    for server in servers:
        variable = NAMED_BY[server][0]
        if server == "s3" or not os.environ.get(variable, "").startswith("http"):
            continue
        try:
            for attempt in Retrying(stop=stop_after_delay(10), wait=wait_fixed(1), reraise=True):
                with attempt:
                    CHECKS[server]()
        except NotServing as error:
            raise DarkroomError(
                f"{CALLED[server]} does not answer ({error}): is it running, and is {variable} right?"
            ) from error


def _s3() -> None:
    # boto3 takes half a second that the other questions do not need.
    from flows.s3 import PROBE, Store, client

    named("AWS_ENDPOINT_URL_S3")
    # One key, so that the answer is as small where a million lie beside it.
    list(Store(client(attempts=1, read_timeout=3)).list_keys(settings().bucket, f"prints/{PROBE}"))


CHECKS: Mapping[str, Callable[[], object]] = {
    "mlflow": lambda: ask_mlflow("experiments/search?max_results=1"),
    # That needs the password and the database, which a version number does not.
    "prefect": lambda: ask_prefect("flows/count", {}),
    "s3": _s3,
}
