"""The champion of a registered model: whether it can still be used, and the ways out if it cannot.

A candidate is compared with the champion after hours of training. So whether there is one to compare with is looked at
before: somebody may have deleted its version in MLflow, or its weights.
"""

from mlflow.client import MlflowClient
from mlflow.exceptions import MlflowException

from diffusion.errors import UserError
from flows import registry
from flows.derived import takedowns
from flows.environment import settings
from flows.history import History
from flows.ledger import Ledger
from flows.ledger_record import Record, verified
from flows.params import Params
from flows.registry import Version
from flows.steps import step


@step
def require_champion(params: Params) -> None:
    """Raise UserError, with the ways out, if the champion cannot be compared with; fetch its weights if it can.

    Raises UserError also if the ledger is broken. A model without a champion is fine.
    """
    client = MlflowClient()
    history = verified(client, Ledger.of(params.model_name))
    if (words := champion_problem(client, history)) is not None:
        raise UserError(words)
    if (champion := history.standing.champion) is not None:
        try:
            registry.fetch_weights(registry.version_of(client, history.model, champion), settings().folder / "models")
        except UserError as error:
            raise UserError(f"{error}, or {_ways_out(client, history)}") from error


def champion_problem(client: MlflowClient, history: History) -> str | None:
    """What is wrong with the champion that the ledger names, and the ways out, in a line; None if nothing is.

    A model without a champion is fine. The weights are looked for and not fetched.
    """
    number = history.standing.champion
    if number is None or (words := _problem(client, history, number)) is None:
        return None
    return f"version {number} of {history.model} is champion by the ledger, and {words}: {_ways_out(client, history)}"


def _problem(client: MlflowClient, history: History, number: int) -> str | None:
    """Why version ``number`` can be compared with nothing; None: it can."""
    version = registered_version(client, history.model, number)
    if version is None:
        return "is not in MLflow's registry any more"
    entry = history.about(number)
    if entry is None or entry.weights_sha256 != version.weights_sha256:
        return "MLflow's registry has other weights under that number"
    size = registry.weights_size(version)
    if size is None or not version.weights_sha256:
        return "its weights are gone"
    cached = settings().folder / "models" / f"{version.weights_sha256}.safetensors"
    if cached.is_file() and cached.stat().st_size != size:
        return "its weights were altered"
    return None


def _ways_out(client: MlflowClient, history: History) -> str:
    previous, challenger = history.standing.previous, history.standing.challenger
    others = sorted(Record.of(client, history.model).versions, key=lambda number: (number == challenger, number))
    usable = [
        number
        for number in reversed(others)
        if number != history.standing.champion and _can_be_champion(client, history, number)
    ]
    ways = []
    if previous in usable:
        ways.append(f"`darkroom model rollback` makes version {previous} champion")
    if usable:
        ways.append(f"`darkroom promote --to {usable[0]}` makes version {usable[0]} champion")
    ways.append("--set registry.model=NAME begins a model of another name")
    return ", ".join(ways[:-1]) + (", or " if ways[:-1] else "") + ways[-1]


def _can_be_champion(client: MlflowClient, history: History, number: int) -> bool:
    """Whether a person could promote this version by hand without saying more."""
    version = registered_version(client, history.model, number)
    if version is None or takedowns(version) or not version.weights_sha256:
        return False
    entry = history.about(number)
    same = entry is None or entry.weights_sha256 == version.weights_sha256
    return same and registry.weights_size(version) is not None


def registered_version(client: MlflowClient, model: str, number: int) -> Version | None:
    """Version ``number`` of ``model``; None if MLflow has none of that number."""
    try:
        return registry.version_of(client, model, number)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
