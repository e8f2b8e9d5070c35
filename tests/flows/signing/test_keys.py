"""Signatures of models: by the key that was given and no other, of exactly the files that are there."""

import base64
import hashlib
import json
import shutil
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_public_key

from diffusion.common.errors import UserError
from flows.signing.keys import SignatureError, SigningKey, Trust, signature_path
from tests.builders.signing_keys import DAY, Identity, identity

WEIGHTS = bytes(range(256)) * 8


@pytest.fixture(autouse=True)
def _environment(no_servers: None) -> None:
    """Without a key in it."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "exports" / "faces"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "weights.safetensors").write_bytes(WEIGHTS)
    (folder / "model_index.json").write_text("{}")
    return folder


def test_a_signature_is_a_dsse_envelope_of_each_file(alice: Identity, model: Path) -> None:
    alice.signer(certified=False).sign(model, signature_path(model))
    envelope = json.loads(signature_path(model).read_bytes())["dsseEnvelope"]
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"]
    message = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)
    public = load_pem_public_key(alice.public.read_bytes())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    public.verify(base64.b64decode(envelope["signatures"][0]["sig"]), message, ec.ECDSA(SHA256()))
    digests = {each["name"]: each["digest"] for each in json.loads(payload)["predicate"]["resources"]}
    assert digests == {
        "unet/weights.safetensors": hashlib.sha256(WEIGHTS).hexdigest(),
        "model_index.json": hashlib.sha256(b"{}").hexdigest(),
    }


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def forge(path: Path) -> None:
    """Put other digests under the same signature."""
    bundle = json.loads(path.read_bytes())
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"])
    other = payload.replace(hashlib.sha256(b"{}").hexdigest().encode(), b"0" * 64)
    assert other != payload
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(other).decode()
    path.write_text(json.dumps(bundle))


TAMPERING: dict[str, Callable[[Path], object]] = {
    "weights.safetensors was altered": lambda folder: flip(folder / "unet" / "weights.safetensors"),
    "unet/more.json was added": lambda folder: (folder / "unet" / "more.json").write_text("{}"),
    ".gitignore was added": lambda folder: (folder / ".gitignore").write_text("*"),
    "model_index.json is missing": lambda folder: (folder / "model_index.json").unlink(),
    "index.json was added, model_index.json is missing": lambda folder: (folder / "model_index.json").rename(
        folder / "index.json"
    ),
    "symlink": lambda folder: (folder / "link").symlink_to("model_index.json"),
    "none, or was altered": lambda folder: signature_path(folder).write_text("{}"),
    "altered, or is by another key": lambda folder: forge(signature_path(folder)),
}


@pytest.mark.parametrize("certified", [False, True], ids=["key", "certificate"])
@pytest.mark.parametrize("words", TAMPERING, ids=list(TAMPERING))
def test_each_change_of_a_signed_model_is_found(alice: Identity, model: Path, words: str, certified: bool) -> None:
    alice.signer(certified).sign(model, signature_path(model))
    trust = alice.trust(certified)
    trust.verify(model, signature_path(model))
    TAMPERING[words](model)
    with pytest.raises(SignatureError, match=words):
        trust.verify(model, signature_path(model))


def envelope(signature: bytes) -> tuple[bytes, bytes]:
    """The signed bytes, and their signature."""
    about = json.loads(signature)["dsseEnvelope"]
    return base64.b64decode(about["payload"]), base64.b64decode(about["signatures"][0]["sig"])


@pytest.mark.parametrize("certified", [False, True], ids=["key", "certificate"])
def test_a_damaged_signature_is_no_crash(alice: Identity, model: Path, certified: bool) -> None:
    signature, trust = signature_path(model), alice.trust(certified)
    alice.signer(certified).sign(model, signature)
    whole = signature.read_bytes()
    for place in range(0, len(whole), 41):
        signature.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            trust.verify(model, signature)
        except SignatureError:
            continue
        # Base64 has bits to spare, and the certificates above that of the signer are not signed.
        assert envelope(signature.read_bytes()) == envelope(whole)
    signature.write_bytes(whole)
    for name in ("payload", "sig"):
        start = whole.index(b'"%s":' % name.encode()) + len(name) + 40
        signature.write_bytes(whole[:start] + bytes([whole[start] ^ 1]) + whole[start + 1 :])
        with pytest.raises(SignatureError):
            trust.verify(model, signature)
    for signature_bytes in (
        b"",
        b"[]",
        b"[" * 100_000,
        b'{"verificationMaterial": {"x509CertificateChain": {}}}',
        whole[:-9],
    ):
        signature.write_bytes(signature_bytes)
        with pytest.raises(SignatureError):
            trust.verify(model, signature)


def test_signatures_by_others_are_not_verified(alice: Identity, model: Path, tmp_path: Path) -> None:
    bob, signature = identity(tmp_path / "bob"), signature_path(model)
    for certified in (False, True):
        bob.signer(certified).sign(model, signature)
        for trust in (alice.trust(certified), alice.trust(not certified)):
            with pytest.raises(SignatureError):
                trust.verify(model, signature)
    with pytest.raises(UserError):
        Trust().verify(model, signature)


def test_a_certificate_that_has_expired_since_is_found(
    alice: Identity, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice.signer().sign(model, signature_path(model))

    class Later:
        @staticmethod
        def now(zone: object) -> object:
            from datetime import UTC, datetime

            return datetime.now(UTC) + 2 * DAY

    monkeypatch.setattr("flows.signing.keys.datetime", Later)
    with pytest.raises(SignatureError, match="expired"):
        alice.trust().verify(model, signature_path(model))
    with pytest.raises(UserError, match="expired"):
        alice.signer()


@pytest.mark.parametrize("expired", ["root", "intermediate"])
def test_an_expired_certificate_above_that_of_the_signer_is_found(model: Path, tmp_path: Path, expired: str) -> None:
    chained = identity(tmp_path / "chained", intermediate=True)
    chained.signer().sign(model, signature_path(model))
    chained.trust().verify(model, signature_path(model))
    old = identity(tmp_path / "old", intermediate=True, expired=expired)
    old.signer().sign(model, signature_path(model))
    with pytest.raises(SignatureError, match=rf"CN={expired}.* expired"):
        old.trust().verify(model, signature_path(model))


def test_what_is_trusted_is_read_once_and_from_home(
    alice: Identity, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for certified, name in ((False, "public.pem"), (True, "root.pem")):
        alice.signer(certified).sign(model, signature_path(model))
        shutil.copy(getattr(alice, name.removesuffix(".pem")), tmp_path / name)
        path = Path("~", name)
        trust = Trust(roots=path) if certified else Trust(key=path)
        (tmp_path / name).unlink()
        trust.verify(model, signature_path(model))


@pytest.mark.parametrize("curve", [ec.SECP384R1, ec.SECP521R1])
def test_keys_of_larger_curves_sign_as_well(model: Path, tmp_path: Path, curve: type[ec.EllipticCurve]) -> None:
    signer = identity(tmp_path / "large", curve=curve)
    signer.signer().sign(model, signature_path(model))
    signer.trust().verify(model, signature_path(model))
    signature = signer.signer(certified=False).sign_bytes(b"entry")
    signer.trust(certified=False).verify_bytes(b"entry", signature)


def test_the_key_needs_its_passphrase_and_stays_in_memory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    signer = identity(tmp_path / "locked", passphrase="open sesame")
    with pytest.raises(UserError, match="DARKROOM_SIGNING_KEY_PASSPHRASE"):
        signer.signer()
    monkeypatch.setenv("DARKROOM_SIGNING_KEY_PASSPHRASE", "wrong word")
    with pytest.raises(UserError) as wrong:
        signer.signer()
    assert "wrong word" not in str(wrong.value)
    monkeypatch.setenv("DARKROOM_SIGNING_KEY_PASSPHRASE", "open sesame")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    key_files: list[bytes] = []
    monkeypatch.setattr(
        shutil, "rmtree", lambda folder, *_, **__: key_files.extend(map(Path.read_bytes, files(folder)))
    )
    key = signer.signer()
    key.sign(model, signature_path(model))
    assert key_files
    secret = key.private.private_numbers().private_value
    plain = key.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    forms = (plain.splitlines()[1], key.private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())[-100:])
    for data in (*key_files, *map(Path.read_bytes, files(tmp_path)), caplog.text.encode(), repr(key).encode()):
        assert not any(form in data for form in (*forms, str(secret).encode(), b"open sesame"))


def files(folder: Path | str) -> list[Path]:
    return [path for path in Path(folder).rglob("*") if path.is_file()]


def test_key_and_certificate_may_be_texts_in_the_environment(
    alice: Identity, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARKROOM_SIGNING_KEY", alice.key.read_text())
    monkeypatch.setenv("DARKROOM_SIGNING_CERTIFICATES", alice.certificate.read_text())
    SigningKey.load().sign(model, signature_path(model))
    assert "CN=alice" in alice.trust().verify(model, signature_path(model))


@pytest.mark.parametrize("variable", ["DARKROOM_SIGNING_KEY", "DARKROOM_SIGNING_CERTIFICATES"])
def test_errors_repeat_no_key(alice: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    locked = identity(tmp_path / "locked", passphrase="open sesame").key.read_text()
    for text in (locked, alice.key.read_text()):
        [*_, body, end] = text.splitlines()
        bodies = "".join(text.splitlines()[1:-1])
        for form in (
            f"\n\n  {text}",
            json.dumps(text),
            text.replace("\n", "\\n"),
            f"'{text}'",
            text.replace("\n", " "),
            text.removeprefix("-----BEGIN "),
            bodies,
            bodies * 20,
            f"~{bodies}",
            body + end,
        ):
            monkeypatch.setenv(variable, form)
            key = alice.key if variable.endswith("CERTIFICATES") else None
            # The key is read from some forms: what is around it does not matter.
            with suppress(UserError):
                SigningKey.load(key)
                continue
            with pytest.raises(UserError, match=variable) as error:
                SigningKey.load(key)
            assert body[:20] not in "".join(traceback.format_exception(error.value))


def test_unusable_keys_are_named(alice: Identity, tmp_path: Path) -> None:
    other = rsa.generate_private_key(65537, 2048)
    (tmp_path / "rsa.pem").write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    bob = identity(tmp_path / "bob")
    for key, certificate, words in (
        (None, None, "no key to sign with.*DARKROOM_SIGNING_KEY"),
        (tmp_path / "missing.pem", None, "missing.pem cannot be read"),
        (tmp_path / "rsa.pem", None, "rsa.pem is not a key on the curve"),
        (alice.public, None, "public.pem cannot be read as a private key"),
        (alice.key, bob.certificate, "certificate of .*bob/certificate.pem is for another key"),
        (alice.key, alice.key, "key.pem holds no certificates"),
    ):
        with pytest.raises(UserError, match=words):
            SigningKey.load(key, certificate)
    for trust, words in (((alice.key, None), "not a public key"), ((None, alice.public), "not certificates")):
        with pytest.raises(UserError, match=words):
            Trust(*trust)
