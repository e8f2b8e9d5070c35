"""MLflow's aliases follow the ledger, whenever a process is stopped; and a person decides who is champion."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from uuid import uuid4

import pytest
from mlflow.client import MlflowClient

from diffusion.common.errors import ConflictError, UserError
from flows.promote import GateResult, next_entry
from flows.registry import champion
from flows.registry.aliases import append, list_aliases, project, read_verified_history, restore
from flows.registry.ledger import Approval, Evidence, History, Ledger, LedgerEntry, What
from flows.registry.model_versions import Version, resolve
from flows.retention.sweeps import find_references
from tests.builders.model_versions import CrashingClient, Killed, add_version

HOLD = Evidence(verdict="hold", reason="kid 0.02 ± 0.01, not lower")
WIN = Evidence(verdict="promote", reason="kid 0.01 ± 0.001, lower")


@pytest.fixture
def client(mlflow_client: MlflowClient, bucket: str, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.setenv("DARKROOM_BUCKET", bucket)
    return mlflow_client


@pytest.fixture
def ledger(client: MlflowClient) -> Ledger:
    return Ledger.of(f"faces-{uuid4().hex}")


@pytest.fixture
def versions(client: MlflowClient, ledger: Ledger, tmp_path: Path) -> list[Version]:
    """Four of them, each at its number."""
    version_list = [add_version(client, tmp_path, ledger.model) for _ in range(4)]
    return [version_list[0], *version_list]


def add(ledger: Ledger, what: What, version: Version, **fields: object) -> LedgerEntry:
    def decide(history: History) -> LedgerEntry:
        return history.next_entry(what, version.number, version.weights_sha256, **fields)  # type: ignore[arg-type]

    head = ledger.append(decide).head
    assert head is not None
    return head


def copies(client: MlflowClient, model: str, number: int) -> dict[str, str]:
    tags = client.get_model_version(model, str(number)).tags
    return {name[-8:]: text for name, text in tags.items() if re.fullmatch(r"darkroom\.ledger\.\d{8}", name)}


def test_aliases_and_copies_of_the_entries_follow_the_ledger(
    client: MlflowClient, versions: list[Version], ledger: Ledger
) -> None:
    add(ledger, "promote", versions[1], evidence=WIN)
    add(ledger, "promote", versions[2], evidence=WIN)
    newest = add(ledger, "hold", versions[3], evidence=HOLD)
    project(client, ledger)
    assert list_aliases(client, ledger.model) == {"champion": 2, "previous": 1, "candidate": 3}
    assert {number: sorted(map(int, copies(client, ledger.model, number))) for number in (1, 2, 3, 4)} == {
        1: [1, 2],
        2: [2],
        3: [3],
        4: [],
    }
    text = copies(client, ledger.model, 3)["00000003"]
    assert newest.digest in text
    assert "kid 0.02 ± 0.01, not lower" in text
    project(CrashingClient(0), ledger)


@pytest.mark.drill(
    "a promotion ends between two writes",
    "after each write to MLflow, one after the other",
    "the ledger decides; the next reader finds and mends the aliases",
)
def test_interrupted_promotion_leaves_one_champion_and_is_repaired(
    client: MlflowClient, versions: list[Version], ledger: Ledger
) -> None:
    add(ledger, "promote", versions[1], evidence=WIN)
    add(ledger, "hold", versions[2], evidence=HOLD)
    project(client, ledger)
    for life in count():
        # Champion, previous and candidate all change.
        new, old = (versions[2], versions[1]) if life % 2 == 0 else (versions[1], versions[2])
        if life % 2 == 1:
            add(ledger, "hold", old, evidence=HOLD)
        add(ledger, "promote", new, evidence=WIN)
        try:
            project(CrashingClient(life), ledger)
            break
        except Killed:
            assert list_aliases(client, ledger.model)["champion"] in (old.number, new.number)
        assert resolve(client, f"models:/{ledger.model}@champion").number == new.number
        assert list_aliases(client, ledger.model) == aliases_after(new, old, life)
    assert life >= 4


def aliases_after(new: Version, old: Version, life: int) -> dict[str, int]:
    candidate = {"candidate": old.number} if life % 2 == 1 else {}
    return {"champion": new.number, "previous": old.number} | candidate


def test_moved_alias_is_restored_on_resolution(client: MlflowClient, versions: list[Version], ledger: Ledger) -> None:
    add(ledger, "promote", versions[1], evidence=WIN)
    project(client, ledger)
    client.set_registered_model_alias(ledger.model, "champion", "3")
    client.set_registered_model_alias(ledger.model, "previous", "2")
    assert resolve(client, f"models:/{ledger.model}@champion").number == 1
    assert list_aliases(client, ledger.model) == {"champion": 1}
    with pytest.raises(UserError, match=f"{ledger.model}@previous is not in the registry"):
        resolve(client, f"models:/{ledger.model}@previous")


def test_numbers_and_other_aliases_need_no_ledger(
    client: MlflowClient, versions: list[Version], ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.set_registered_model_alias(ledger.model, "favourite", "3")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    assert resolve(client, f"models:/{ledger.model}/2").number == 2
    assert resolve(client, f"models:/{ledger.model}@favourite").number == 3
    for uri in (f"models:/{ledger.model}/9", f"models:/{ledger.model}@nobody", "models:/nothing/1"):
        with pytest.raises(UserError, match="is not in the registry"):
            resolve(client, uri)


def objects(ledger: Ledger) -> dict[str, bytes]:
    bucket = ledger.place.bucket
    keys = sorted(ledger.store.list_keys(bucket, ledger.place.key("")))
    return {key.rpartition("/")[2]: ledger.store.get(bucket, key) for key in keys}


def newest_on_record(client: MlflowClient, ledger: Ledger) -> str:
    return str(client.get_registered_model(ledger.model).tags["darkroom.ledger.newest"])


@pytest.fixture
def assert_refused(client: MlflowClient, ledger: Ledger) -> Callable[[str], None]:
    """Whoever reads or writes the ledger is refused with these words, and neither server is changed."""

    def assert_all_fail(words: str) -> None:
        before, tags = objects(ledger), client.get_registered_model(ledger.model).tags
        for act in (
            lambda: champion.promote(ledger.model, 3),
            lambda: champion.roll_back(ledger.model),
            lambda: resolve(client, f"models:/{ledger.model}@champion"),
            lambda: project(client, ledger),
            lambda: read_verified_history(client, ledger),
            lambda: append(client, ledger, lambda history: None),
            lambda: find_references(client, ledger.store, ledger.place.bucket, (), {}),
        ):
            with pytest.raises(UserError, match=words) as error:
                act()
            assert "\n" not in str(error.value)
        assert (objects(ledger), client.get_registered_model(ledger.model).tags) == (before, tags)

    return assert_all_fail


def test_truncated_ledger_is_restored_from_mlflow(
    client: MlflowClient, versions: list[Version], ledger: Ledger, assert_refused: Callable[[str], None]
) -> None:
    add(ledger, "promote", versions[1], evidence=WIN)
    add(ledger, "hold", versions[3], evidence=HOLD)
    add(ledger, "promote", versions[2], evidence=WIN)
    history, whole = project(client, ledger), objects(ledger)
    for missing_files in (["00000003.json"], list(whole)):
        ledger.store.delete_many(ledger.place.bucket, map(ledger.place.key, missing_files))
        assert_refused(r"00000003\.json is missing")
        assert restore(client, ledger) == [int(name[:8]) for name in missing_files]
        assert objects(ledger) == whole
        assert project(client, ledger) == history
    # Copies that are no entries, and one too few.
    client.set_model_version_tag(ledger.model, "4", "darkroom.ledger.00000002.json", "{}")
    ledger.store.delete_many(ledger.place.bucket, map(ledger.place.key, whole))
    with pytest.raises(UserError, match="two records of entry 2"):
        restore(client, ledger)
    client.delete_model_version_tag(ledger.model, "4", "darkroom.ledger.00000002.json")
    client.delete_model_version_tag(ledger.model, "1", "darkroom.ledger.00000001.json")
    with pytest.raises(UserError, match=r"00000001\.json is missing"):
        restore(client, ledger)
    assert objects(ledger) == {}


def test_replaced_ledger_entry_is_detected_everywhere(
    client: MlflowClient, versions: list[Version], ledger: Ledger, assert_refused: Callable[[str], None]
) -> None:
    add(ledger, "promote", versions[1], evidence=WIN)
    project(client, ledger)
    first = ledger.place.key("00000001.json")
    ledger.store.delete_many(ledger.place.bucket, [first])
    add(ledger, "promote", versions[3], evidence=WIN)
    assert_refused(r"00000001\.json was altered")
    with pytest.raises(UserError, match=r"00000001\.json was altered"):
        restore(client, ledger)


def test_outdated_ledger_record_in_mlflow_is_tolerated_when_explained(
    client: MlflowClient, versions: list[Version], ledger: Ledger, assert_refused: Callable[[str], None]
) -> None:
    add(ledger, "promote", versions[1], evidence=WIN)
    project(client, ledger)
    old = newest_on_record(client, ledger)
    # Stopped before it could tell MLflow.
    add(ledger, "promote", versions[2], evidence=WIN)
    assert resolve(client, f"models:/{ledger.model}@champion").number == 2
    new = newest_on_record(client, ledger)
    assert (old[:8], new[:8]) == ("00000001", "00000002")
    # MLflow came back of a backup.
    client.set_registered_model_tag(ledger.model, "darkroom.ledger.newest", old)
    for number, tag in ((1, "00000002"), (2, "00000002"), (2, "00000002.json")):
        client.delete_model_version_tag(ledger.model, str(number), f"darkroom.ledger.{tag}")
    assert resolve(client, f"models:/{ledger.model}@champion").number == 2
    assert newest_on_record(client, ledger) == new
    assert champion.promote(ledger.model, 3).entry.number == 3
    client.set_registered_model_tag(ledger.model, "darkroom.ledger.newest", "00000009" + new[8:])
    assert_refused(r"00000009\.json is missing")
    client.set_registered_model_tag(ledger.model, "darkroom.ledger.newest", "9")
    assert_refused(r"darkroom\.ledger\.newest of .* was altered")
    client.delete_registered_model_tag(ledger.model, "darkroom.ledger.newest")
    assert project(client, ledger).alias_numbers.champion == 3


def test_foreign_objects_stop_neither_promotions_nor_rollbacks_nor_gc(
    client: MlflowClient, versions: list[Version], ledger: Ledger
) -> None:
    for name in ("00000001.json", "00000003.json", "99999999.json", "foo"):
        key = ledger.place.key(name)
        ledger.store.put_once(ledger.place.bucket, key, b"{}")
    assert champion.promote(ledger.model, 1).entry.number == 2
    assert champion.promote(ledger.model, 2).entry.number == 4
    assert champion.roll_back(ledger.model).version.number == 1
    assert resolve(client, f"models:/{ledger.model}@champion").number == 1
    assert newest_on_record(client, ledger).startswith("00000005 ")
    assert len(project(client, ledger).foreign) == 4
    find_references(client, ledger.store, ledger.place.bucket, (), {})


def test_deleted_champion_is_reported(client: MlflowClient, versions: list[Version], ledger: Ledger) -> None:
    add(ledger, "promote", versions[1], evidence=WIN)
    add(ledger, "promote", versions[2], evidence=WIN)
    project(client, ledger)
    client.delete_model_version(ledger.model, "2")
    with pytest.raises(UserError, match=f"{ledger.model}@champion is not in the registry"):
        resolve(client, f"models:/{ledger.model}@champion")
    assert champion.roll_back(ledger.model).version.number == 1
    assert resolve(client, f"models:/{ledger.model}@champion").number == 1


def next_entry_of(
    version: Version, champion: int | None, evidence: Evidence | None
) -> Callable[[History], LedgerEntry | None]:
    judgement = GateResult(champion=champion, evidence=evidence)
    return lambda history: next_entry(history, version, judgement, None)


@pytest.mark.drill(
    "two promotions at once",
    "a second one while the first one decides",
    "one champion; the slower one names it, exit 3",
)
def test_concurrent_promotions_have_one_winner_named_to_the_other(
    client: MlflowClient, versions: list[Version], ledger: Ledger
) -> None:
    add(ledger, "promote", versions[1], evidence=WIN)

    def promote(version: Version) -> str:
        try:
            ledger.append(next_entry_of(version, 1, WIN))
        except ConflictError as error:
            return str(error)
        return "won"

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(promote, (versions[2], versions[3])))
    assert sorted(word == "won" for word in outcomes) == [False, True]
    winner = 2 + outcomes.index("won")
    loser = 5 - winner
    [message] = [each for each in outcomes if each != "won"]
    assert f"another process was first: promote 1 → {winner}" in message
    assert f"models:/{ledger.model}/{loser} was compared with champion 1: run `darkroom promote` again" in message
    history = ledger.read()
    assert [entry.to_version for entry in history.entries] == [1, winner]
    assert project(client, ledger).alias_numbers.champion == winner
    assert list_aliases(client, ledger.model) == {"champion": winner, "previous": 1}


def test_a_verdict_that_is_there_is_not_written_twice(
    client: MlflowClient, versions: list[Version], ledger: Ledger
) -> None:
    ledger.append(next_entry_of(versions[1], None, WIN))
    for _ in range(2):
        ledger.append(next_entry_of(versions[2], 1, HOLD))
    ledger.append(next_entry_of(versions[1], 1, None))
    assert [entry.what for entry in ledger.read().entries] == ["promote", "hold"]
    ledger.append(next_entry_of(versions[3], 1, WIN))
    ledger.append(next_entry_of(versions[2], 3, HOLD))
    assert [entry.what for entry in ledger.read().entries] == ["promote", "hold", "promote", "hold"]
    # The same command once more, after another process of it had won.
    ledger.append(next_entry_of(versions[3], 1, WIN))
    assert len(ledger.read().entries) == 4


def test_unapproved_candidate_is_held(client: MlflowClient, versions: list[Version], ledger: Ledger) -> None:
    judgement = GateResult(champion=None, evidence=WIN)
    no, yes = Approval(approved=False, by="Ada", note="too dark"), Approval(approved=True, by="Ada")
    ledger.append(lambda history: next_entry(history, versions[1], judgement, no))
    assert ledger.read().alias_numbers.champion is None
    ledger.append(lambda history: next_entry(history, versions[2], judgement, yes))
    history = ledger.read()
    assert history.alias_numbers.champion == 2
    assert [entry.approval for entry in history.entries] == [no, yes]


def test_repeated_rollbacks_go_back_until_none_is_left(
    client: MlflowClient, versions: list[Version], ledger: Ledger
) -> None:
    with pytest.raises(UserError, match="there is no champion of faces-"):
        champion.roll_back(ledger.model)
    for version in versions[1:4]:
        add(ledger, "promote", version, evidence=WIN)
    first = champion.roll_back(ledger.model, "three eyes")
    assert (first.version.number, first.already) == (2, False)
    assert list_aliases(client, ledger.model) == {"champion": 2, "previous": 1}
    assert "rollback 3 → 2" in copies(client, ledger.model, 3)["00000004"]
    assert champion.roll_back(ledger.model).version.number == 1
    with pytest.raises(UserError, match="champion 1 is the first of faces-"):
        champion.roll_back(ledger.model)
    assert list_aliases(client, ledger.model) == {"champion": 1}
    assert [entry.reason for entry in ledger.read().entries if entry.what == "rollback"] == ["three eyes", None]


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has the next commands die instead of their write to MLflow of that number."""
    return lambda life: monkeypatch.setattr(champion, "MlflowClient", lambda: CrashingClient(life))


