"""MLflow's aliases follow the ledger, whenever a process is stopped; and a person decides who is champion."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from uuid import uuid4

import pytest
from mlflow.client import MlflowClient

from diffusion.common.errors import ConflictError, UserError
from flows.promote import GateResult, next_entry
from flows.registry import champion
from flows.registry.aliases import append, list_aliases, project, read_verified_history, restore
from flows.registry.ledger import Approval, Evidence, History, Ledger, LedgerEntry, LedgerEvent
from flows.registry.model_versions import Version, resolve
from flows.retention.sweeps import find_references
from tests.builders.command_line import CommandLine
from tests.builders.model_versions import CrashingClient, Killed, add_version

HOLD = Evidence(verdict="hold", reason="kid 0.02 ± 0.01, not lower")
WIN = Evidence(verdict="promote", reason="kid 0.01 ± 0.001, lower")


@dataclass(frozen=True)
class Registry:
    """A registered model with four versions in MLflow, each at its number, and its ledger."""

    client: MlflowClient
    ledger: Ledger
    versions: list[Version]

    @property
    def model(self) -> str:
        return self.ledger.model

    @property
    def aliases(self) -> dict[str, int]:
        return list_aliases(self.client, self.model)

    @property
    def champion(self) -> int:
        return resolve(self.client, f"models:/{self.model}@champion").number

    @property
    def newest_record(self) -> str:
        return str(self.client.get_registered_model(self.model).tags["darkroom.ledger.newest"])

    def add(self, what: LedgerEvent, number: int, evidence: Evidence) -> LedgerEntry:
        version = self.versions[number]
        history = self.ledger.append(
            lambda history: history.next_entry(what, number, version.weights_sha256, evidence=evidence)
        )
        assert history.head is not None
        return history.head

    def promote(self, *numbers: int) -> None:
        for number in numbers:
            self.add("promote", number, WIN)

    def hold(self, number: int) -> LedgerEntry:
        return self.add("hold", number, HOLD)

    def project(self) -> History:
        return project(self.client, self.ledger)

    def judge(
        self, number: int, against: int | None, evidence: Evidence | None, approval: Approval | None = None
    ) -> None:
        """Write the verdict on a version that was compared with champion ``against``."""
        judgement = GateResult(champion=against, evidence=evidence)
        self.ledger.append(lambda history: next_entry(history, self.versions[number], judgement, approval))

    def copies(self, number: int) -> dict[str, str]:
        tags = self.client.get_model_version(self.model, str(number)).tags
        return {name[-8:]: text for name, text in tags.items() if re.fullmatch(r"darkroom\.ledger\.\d{8}", name)}

    def objects(self) -> dict[str, bytes]:
        """The ledger's objects by name."""
        bucket, store = self.ledger.place.bucket, self.ledger.store
        keys = sorted(store.list_keys(bucket, self.ledger.place.key("")))
        return {key.rpartition("/")[2]: store.get(bucket, key) for key in keys}


@pytest.fixture
def registry(mlflow_client: MlflowClient, bucket: str, tmp_path: Path) -> Registry:
    ledger = Ledger.of(f"faces-{uuid4().hex}")
    versions = [add_version(mlflow_client, tmp_path, ledger.model) for _ in range(4)]
    return Registry(mlflow_client, ledger, [versions[0], *versions])


def test_aliases_and_copies_of_the_entries_follow_the_ledger(registry: Registry) -> None:
    registry.promote(1, 2)
    newest = registry.hold(3)
    registry.project()
    assert registry.aliases == {"champion": 2, "previous": 1, "candidate": 3}
    copies = {number: sorted(map(int, registry.copies(number))) for number in (1, 2, 3, 4)}
    assert copies == {1: [1, 2], 2: [2], 3: [3], 4: []}
    text = registry.copies(3)["00000003"]
    assert newest.digest in text
    assert "kid 0.02 ± 0.01, not lower" in text
    project(CrashingClient(0), registry.ledger)


@pytest.mark.slow
@pytest.mark.drill
def test_interrupted_promotion_leaves_one_champion_and_is_repaired(registry: Registry) -> None:
    registry.promote(1)
    registry.hold(2)
    registry.project()
    for life in count():
        # Champion, previous and candidate all change.
        new, old = (2, 1) if life % 2 == 0 else (1, 2)
        if life % 2 == 1:
            registry.hold(old)
        registry.promote(new)
        try:
            project(CrashingClient(life), registry.ledger)
            break
        except Killed:
            assert registry.aliases["champion"] in (old, new)
        assert registry.champion == new
        held = {"candidate": old} if life % 2 == 1 else {}
        assert registry.aliases == {"champion": new, "previous": old} | held
    assert life >= 4


