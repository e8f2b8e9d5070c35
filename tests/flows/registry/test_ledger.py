"""The ledger: a chain that one of several writers extends, that says who is champion, and that cannot be altered."""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.common.errors import ConflictError, UserError
from flows.registry.ledger import (
    AliasNumbers,
    AliasState,
    Approval,
    Evidence,
    History,
    Known,
    Ledger,
    LedgerEntry,
    LedgerEvent,
)
from flows.storage.s3 import Location, Object, Store

HOLD = Evidence(verdict="hold", reason="kid 0.02 ± 0.01, not lower", figures={"kid": 0.02}, eval_key="e" * 64)
WIN = HOLD.model_copy(update={"verdict": "promote", "reason": "kid 0.01 ± 0.001, lower"})


@pytest.fixture
def ledger(store: Store, bucket: str) -> Ledger:
    return Ledger(Location(bucket, "ledger/faces"), store)


def weights_of(version: int) -> str:
    return hashlib.sha256(str(version).encode()).hexdigest()


def add(ledger: Ledger, what: LedgerEvent, version: int, **fields: object) -> LedgerEntry:
    def decide(history: History) -> LedgerEntry:
        return history.next_entry(what, version, weights_of(version), **fields)  # type: ignore[arg-type]

    head = ledger.append(decide).head
    assert head is not None
    return head


def objects(ledger: Ledger) -> dict[str, bytes]:
    bucket = ledger.place.bucket
    return {key: ledger.store.get(bucket, key) for key in sorted(ledger.store.list_keys(bucket, "ledger/faces/"))}


def write_over(ledger: Ledger, key: str, data: bytes | None) -> None:
    ledger.store.delete_many(ledger.place.bucket, [key])
    if data is not None:
        ledger.store.put_many(ledger.place.bucket, [Object(key, data)])


def test_each_entry_names_the_digest_of_the_one_before(ledger: Ledger) -> None:
    add(ledger, "promote", 1, evidence=WIN)
    add(ledger, "hold", 2, evidence=HOLD)
    add(ledger, "promote", 3, evidence=WIN, approval=Approval(approved=True, by="Ada"))
    add(ledger, "rollback", 1, by_hand=True, reason="three eyes")
    contents = objects(ledger)
    assert list(contents) == [f"ledger/faces/{number:08d}.json" for number in range(1, 5)]
    parents = [json.loads(data)["parent"] for data in contents.values()]
    assert parents == [None, *(hashlib.sha256(data).hexdigest() for data in list(contents.values())[:-1])]
    moves = [(each["from_version"], each["to_version"]) for each in map(json.loads, contents.values())]
    assert moves == [(None, 1), (1, 1), (1, 3), (3, 1)]
    history = ledger.read()
    assert [entry.data for entry in history.entries] == list(contents.values())
    assert ledger.head() == history.head
    assert history.alias_numbers == AliasNumbers(champion=1, previous=None, candidate=2)


def test_empty_ledger_has_no_champion(ledger: Ledger) -> None:
    assert ledger.head() is None
    assert ledger.read() == History("faces")
    assert ledger.read().alias_numbers == AliasNumbers()


def on_record(ledger: Ledger, *numbers: int) -> Known:
    """What MLflow would know of these entries, or of the newest one."""
    entries = ledger.read().entries
    return {each.number: each.digest for each in entries if each.number in (numbers or (len(entries),))}


def written_again(data: bytes, **changes: object) -> bytes:
    entry = json.loads(data) | changes
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