def test_killed_and_repeated_rollback_goes_back_once(
    client: MlflowClient, versions: list[Version], ledger: Ledger, dying: Callable[[int], None]
) -> None:
    for version in versions[1:4]:
        add(ledger, "promote", version, evidence=WIN)
    project(client, ledger)
    dying(0)
    with pytest.raises(Killed):
        champion.roll_back(ledger.model)
    dying(1000)
    again = champion.roll_back(ledger.model)
    assert (again.version.number, again.already) == (2, True)
    assert list_aliases(client, ledger.model) == {"champion": 2, "previous": 1}
    assert len(ledger.read().entries) == 4


def test_manual_override_promotes_and_is_recorded(
    client: MlflowClient, versions: list[Version], ledger: Ledger
) -> None:
    add(ledger, "promote", versions[1], evidence=WIN)
    add(ledger, "hold", versions[2], evidence=HOLD)
    result = champion.promote(ledger.model, 2, "better hands")
    assert (result.version.number, result.entry.by_hand, result.already) == (2, True, False)
    assert result.entry.evidence == HOLD
    assert "by hand, better hands (overrides the gate: hold: kid 0.02" in str(result.entry)
    assert list_aliases(client, ledger.model) == {"champion": 2, "previous": 1}
    again = champion.promote(ledger.model, 2, "better hands")
    assert (again.already, again.entry) == (True, result.entry)
    assert "never evaluated" in str(champion.promote(ledger.model, 3).entry)
    with pytest.raises(UserError, match=f"models:/{ledger.model}/9 is not in the registry"):
        champion.promote(ledger.model, 9)


