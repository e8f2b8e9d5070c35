"""Whether servers do their work: each is asked as its clients ask, with their password and by their name for it.

MLflow's ``/health`` says 200 while it refuses the name by which its clients call it, and Prefect's while it refuses
their password; so neither is asked.
"""

from collections.abc import Callable, Mapping

from diffusion.errors import UserError
from flows.asking import ask_mlflow, ask_prefect, fetch, named
from flows.environment import settings


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
