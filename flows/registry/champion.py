"""The champion of a registered model: checks before hours of training, and promotion and rollback by override."""

from mlflow.client import MlflowClient

from diffusion.checkpoints import verify_weights
from diffusion.common.config import Config
from diffusion.common.errors import ConflictError, UserError
from flows.config import Params
from flows.deployment.tasks import retryable_task
from flows.environment import settings
from flows.registry import model_versions
from flows.registry.aliases import CHAMPION, append, list_aliases, project, read_record, read_verified_history
from flows.registry.ledger import History, Ledger, LedgerEntry, LedgerEvent
from flows.registry.model_versions import WEIGHTS, Version, registered_version
from flows.registry.takedown_marks import TAKEDOWN, describe_takedowns, reload_with_takedowns


@retryable_task
def require_champion(params: Params) -> None:
    """Fetch the champion's weights if there is one; raises UserError with ways out if it or the ledger is unusable."""
    client = MlflowClient()
    history = read_verified_history(client, Ledger.of(params.model_name))
    if (problem := champion_problem(client, history)) is not None:
        raise UserError(problem)
    if (champion := history.alias_numbers.champion) is not None:
        try:
            model_versions.cached_weights(model_versions.get_version(client, history.model, champion))
        except UserError as error:
            raise UserError(f"{error}, or {_recovery_hints(client, history)}") from error


def champion_problem(client: MlflowClient, history: History) -> str | None:
    """Describe in one line what is wrong with the champion, if any, with possible fixes; None if nothing is."""
    if (number := history.alias_numbers.champion) is None or (problem := _problem(client, history, number)) is None:
        return None
    hints = _recovery_hints(client, history)
    return f"version {number} of {history.model} is champion by the ledger, and {problem}: {hints}"


def _problem(client: MlflowClient, history: History, number: int) -> str | None:
    """Reason why version ``number`` can neither be compared nor become champion; None if it can."""
    if (version := registered_version(client, history.model, number)) is None:
        return "is not in MLflow's registry any more"
    if (entry := history.find_newest_entry(number)) is not None and entry.weights_sha256 != version.weights_sha256:
        return "MLflow's registry has other weights under that number"
    if (size := model_versions.artifact_size(version.uri)) is None or not version.weights_sha256:
        return "its weights are gone"
    path = settings().folder / "models" / f"{version.weights_sha256}.safetensors"
    if path.is_file() and path.stat().st_size != size:
        return "its weights were altered"
    return None


def _recovery_hints(client: MlflowClient, history: History) -> str:
    standing, (_, versions) = history.alias_numbers, read_record(client, history.model)
    candidates = [
        number
        for number in sorted(versions, key=lambda number: (number == standing.candidate, number), reverse=True)
        if number != standing.champion and TAKEDOWN not in versions[number].tags
        if _problem(client, history, number) is None
    ]
    hints = ["--set registry.model=NAME begins a model of another name"]
    if candidates:
        hints.insert(0, f"`darkroom promote --to {candidates[0]}` makes version {candidates[0]} champion")
    if standing.previous in candidates:
        hints.insert(0, f"`darkroom model rollback` makes version {standing.previous} champion")
    return ", or ".join(hints)


class ChampionChange(Config):
    """New champion with its ledger entry."""

    version: Version
    entry: LedgerEntry
    already: bool
    """Whether it was champion before, so that nothing was added to the ledger."""


def promote(model: str, number: int, reason: str | None = None, taken_down: bool = False) -> ChampionChange:
    """Make version ``number`` of ``model`` champion regardless of the gate's verdict, which the entry records.

    Raises UserError if the version has no weights, or learned from images taken down since without ``taken_down``, and
    ConflictError if another process changed the champion meanwhile.
    """
    client, ledger = MlflowClient(), Ledger.of(model)
    history = read_verified_history(client, ledger)
    version = _require_usable(client, history, number, taken_down)
    if history.alias_numbers.champion == number:
        entry = history.find_newest_entry(number)
        if reason is not None and entry is not None and entry.reason != reason:
            raise UserError(
                f"{version.uri} is champion already, by entry {entry.number} of the ledger ({entry.why}), to which no "
                "reason can be added: leave --reason out"
            )
        return _finish(client, ledger, version, already=True)
    return _commit(client, ledger, history, "promote", version, reason)


def roll_back(model: str, reason: str | None = None) -> ChampionChange:
    """Make the previous champion champion again, or finish a rollback that was killed before the aliases were written.

    Raises UserError if there is no usable previous champion, and ConflictError if another process changed it meanwhile.
    """
    client, ledger = MlflowClient(), Ledger.of(model)
    history = read_verified_history(client, ledger)
    head, now, previous_champion = history.head, history.alias_numbers.champion, history.alias_numbers.previous
    is_incomplete = head is not None and head.what == "rollback" and list_aliases(client, model).get(CHAMPION) != now
    # A deleted version can have no alias in MLflow, so its rollback cannot be finished.
    if head is not None and is_incomplete and (version := registered_version(client, model, head.version)):
        return _finish(client, ledger, version, already=True)
    if previous_champion is None:
        problem = f"champion {now} is the first" if now else "there is no champion"
        raise UserError(f"{problem} of {model}: name the version to promote with `darkroom promote --to NUMBER`")
    version = _require_usable(client, history, previous_champion, taken_down=False)
    return _commit(client, ledger, history, "rollback", version, reason)


def _commit(
    client: MlflowClient,
    ledger: Ledger,
    base_history: History,
    event: LedgerEvent,
    version: Version,
    reason: str | None,
) -> ChampionChange:
    def decide(history: History) -> LedgerEntry:
        if history.alias_numbers.champion != base_history.alias_numbers.champion:
            raise ConflictError(
                f"{history.describe_conflict()}: look at `darkroom model history`, and give the command again if it "
                "still holds"
            )
        last_entry = history.find_newest_entry(version.number)
        basis = last_entry.evidence if last_entry else None
        return history.next_entry(
            event, version.number, version.weights_sha256, by_hand=True, reason=reason, evidence=basis
        )

    append(client, ledger, decide)
    return _finish(client, ledger, version, already=False)


def _finish(client: MlflowClient, ledger: Ledger, version: Version, already: bool) -> ChampionChange:
    entry = project(client, ledger).find_newest_entry(version.number)
    assert entry is not None, "who is champion has an entry that says so"
    return ChampionChange(version=version, entry=entry, already=already)


def _require_usable(client: MlflowClient, history: History, number: int, taken_down: bool) -> Version:
    """Look up version ``number``; raises UserError unless it can be champion."""
    if (version := registered_version(client, history.model, number)) is None:
        raise UserError(
            f"models:/{history.model}/{number} is not in the registry: `darkroom promote --to NUMBER` takes one that is"
        )
    history.require_same(number, version.weights_sha256)
    # Without weights it could neither generate images nor be compared with the next candidate.
    if not version.weights_sha256 or model_versions.artifact_size(version.uri) is None:
        raise UserError(f"{version.uri} has no weights ({WEIGHTS}, artifacts/weights.safetensors): promote another one")
    verify_weights(model_versions.cached_weights(version))
    version = reload_with_takedowns(version)
    if (message := describe_takedowns(version)) and not taken_down:
        raise UserError(
            f"{message}, or say with `darkroom promote --to {number} --taken-down` that it may be champion all the same"
        )
    if taken_down and not message:
        raise UserError(f"nothing was taken down of what {version.uri} learned from: leave --taken-down out")
    return version