def test_version_under_takedown_needs_an_explicit_option_to_promote(
    client: MlflowClient, versions: list[Version], ledger: Ledger
) -> None:
    add(ledger, "promote", versions[1], evidence=WIN)
    add(ledger, "promote", versions[2], evidence=WIN)
    client.set_model_version_tag(ledger.model, "1", "darkroom.takedown", "0123abcd")
    message = r"taken down since \(takedown 0123abcd\).*--taken-down"
    with pytest.raises(UserError, match=message):
        champion.roll_back(ledger.model)
    with pytest.raises(UserError, match=message):
        champion.promote(ledger.model, 1)
    with pytest.raises(UserError, match="leave --taken-down out"):
        champion.promote(ledger.model, 3, taken_down=True)
    assert champion.promote(ledger.model, 1, "asked legal", taken_down=True).version.number == 1


def test_a_version_without_weights_is_no_champion(
    client: MlflowClient, versions: list[Version], ledger: Ledger
) -> None:
    add(ledger, "promote", versions[1], evidence=WIN)
    empty = client.create_model_version(ledger.model, "file:///nowhere")
    source = client.get_model_version(ledger.model, "3").source or ""
    Path(source.removeprefix("file://"), "artifacts", "weights.safetensors").unlink()
    for number in (int(empty.version), 3):
        with pytest.raises(UserError, match="has no weights"):
            champion.promote(ledger.model, number)
    assert len(ledger.read().entries) == 1


def test_manual_promotion_on_outdated_state_is_held(
    client: MlflowClient, versions: list[Version], ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(ledger, "promote", versions[1], evidence=WIN)
    add(ledger, "promote", versions[2], evidence=WIN)

    def meanwhile(client: MlflowClient, prompt: Ledger) -> History:
        state = read_verified_history(client, prompt)
        add(ledger, "promote", versions[3], evidence=WIN)
        return state

    monkeypatch.setattr(champion, "read_verified_history", meanwhile)
    with pytest.raises(ConflictError, match=r"another process was first: promote 2 → 3.*darkroom model history"):
        champion.roll_back(ledger.model)
    assert ledger.read().alias_numbers.champion == 3