TAMPERING: list[tuple[str, Callable[[dict[int, bytes]], object]]] = [
    ("00000004.json is missing", lambda files: files.clear()),
    ("00000004.json is missing", lambda files: files.pop(4)),
    ("00000001.json is missing", lambda files: files.pop(1)),
    ("00000002.json is missing", lambda files: files.pop(2)),
    ("00000004.json was altered", lambda files: files.update({4: written_again(files[4], reason="none")})),
    ("00000004.json was altered", lambda files: files.update({4: files[4][:-7]})),
    # Deleted, and others written of the same numbers, of which each follows from the one before it.
    ("00000004.json was altered", lambda files: files.update(dict(zip((3, 4), forked(files), strict=True)))),
    ("00000003.json is missing or was altered", lambda files: files.update({3: forked(files)[0]})),
    ("00000002.json is missing or was altered", lambda files: files.update({2: written_again(files[2], number=7)})),
    ("00000002.json is missing or was altered", lambda files: files.update({2: b"[" * 10_000})),
    ("00000002.json is missing or was altered", lambda files: files.update({2: b""})),
]
"""By what it is noticed, and what is done to four entries."""


def forked(files: dict[int, bytes]) -> list[bytes]:
    history = History("faces", tuple(LedgerEntry.model_validate_json(files[number]) for number in (1, 2)))
    for version in (8, 9):
        history = replace(
            history,
            entries=(*history.entries, history.next_entry("promote", version, weights_of(version), evidence=WIN)),
        )
    return [entry.data for entry in history.entries[2:]]


def test_tampering_with_recorded_entries_blocks_appending(ledger: Ledger) -> None:
    for version in range(1, 5):
        add(ledger, "promote", version, evidence=WIN)
    records, keys = on_record(ledger), list(objects(ledger))
    whole = dict(enumerate(objects(ledger).values(), 1))
    for words, tamper in TAMPERING:
        files = dict(whole)
        tamper(files)
        changed_numbers = [number for number in whole if files.get(number) != whole[number]]
        for number in changed_numbers:
            write_over(ledger, keys[number - 1], files.get(number))
        with pytest.raises(UserError, match=words) as error:
            ledger.append(lambda history: history.next_entry("promote", 7, weights_of(7)), lambda: records)
        assert "\n" not in str(error.value)
        if 4 in changed_numbers:
            with pytest.raises(UserError, match=words):
                ledger.head(records)
        assert dict(zip(sorted(files), objects(ledger).values(), strict=True)) == files
        for number in changed_numbers:
            write_over(ledger, keys[number - 1], whole[number])
    assert len(ledger.read(records).entries) == 4


def test_unrecorded_ledger_entries_count(ledger: Ledger) -> None:
    for version in range(1, 5):
        add(ledger, "promote", version, evidence=WIN)
    for records in ({}, on_record(ledger, 1), on_record(ledger, 3), on_record(ledger, 1, 2, 3, 4)):
        assert [entry.number for entry in ledger.read(records).entries] == [1, 2, 3, 4]
        head = ledger.head(records)
        assert head.number == 4


def foreign(ledger: Ledger, history: History) -> dict[str, bytes]:
    """What somebody with a key that may write leaves among two entries."""
    skipped = history.next_entry("promote", 9, weights_of(9))
    return {
        "00000003.json": b"no JSON",
        "00000004.json": b"{}",
        "00000005.json": written_again(skipped.data, number=5, parent="0" * 64),
        "00000006.json": written_again(skipped.data, number=6, model="other"),
        "00000007.json": written_again(skipped.data, number=7, to_version=1),
        "00000008.json": written_again(skipped.data, number=8, what="rollback"),
        "00000009.json": b"[" * 70_000,
        "00000000.json": b"",
        "99999999.json": written_again(skipped.data, number=9),
        "٠٠٠٠٠٠٠٣.json": b"",
        "foo": b"",
        "foo/00000003.json": skipped.data,
    }