def test_moved_alias_is_restored_on_resolution(registry: Registry) -> None:
    registry.promote(1)
    registry.project()
    registry.client.set_registered_model_alias(registry.model, "champion", "3")
    registry.client.set_registered_model_alias(registry.model, "previous", "2")
    assert registry.champion == 1
    assert registry.aliases == {"champion": 1}
    with pytest.raises(UserError, match=f"{registry.model}@previous is not in the registry"):
        resolve(registry.client, f"models:/{registry.model}@previous")


def test_numbers_and_other_aliases_need_no_ledger(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.client.set_registered_model_alias(registry.model, "favourite", "3")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    assert resolve(registry.client, f"models:/{registry.model}/2").number == 2
    assert resolve(registry.client, f"models:/{registry.model}@favourite").number == 3
    for uri in (f"models:/{registry.model}/9", f"models:/{registry.model}@nobody", "models:/nothing/1"):
        with pytest.raises(UserError, match="is not in the registry"):
            resolve(registry.client, uri)


@pytest.fixture
def assert_refused(registry: Registry) -> Callable[[str], None]:
    """Whoever reads or writes the ledger is refused with these words, and neither server is changed."""

    def assert_all_fail(words: str) -> None:
        before, tags = registry.objects(), registry.client.get_registered_model(registry.model).tags
        for act in (
            lambda: champion.promote(registry.model, 3),
            lambda: champion.roll_back(registry.model),
            lambda: resolve(registry.client, f"models:/{registry.model}@champion"),
            lambda: registry.project(),
            lambda: read_verified_history(registry.client, registry.ledger),
            lambda: append(registry.client, registry.ledger, lambda history: None),
            lambda: find_references(registry.client, registry.ledger.store, registry.ledger.place.bucket, (), {}),
        ):
            with pytest.raises(UserError, match=words) as error:
                act()
            assert "\n" not in str(error.value)
        assert (registry.objects(), registry.client.get_registered_model(registry.model).tags) == (before, tags)

    return assert_all_fail


def test_truncated_ledger_is_restored_from_mlflow(registry: Registry, assert_refused: Callable[[str], None]) -> None:
    registry.promote(1)
    registry.hold(3)
    registry.promote(2)
    history, whole = registry.project(), registry.objects()
    for missing_files in (["00000003.json"], list(whole)):
        registry.ledger.store.delete_many(registry.ledger.place.bucket, map(registry.ledger.place.key, missing_files))
        assert_refused(r"00000003\.json is missing")
        assert restore(registry.client, registry.ledger) == [int(name[:8]) for name in missing_files]
        assert registry.objects() == whole
        assert registry.project() == history
    # Copies that are no entries, and one too few.
    registry.client.set_model_version_tag(registry.model, "4", "darkroom.ledger.00000002.json", "{}")
    registry.ledger.store.delete_many(registry.ledger.place.bucket, map(registry.ledger.place.key, whole))
    with pytest.raises(UserError, match="two records of entry 2"):
        restore(registry.client, registry.ledger)
    registry.client.delete_model_version_tag(registry.model, "4", "darkroom.ledger.00000002.json")
    registry.client.delete_model_version_tag(registry.model, "1", "darkroom.ledger.00000001.json")
    with pytest.raises(UserError, match=r"00000001\.json is missing"):
        restore(registry.client, registry.ledger)
    assert registry.objects() == {}


def test_replaced_ledger_entry_is_detected_everywhere(
    registry: Registry, assert_refused: Callable[[str], None]
) -> None:
    registry.promote(1)
    registry.project()
    first = registry.ledger.place.key("00000001.json")
    registry.ledger.store.delete_many(registry.ledger.place.bucket, [first])
    registry.promote(3)
    assert_refused(r"00000001\.json was altered")
    with pytest.raises(UserError, match=r"00000001\.json was altered"):
        restore(registry.client, registry.ledger)


def test_outdated_ledger_record_in_mlflow_is_tolerated_when_explained(
    registry: Registry, assert_refused: Callable[[str], None]
) -> None:
    registry.promote(1)
    registry.project()
    old = registry.newest_record
    # Stopped before it could tell MLflow.
    registry.promote(2)
    assert registry.champion == 2
    new = registry.newest_record
    assert (old[:8], new[:8]) == ("00000001", "00000002")
    # MLflow came back of a backup.
    registry.client.set_registered_model_tag(registry.model, "darkroom.ledger.newest", old)
    for number, tag in ((1, "00000002"), (2, "00000002"), (2, "00000002.json")):
        registry.client.delete_model_version_tag(registry.model, str(number), f"darkroom.ledger.{tag}")
    assert registry.champion == 2
    assert registry.newest_record == new
    assert champion.promote(registry.model, 3).entry.number == 3
    registry.client.set_registered_model_tag(registry.model, "darkroom.ledger.newest", "00000009" + new[8:])
    assert_refused(r"00000009\.json is missing")
    registry.client.set_registered_model_tag(registry.model, "darkroom.ledger.newest", "9")
    assert_refused(r"darkroom\.ledger\.newest of .* was altered")
    registry.client.delete_registered_model_tag(registry.model, "darkroom.ledger.newest")
    assert registry.project().alias_numbers.champion == 3


def test_foreign_objects_stop_neither_promotions_nor_rollbacks_nor_gc(registry: Registry) -> None:
    for name in ("00000001.json", "00000003.json", "99999999.json", "foo"):
        key = registry.ledger.place.key(name)
        registry.ledger.store.put_once(registry.ledger.place.bucket, key, b"{}")
    assert champion.promote(registry.model, 1).entry.number == 2
    assert champion.promote(registry.model, 2).entry.number == 4
    assert champion.roll_back(registry.model).version.number == 1
    assert registry.champion == 1
    assert registry.newest_record.startswith("00000005 ")
    assert len(registry.project().foreign) == 4
    find_references(registry.client, registry.ledger.store, registry.ledger.place.bucket, (), {})


def test_deleted_champion_is_reported(registry: Registry) -> None:
    registry.promote(1, 2)
    registry.project()
    registry.client.delete_model_version(registry.model, "2")
    with pytest.raises(UserError, match=f"{registry.model}@champion is not in the registry"):
        resolve(registry.client, f"models:/{registry.model}@champion")
    assert champion.roll_back(registry.model).version.number == 1
    assert registry.champion == 1


@pytest.mark.drill
def test_concurrent_promotions_have_one_winner_named_to_the_other(registry: Registry) -> None:
    registry.promote(1)

    def promote(number: int) -> str:
        try:
            registry.judge(number, 1, WIN)
        except ConflictError as error:
            return str(error)
        return "won"

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(promote, (2, 3)))
    assert sorted(word == "won" for word in outcomes) == [False, True]
    winner = 2 + outcomes.index("won")
    loser = 5 - winner
    [message] = [each for each in outcomes if each != "won"]
    assert f"another process was first: promote 1 → {winner}" in message
    assert f"models:/{registry.model}/{loser} was compared with champion 1: run `darkroom promote` again" in message
    history = registry.ledger.read()
    assert [entry.to_version for entry in history.entries] == [1, winner]
    assert registry.project().alias_numbers.champion == winner
    assert registry.aliases == {"champion": winner, "previous": 1}


