"""The champion of a registered model: whether it can still be used, and promotion and rollback by a person.

A candidate is compared with the champion after hours of training. So whether there is one to compare with is looked at
before: somebody may have deleted its version in MLflow, or its weights. A person's decision needs no Prefect: taking
back a bad model waits for no orchestrator. Killed at any moment and given again, it ends the same.
"""

from mlflow.client import MlflowClient

from diffusion.common.config import Config
from diffusion.common.errors import Held, UserError
from flows.config import Params
from flows.deployment.tasks import step
from flows.environment import settings
from flows.registry import model_versions
from flows.registry.aliases import CHAMPION, Record, adopted, aliases_of, append, none_if_missing, project, verified
from flows.registry.ledger import Ledger
from flows.registry.ledger_entries import Entry, Evidence, History, What
from flows.registry.model_versions import WEIGHTS, Version
from flows.registry.takedown_marks import takedowns, with_takedowns


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
            model_versions.fetch_weights(
                model_versions.version_of(client, history.model, champion), settings().folder / "models"
            )
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
    size = model_versions.weights_size(version)
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
    return same and model_versions.weights_size(version) is not None


def registered_version(client: MlflowClient, model: str, number: int) -> Version | None:
    """Version ``number`` of ``model``; None if MLflow has none of that number."""
    return none_if_missing(model_versions.version_of, client, model, number)


class ChampionChange(Config):
    """Who is champion now, and the entry that says so."""

    version: Version
    entry: Entry
    already: bool
    """Whether it was so before: nothing was added to the ledger."""


def promote(
    model: str, number: int, reason: str | None = None, taken_down: bool = False, evidence: Evidence | None = None
) -> ChampionChange:
    """Make version ``number`` of ``model`` champion, whatever the gate said of it, which its entry tells.

    ``evidence``: what the gate of another registry said, for a version that this one's has not judged.

    Raises UserError if it has no weights, or learned from images that were taken down since and ``taken_down`` does
    not say that it may be champion all the same; Held if somebody else changed the champion meanwhile.
    """
    client, ledger = MlflowClient(), Ledger.of(model)
    history = adopted(client, ledger)
    version = _usable(client, history, number, taken_down)
    if history.standing.champion == number:
        return _done(client, ledger, version, already=True)
    return _commit(client, ledger, history, "promote", version, reason, evidence)


def roll_back(model: str, reason: str | None = None) -> ChampionChange:
    """Make the champion before this one champion again; twice in a row goes back twice.

    A rollback that was killed before MLflow's aliases followed is finished, and no second one begun. Raises UserError
    if there was no champion before, or it can be champion no more; Held if somebody changed the champion meanwhile.
    """
    client, ledger = MlflowClient(), Ledger.of(model)
    history = adopted(client, ledger)
    now, before = history.standing.champion, history.standing.previous
    head = history.head
    killed = head is not None and head.what == "rollback" and aliases_of(client, model).get(CHAMPION) != now
    # MLflow has no alias for a version that was deleted, which nothing could finish.
    if head is not None and killed and registered_version(client, model, head.version):
        return _done(client, ledger, _registered(client, model, head.version), already=True)
    if before is None:
        known = f"champion {now} is the first" if now else "there is no champion"
        raise UserError(f"{known} of {model}: name the version to promote with `darkroom promote --to NUMBER`")
    version = _usable(client, history, before, taken_down=False)
    return _commit(client, ledger, history, "rollback", version, reason)


def _commit(
    client: MlflowClient,
    ledger: Ledger,
    seen: History,
    what: What,
    version: Version,
    reason: str | None,
    evidence: Evidence | None = None,
) -> ChampionChange:
    def decide(history: History) -> Entry:
        if history.standing.champion != seen.standing.champion:
            raise Held(
                f"{history.faster()}: look at `darkroom model history`, and give the command again if it still holds"
            )
        last = history.about(version.number)
        judged = last.evidence if last and last.evidence else evidence
        return history.then(what, version.number, version.weights_sha256, by_hand=True, reason=reason, evidence=judged)

    append(client, ledger, decide)
    return _done(client, ledger, version, already=False)


def _done(client: MlflowClient, ledger: Ledger, version: Version, already: bool) -> ChampionChange:
    entry = project(client, ledger).about(version.number)
    assert entry is not None, "who is champion has an entry that says so"
    return ChampionChange(version=version, entry=entry, already=already)


def _usable(client: MlflowClient, history: History, number: int, taken_down: bool) -> Version:
    """Version ``number``; raises UserError unless it can be champion."""
    version = _registered(client, history.model, number)
    history.require_same(number, version.weights_sha256)
    # Without them nobody could draw with it, or judge the next one beside it.
    if not version.weights_sha256 or model_versions.weights_size(version) is None:
        raise UserError(f"{version.uri} has no weights ({WEIGHTS}, artifacts/weights.safetensors): promote another one")
    version = with_takedowns(version)
    words = takedowns(version)
    if words and not taken_down:
        raise UserError(
            f"{words}, or say with `darkroom promote --to {number} --taken-down` that it may be champion all the same"
        )
    if taken_down and not words:
        raise UserError(f"nothing was taken down of what {version.uri} learned from: leave --taken-down out")
    return version


def _registered(client: MlflowClient, model: str, number: int) -> Version:
    version = registered_version(client, model, number)
    if version is None:
        raise UserError(
            f"models:/{model}/{number} is not in the registry: `darkroom promote --to NUMBER` takes one that is"
        )
    return version