def test_foreign_ledger_objects_are_reported_and_ignored(ledger: Ledger) -> None:
    for version in (1, 2):
        add(ledger, "promote", version, evidence=WIN)
    records, foreign_objects = on_record(ledger), foreign(ledger, ledger.read())
    for name, data in foreign_objects.items():
        write_over(ledger, ledger.place.key(name), data)
    for witnesses in (records, {}):
        history = ledger.read(witnesses)
        assert [entry.version for entry in history.entries] == [1, 2]
        assert history.foreign.keys() == foreign_objects.keys()
        head = ledger.head(witnesses)
        assert head.number == 2
    head = ledger.append(lambda history: history.next_entry("promote", 3, weights_of(3)), lambda: records).head
    assert (head.number, head.from_version) == (10, 2)
    assert ledger.read().foreign.keys() == foreign_objects.keys()
    records = on_record(ledger, 10)
    # An administrator clears up.
    for name in foreign_objects:
        write_over(ledger, ledger.place.key(name), None)
    for witnesses in (records, {}):
        assert ledger.read(witnesses) == History("faces", ledger.read(records).entries)
    add(ledger, "promote", 4)
    assert [entry.number for entry in ledger.read(records).entries] == [1, 2, 10, 11]


def test_concurrent_writers_each_get_an_entry_beside_foreign_objects(ledger: Ledger) -> None:
    for number in (1, 3, 4):
        write_over(ledger, ledger.place.key(f"{number:08d}.json"), b"{}")
    add(ledger, "promote", 1)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda version: add(ledger, "hold", version, evidence=HOLD), range(2, 8)))
    history = ledger.read()
    assert {entry.version for entry in history.entries} == set(range(1, 8))
    assert [entry.number for entry in history.entries] == [2, *range(5, 11)]
    assert history.alias_numbers == AliasNumbers(champion=1, candidate=history.entries[-1].version)


def test_append_fails_when_a_later_entry_took_precedence(ledger: Ledger) -> None:
    add(ledger, "promote", 1)
    history_of_records: list[Known] = [on_record(ledger)]

    def decide(history: History) -> LedgerEntry:
        above = written_again(history.next_entry("promote", 9, weights_of(9)).data, number=3)
        write_over(ledger, ledger.place.key("00000003.json"), above)
        history_of_records.append({3: hashlib.sha256(above).hexdigest()})
        return history.next_entry("promote", 2, weights_of(2))

    with pytest.raises(ConflictError, match="another process was first: promote 1 → 9"):
        ledger.append(decide, lambda: history_of_records[-1])
    assert [entry.number for entry in ledger.read(history_of_records[-1]).entries] == [1, 3]


def test_unconfirmed_ledger_write_counts_once(ledger: Ledger) -> None:
    def decide(history: History) -> LedgerEntry:
        entry = history.next_entry("promote", 1, weights_of(1))
        # As a first try leaves it whose answer was lost.
        ledger.store.put_once(ledger.place.bucket, "ledger/faces/00000001.json", entry.data)
        return entry

    assert ledger.append(decide).entries == ledger.read().entries
    assert len(objects(ledger)) == 1


def test_append_decides_again_when_the_ledger_changed(ledger: Ledger) -> None:
    add(ledger, "promote", 1)
    observations = []

    def decide(history: History) -> LedgerEntry:
        observations.append(history.alias_numbers.champion)
        if len(observations) == 1:
            add(ledger, "promote", 2, evidence=WIN)
        elif history.alias_numbers.champion != observations[0]:
            raise ConflictError(history.describe_conflict())
        return history.next_entry("promote", 3, weights_of(3))

    with pytest.raises(ConflictError, match=r"another process was first: promote 1 → 2, .*: kid 0\.01 ± 0\.001, lower"):
        ledger.append(decide)
    assert observations == [1, 2]
    assert ledger.read().alias_numbers.champion == 2


@given(st.lists(st.one_of(st.none(), st.integers(1, 6)), max_size=30))
def test_a_rollback_undoes_the_newest_promotion_that_was_not_undone(moves: list[int | None]) -> None:
    aliases, states = AliasState(), [AliasNumbers()]
    for version in moves:
        if version is None:
            if len(states) < 3:
                continue
            states.pop()
            aliases = aliases.apply_change("rollback", states[-1].champion or 0)
        else:
            states.append(AliasNumbers(champion=version, previous=states[-1].champion))
            aliases = aliases.apply_change("promote", version)
        assert aliases.alias_numbers == states[-1]


