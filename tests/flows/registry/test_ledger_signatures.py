"""A signed head of the ledger stands for all entries before it, for people who have no access to MLflow."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.client import MlflowClient

from diffusion.common.errors import UserError
from flows.provenance.verify import Check, verify
from flows.registry.aliases import append, project
from flows.registry.ledger import Evidence, History, Ledger, LedgerEntry
from flows.signing.keys import SigningKey, Trust
from flows.storage.s3 import Location, Store
from tests.builders.command_line import CommandLine
from tests.builders.model_versions import add_version
from tests.builders.signing_keys import Identity, identity

WIN = Evidence(verdict="promote", reason="kid 0.01 ± 0.001, lower")


@pytest.fixture
def ledger(store: Store, bucket: str) -> Ledger:
    return Ledger(Location(bucket, "ledger/faces"), store)


def promote(ledger: Ledger, version: int, key: SigningKey | None = None) -> LedgerEntry:
    def decide(history: History) -> LedgerEntry:
        return history.next_entry("promote", version, f"{version:064x}", evidence=WIN)

    head = ledger.append(decide).head
    assert head is not None
    if key is not None:
        ledger.sign(head, key)
    return head


def downloaded(ledger: Ledger, folder: Path) -> Path:
    for key in ledger.store.list_keys(ledger.place.bucket, ledger.place.key("")):
        path = folder / key.removeprefix(ledger.place.key(""))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(ledger.store.get(ledger.place.bucket, key))
    return folder


def check(what: object, trust: Trust, head: str | None = None) -> Check:
    [verification] = verify(str(what), trust, head)
    return verification


@pytest.mark.parametrize("certified", [False, True], ids=["key", "certificate"])
def test_a_signed_ledger_is_verified_on_s3_and_as_files(
    ledger: Ledger, tmp_path: Path, alice: Identity, certified: bool
) -> None:
    key = alice.signer(certified)
    promote(ledger, 1)
    promote(ledger, 2, key)
    newest = promote(ledger, 3, key)
    before = list(ledger.store.list_objects(ledger.place.bucket, ledger.place.key("")))
    ledger.sign(newest, key)
    assert list(ledger.store.list_objects(ledger.place.bucket, ledger.place.key(""))) == before
    assert ledger.read().foreign == {}
    assert ledger.head() == newest
    for what in (ledger.place, downloaded(ledger, tmp_path / "copy")):
        verification = check(what, alice.trust(certified), head=newest.parent)
        assert verification.verified, verification.problem
        assert f"model faces, 3 entries, champion 3, head {newest.digest}" in verification.summary
    with pytest.raises(UserError):
        verify(str(ledger.place), Trust())


def entry(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.json"


def reword(folder: Path, number: int) -> None:
    forged = json.loads(entry(folder, number).read_text()) | {"who": "mallory"}
    entry(folder, number).write_text(json.dumps(forged, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


def follow_on(folder: Path) -> None:
    """An entry that follows from the newest one, by somebody without the key."""
    entries = tuple(LedgerEntry.model_validate_json(path.read_bytes()) for path in sorted(folder.glob("*.json")))
    new_entry = History("faces", entries).next_entry("promote", 9, "9" * 64, evidence=WIN)
    entry(folder, new_entry.number).write_bytes(new_entry.data)


def fork(folder: Path) -> None:
    entry(folder, 3).unlink()
    follow_on(folder)


def strip(folder: Path) -> None:
    for path in folder.glob("signatures/*/*"):
        path.unlink()


TAMPERING: dict[str, Callable[[Path], object]] = {
    "the newest entry altered": lambda folder: reword(folder, 3),
    "the first entry altered": lambda folder: reword(folder, 1),
    "an entry missing": lambda folder: entry(folder, 2).unlink(),
    "the newest entry missing": lambda folder: entry(folder, 3).unlink(),
    "a byte": lambda folder: entry(folder, 2).write_bytes(entry(folder, 2).read_bytes()[:-1] + b" "),
    "another branch": fork,
    "an entry that nobody signed": follow_on,
    "no signature": strip,
    "an entry renamed": lambda folder: entry(folder, 3).rename(entry(folder, 4)),
    "a file of another kind": lambda folder: (folder / "logo.gif").touch(),
    "a file in another folder": lambda folder: entry(folder / "signatures", 1).write_text("{}"),
    "a foreign object": lambda folder: entry(folder, 7).write_text("{}"),
}


@pytest.mark.parametrize("what", TAMPERING)
def test_each_change_of_a_signed_ledger_is_found(ledger: Ledger, tmp_path: Path, alice: Identity, what: str) -> None:
    for version in (1, 2, 3):
        promote(ledger, version, alice.signer())
    folder = downloaded(ledger, tmp_path / "copy")
    assert check(folder, alice.trust()).verified
    TAMPERING[what](folder)
    assert not check(folder, alice.trust()).verified


def test_the_ledger_of_another_model_is_found(ledger: Ledger, tmp_path: Path, alice: Identity) -> None:
    promote(ledger, 1, alice.signer())
    copy, other = downloaded(ledger, tmp_path / "copy"), Location(ledger.place.bucket, "ledger/cats")
    for path in (path for path in copy.rglob("*") if path.is_file()):
        ledger.store.put_once(other.bucket, other.key(path.relative_to(copy).as_posix()), path.read_bytes())
    assert check(ledger.place, alice.trust()).verified
    assert not check(other, alice.trust()).verified
    [moved_verification] = verify(str(other), alice.trust(), model="faces")
    assert moved_verification.verified
    for model, verified in (("faces", True), ("cats", False)):
        [verification] = verify(str(copy), alice.trust(), model=model)
        assert verification.verified == verified


def test_an_empty_ledger_and_a_malformed_head_are_named(tmp_path: Path, alice: Identity) -> None:
    entry(tmp_path, 1).write_bytes(b" " * (2**16 + 1))
    assert not check(tmp_path, alice.trust()).verified
    with pytest.raises(UserError, match="SHA-256"):
        check(tmp_path, alice.trust(), head="zzz")


def test_an_older_ledger_is_found_by_a_later_head(ledger: Ledger, tmp_path: Path, alice: Identity) -> None:
    promote(ledger, 1, alice.signer())
    promote(ledger, 2, alice.signer())
    older = downloaded(ledger, tmp_path / "older")
    newest = promote(ledger, 3, alice.signer())
    assert check(older, alice.trust()).verified
    assert not check(older, alice.trust(), newest.digest).verified
    assert check(ledger.place, alice.trust(), newest.digest).verified


def test_a_signature_by_another_key_does_not_count(ledger: Ledger, tmp_path: Path, alice: Identity) -> None:
    bob = identity(tmp_path / "bob")
    newest = promote(ledger, 1, bob.signer())
    assert not check(ledger.place, alice.trust()).verified
    # A new key signs beside the old one.
    ledger.sign(newest, alice.signer())
    assert check(ledger.place, alice.trust()).verified
    assert check(ledger.place, bob.trust()).verified


def test_a_promotion_signs_its_own_entry_and_no_other(
    mlflow_client: MlflowClient,
    bucket: str,
    tmp_path: Path,
    alice: Identity,
    command_line: CommandLine,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    version = add_version(mlflow_client, tmp_path, f"faces-{bucket}")
    ledger = Ledger.of(version.model)

    def decide(history: History) -> LedgerEntry | None:
        entry = history.next_entry("promote", version.number, version.weights_sha256, evidence=WIN)
        return None if history.head is not None else entry

    def is_signed() -> bool:
        return check(ledger.place, alice.trust(certified=False)).verified

    # An unusable key stops it before anything is written.
    monkeypatch.setenv("DARKROOM_SIGNING_KEY", str(tmp_path / "missing.pem"))
    with pytest.raises(UserError):
        append(mlflow_client, ledger, decide)
    assert ledger.read().head is None
    monkeypatch.setenv("DARKROOM_SIGNING_KEY", str(alice.key))
    append(mlflow_client, ledger, decide)
    assert is_signed()
    # By somebody who can write to the bucket alone, or by a process that was stopped before it signed.
    planted = promote(ledger, version.number)
    for _ in range(2):
        append(mlflow_client, ledger, decide)
        project(mlflow_client, ledger)
        assert not is_signed()
    assert str(planted) in caplog.text
    assert "history --sign" in caplog.text
    caplog.clear()

    def decide_third(history: History) -> LedgerEntry | None:
        entry = history.next_entry("promote", version.number, version.weights_sha256, evidence=WIN)
        return entry if len(history.entries) == 2 else None

    append(mlflow_client, ledger, decide_third)
    assert is_signed()
    assert str(planted) in caplog.text
    planted = promote(ledger, version.number)
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(f"registry:\n  model: {version.model}\n")
    command_line("model", "history", "--dataset", "blobs", "--key", alice.key, code=2)
    command_line("model", "history", "--dataset", "blobs", "--sign", "--key", alice.key)
    assert is_signed()
    signatures = list(ledger.store.list_objects(bucket, ledger.place.key("signatures/")))
    caplog.clear()
    project(mlflow_client, ledger)
    assert caplog.text == ""
    assert list(ledger.store.list_objects(bucket, ledger.place.key("signatures/"))) == signatures