def test_a_verdict_that_is_there_is_not_written_twice(registry: Registry) -> None:
    registry.judge(1, None, WIN)
    for _ in range(2):
        registry.judge(2, 1, HOLD)
    registry.judge(1, 1, None)
    assert [entry.what for entry in registry.ledger.read().entries] == ["promote", "hold"]
    registry.judge(3, 1, WIN)
    registry.judge(2, 3, HOLD)
    assert [entry.what for entry in registry.ledger.read().entries] == ["promote", "hold", "promote", "hold"]
    # The same command once more, after another process of it had won.
    registry.judge(3, 1, WIN)
    assert len(registry.ledger.read().entries) == 4


def test_unapproved_candidate_is_held(registry: Registry) -> None:
    no, yes = Approval(approved=False, by="Ada", note="too dark"), Approval(approved=True, by="Ada")
    registry.judge(1, None, WIN, no)
    assert registry.ledger.read().alias_numbers.champion is None
    registry.judge(2, None, WIN, yes)
    history = registry.ledger.read()
    assert history.alias_numbers.champion == 2
    assert [entry.approval for entry in history.entries] == [no, yes]


def test_repeated_rollbacks_go_back_until_none_is_left(registry: Registry) -> None:
    with pytest.raises(UserError, match="there is no champion of faces-"):
        champion.roll_back(registry.model)
    registry.promote(1, 2, 3)
    first = champion.roll_back(registry.model, "three eyes")
    assert (first.version.number, first.already) == (2, False)
    assert registry.aliases == {"champion": 2, "previous": 1}
    assert "rollback 3 → 2" in registry.copies(3)["00000004"]
    assert champion.roll_back(registry.model).version.number == 1
    with pytest.raises(UserError, match="champion 1 is the first of faces-"):
        champion.roll_back(registry.model)
    assert registry.aliases == {"champion": 1}
    rollbacks = [entry for entry in registry.ledger.read().entries if entry.what == "rollback"]
    assert [entry.reason for entry in rollbacks] == ["three eyes", None]


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has the next commands die instead of their write to MLflow of that number."""
    return lambda life: monkeypatch.setattr(champion, "MlflowClient", lambda: CrashingClient(life))


def test_killed_and_repeated_rollback_goes_back_once(registry: Registry, dying: Callable[[int], None]) -> None:
    registry.promote(1, 2, 3)
    registry.project()
    dying(0)
    with pytest.raises(Killed):
        champion.roll_back(registry.model)
    dying(1000)
    again = champion.roll_back(registry.model)
    assert (again.version.number, again.already) == (2, True)
    assert registry.aliases == {"champion": 2, "previous": 1}
    assert len(registry.ledger.read().entries) == 4


def test_manual_override_promotes_and_is_recorded(registry: Registry) -> None:
    registry.promote(1)
    registry.hold(2)
    result = champion.promote(registry.model, 2, "better hands")
    assert (result.version.number, result.entry.by_hand, result.already) == (2, True, False)
    assert result.entry.evidence == HOLD
    assert "by hand, better hands (overrides the gate: hold: kid 0.02" in str(result.entry)
    assert registry.aliases == {"champion": 2, "previous": 1}
    again = champion.promote(registry.model, 2, "better hands")
    assert (again.already, again.entry) == (True, result.entry)
    assert "never evaluated" in str(champion.promote(registry.model, 3).entry)
    with pytest.raises(UserError, match=f"models:/{registry.model}/9 is not in the registry"):
        champion.promote(registry.model, 9)


def test_version_under_takedown_needs_an_explicit_option_to_promote(registry: Registry) -> None:
    registry.promote(1, 2)
    registry.client.set_model_version_tag(registry.model, "1", "darkroom.takedown", "0123abcd")
    message = r"taken down since \(takedown 0123abcd\).*--taken-down"
    with pytest.raises(UserError, match=message):
        champion.roll_back(registry.model)
    with pytest.raises(UserError, match=message):
        champion.promote(registry.model, 1)
    with pytest.raises(UserError, match="leave --taken-down out"):
        champion.promote(registry.model, 3, taken_down=True)
    assert champion.promote(registry.model, 1, "asked legal", taken_down=True).version.number == 1


def test_a_version_without_weights_is_no_champion(registry: Registry) -> None:
    registry.promote(1)
    empty = registry.client.create_model_version(registry.model, "file:///nowhere")
    source = registry.client.get_model_version(registry.model, "3").source or ""
    Path(source.removeprefix("file://"), "artifacts", "weights.safetensors").unlink()
    for number in (int(empty.version), 3):
        with pytest.raises(UserError, match="has no weights"):
            champion.promote(registry.model, number)
    assert len(registry.ledger.read().entries) == 1


def test_manual_promotion_on_outdated_state_is_held(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.promote(1, 2)

    def meanwhile(client: MlflowClient, prompt: Ledger) -> History:
        state = read_verified_history(registry.client, prompt)
        registry.promote(3)
        return state

    monkeypatch.setattr(champion, "read_verified_history", meanwhile)
    with pytest.raises(ConflictError, match=r"another process was first: promote 2 → 3.*darkroom model history"):
        champion.roll_back(registry.model)
    assert registry.ledger.read().alias_numbers.champion == 3


def test_history_cuts_long_reasons_unless_verbose(
    registry: Registry, command_line: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.add("promote", 1, Evidence(verdict="promote", reason=f"better {'and ' * 40}better still"))
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(f"registry:\n  model: {registry.model}\n")
    history = ("model", "history", "--dataset", "blobs")
    brief = command_line(*history)
    assert "better still" not in brief
    assert "`darkroom model history -v`" in brief
    for words in ((*history, "-v"), ("-v", *history)):
        whole = command_line(*words)
        assert "better still" in whole
        assert "history -v" not in whole