def test_rollback_to_any_other_version_is_an_error() -> None:
    aliases = AliasState().apply_change("promote", 1).apply_change("promote", 2).apply_change("promote", 3)
    for version in (1, 3, 4):
        with pytest.raises(UserError, match="leads to the champion before"):
            aliases.apply_change("rollback", version)
    with pytest.raises(UserError):
        AliasState().apply_change("promote", 1).apply_change("rollback", 1)


def test_candidate_is_the_last_held_undecided_version() -> None:
    aliases = AliasState().apply_change("promote", 1).apply_change("hold", 2)
    assert aliases.alias_numbers.candidate == 2
    assert aliases.apply_change("promote", 3).alias_numbers.candidate == 2
    assert aliases.apply_change("promote", 2).alias_numbers.candidate is None
    assert aliases.apply_change("reject", 2).alias_numbers.candidate is None
    assert aliases.apply_change("reject", 3).alias_numbers.candidate == 2
    assert aliases.apply_change("hold", 4).alias_numbers.candidate == 4


def chain(*moves: tuple[LedgerEvent, int, dict[str, object]]) -> History:
    history = History("faces")
    for what, version, fields in moves:
        entry = history.next_entry(what, version, weights_of(version), **fields)  # type: ignore[arg-type]
        history = History("faces", (*history.entries, entry))
    return history


def test_rolled_back_version_is_withheld_until_manually_promoted() -> None:
    up: list[tuple[LedgerEvent, int, dict[str, object]]] = [("promote", 1, {}), ("promote", 2, {})]
    back: tuple[LedgerEvent, int, dict[str, object]] = ("rollback", 1, {"by_hand": True, "reason": "three eyes"})
    hold: tuple[LedgerEvent, int, dict[str, object]] = ("hold", 2, {"evidence": HOLD})
    assert chain(*up).manual_demotion(2) is None
    assert chain(*up).manual_demotion(1) is None
    assert chain(*up, back).manual_demotion(2) is not None
    assert chain(*up, back, hold).manual_demotion(2) is not None
    assert chain(*up, back, ("promote", 3, {})).manual_demotion(2) is not None
    assert chain(*up, back, ("promote", 2, {"by_hand": True})).manual_demotion(2) is None
    assert chain(*up, ("promote", 1, {"by_hand": True})).manual_demotion(2) is not None
    denied: dict[str, object] = {"evidence": WIN, "approval": Approval(approved=False, by="Ada")}
    nobody: dict[str, object] = {"evidence": WIN, "approval": Approval(approved=False, by=None)}
    assert chain(*up, ("hold", 3, denied)).manual_demotion(3) is not None
    assert chain(*up, ("hold", 3, nobody)).manual_demotion(3) is None


def test_ledger_entry_names_user_action_and_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "ada")
    history = chain(
        ("promote", 1, {"evidence": WIN}),
        ("hold", 2, {"evidence": HOLD}),
        ("promote", 2, {"evidence": HOLD, "by_hand": True, "reason": "better hands"}),
        ("hold", 3, {"evidence": WIN, "approval": Approval(approved=False, by="Grace", note="too dark")}),
    )
    first, held, by_hand, denied = map(str, history.entries)
    assert first.startswith("promote none → 1, ")
    assert "UTC, ada@" in first
    assert first.endswith(": kid 0.01 ± 0.001, lower")
    assert held.startswith("hold 2, champion 1, ")
    assert "by hand, better hands (overrides the gate: hold: kid 0.02" in by_hand
    assert "not approved by Grace (too dark): kid 0.01" in denied


def test_recreated_registry_is_not_mistaken_for_the_original() -> None:
    history = chain(("promote", 1, {}))
    history.require_same(1, weights_of(1))
    history.require_same(2, "anything")
    with pytest.raises(UserError, match=r"reset: give registry\.model another name"):
        history.require_same(1, weights_of(2))
