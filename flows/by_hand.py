"""A person decides who is champion: ``promote --to`` and ``model rollback``.

Neither needs Prefect: taking back a bad model waits for no orchestrator. Killed at any moment and given again, each
ends the same.
"""

from mlflow.client import MlflowClient

from diffusion.config import Config
from diffusion.errors import Held, UserError
from flows import registry
from flows.aliases import CHAMPION, adopted, aliases_of, project
from flows.champion import registered_version
from flows.derived import takedowns
from flows.history import Entry, Evidence, History, What
from flows.ledger import Ledger
from flows.ledger_record import append
from flows.registry import WEIGHTS, Version
from flows.taken_down import with_takedowns


class Changed(Config):
    """Who is champion now, and the entry that says so."""

    version: Version
    entry: Entry
    already: bool
    """Whether it was so before: nothing was added to the ledger."""


def promote(
    model: str, number: int, reason: str | None = None, taken_down: bool = False, evidence: Evidence | None = None
) -> Changed:
    """Make version ``number`` of ``model`` champion, whatever the gate said of it, which its entry tells.

    ``evidence``: what the gate of another registry said, for a version that this one's has not judged.

    Raises UserError if it has no weights, or learned from pictures that were taken down since and ``taken_down`` does
    not say that it may be champion all the same; Held if somebody else changed the champion meanwhile.
    """
    client, ledger = MlflowClient(), Ledger.of(model)
    history = adopted(client, ledger)
    version = _usable(client, history, number, taken_down)
    if history.standing.champion == number:
        return _done(client, ledger, version, already=True)
    return _commit(client, ledger, history, "promote", version, reason, evidence)


def roll_back(model: str, reason: str | None = None) -> Changed:
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
) -> Changed:
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


def _done(client: MlflowClient, ledger: Ledger, version: Version, already: bool) -> Changed:
    entry = project(client, ledger).about(version.number)
    assert entry is not None, "who is champion has an entry that says so"
    return Changed(version=version, entry=entry, already=already)


def _usable(client: MlflowClient, history: History, number: int, taken_down: bool) -> Version:
    """Version ``number``; raises UserError unless it can be champion."""
    version = _registered(client, history.model, number)
    history.require_same(number, version.weights_sha256)
    # Without them nobody could draw with it, or judge the next one beside it.
    if not version.weights_sha256 or registry.weights_size(version) is None:
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
