"""Signing keys and certificates, and signatures of files and folders in the format of OpenSSF model signing.

A signature is a Sigstore bundle without a transparency log: the SHA-256 of every file by its path, signed with an
elliptic-curve key. Nothing here uses the network.
"""

import json
import os
import re
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from diffusion.common.errors import UserError
from diffusion.common.files import sha256_bytes, sha256_file, sibling, write_atomically
from flows.environment import settings

CURVES = ("secp256r1", "secp384r1", "secp521r1")
KEY, PASSPHRASE, CERTIFICATES = (f"DARKROOM_SIGNING_{name}" for name in ("KEY", "KEY_PASSPHRASE", "CERTIFICATES"))
TEXT = re.compile(r"-----BEGIN|PRIVATE KEY|\n|\\n")  # in PEM, in whatever quotes, and in no path
MAX_NAMED = 10  # files in an error
CERT_NOT_YET_VALID, CERT_HAS_EXPIRED = 9, 10  # OpenSSL's X509_V_ERR_*
MAX_SIGNATURE_BYTES = 64 * 2**20
"""Maximum accepted size of a signature, which lists all files, in bytes."""


def signature_path(path: Path) -> Path:
    """Path of the signature of a file or folder."""
    return sibling(path, ".sig")


class SignatureError(Exception):
    """Signature that is not valid for what it is beside, with the reason."""


@dataclass(frozen=True)
class SigningKey:
    """Private key with the certificates for its public key. It is in memory alone: never written, copied or logged."""

    private: EllipticCurvePrivateKey = field(repr=False)
    certificates: tuple[x509.Certificate, ...] = ()
    """The signing certificate, then those that lead to a root; empty: a bare key."""

    @classmethod
    def load(cls, key: Path | None = None, certificates: Path | None = None) -> "SigningKey":
        """Load the key in a file, by default the environment's.

        Raises UserError, which names the option or variable to set, if there is no key, its passphrase is wrong, it is
        on none of the NIST curves, or the first certificate is for another key or not valid now.
        """
        environment = settings()
        text = str(key) if key else environment.signing_key and environment.signing_key.get_secret_value()
        if not text:
            raise UserError(f"no key to sign with: give --key FILE, or set {KEY}")
        (pem, name), passphrase = _pem(text, None if key else KEY), None
        if b"ENCRYPTED" in pem and environment.signing_key_passphrase:
            passphrase = environment.signing_key_passphrase.get_secret_value().encode()
        try:
            private = load_pem_private_key(pem, passphrase)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            # Whatever the library says may be about the contents of the file.
            fix = f"set {PASSPHRASE} to its passphrase" if b"ENCRYPTED" in pem else "give an elliptic-curve key in PEM"
            raise UserError(f"{name} cannot be read as a private key: {fix}") from None
        if not isinstance(private, EllipticCurvePrivateKey) or private.curve.name not in CURVES:
            raise UserError(f"{name} is not a key on the curve P-256, P-384 or P-521: make one with `openssl ecparam`")
        chain = str(certificates) if certificates else environment.signing_certificates
        if not chain:
            return cls(private)
        return cls(private, _signing_chain(*_pem(chain, None if certificates else CERTIFICATES), private))

    @property
    def key_id(self) -> str:
        """First 16 hex digits of the SHA-256 of the public key in DER."""
        return sha256_bytes(self.private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))[
            :16
        ]

    @property
    def chain_pem(self) -> str:
        """The certificates in PEM, the key's first."""
        return "".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in self.certificates)

    def require_certificates(self) -> None:
        """Raise UserError if the key has no certificate, which C2PA demands."""
        if not self.certificates:
            raise UserError(
                f"images are signed with a certificate: give --certificates FILE, or set {CERTIFICATES}; "
                "docs/how-to/sign-and-verify.md shows how to make one"
            )

    def sign(self, path: Path, signature: Path) -> None:
        """Sign a file, or a folder with all files in it, into the file ``signature``, which lies outside of it."""
        from model_signing.signing import Config

        with self._as_file() as private, TemporaryDirectory() as scratch:
            config = Config().set_hashing_config(_make_hashing_config())  # type: ignore[no-untyped-call]
            if self.certificates:
                files = [Path(scratch, f"{number}.pem") for number in range(len(self.certificates))]
                for file, certificate in zip(files, self.certificates, strict=True):
                    file.write_bytes(certificate.public_bytes(Encoding.PEM))
                # The library takes no empty chain; the signing certificate twice does no harm.
                config.use_certificate_signer(
                    private_key=private, signing_certificate=files[0], certificate_chain=files[1:] or files
                )
            else:
                config.use_elliptic_key_signer(private_key=private)
            write_atomically(signature, lambda partial: config.sign(path, partial))

    def sign_bytes(self, data: bytes) -> bytes:
        """Sign ``data`` as a file of any name; returns the signature."""
        with TemporaryDirectory() as scratch:
            file, signature = Path(scratch, "data"), Path(scratch, "signature")
            file.write_bytes(data)
            self.sign(file, signature)
            return signature.read_bytes()

    @contextmanager
    def _as_file(self) -> Iterator[Path]:
        """The key in PEM behind a path that can be read once: a pipe, as the library takes paths alone."""
        reader, writer = os.pipe()
        try:
            os.write(writer, self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            os.close(writer)
            yield Path(f"/dev/fd/{reader}")
        finally:
            os.close(reader)


@dataclass(frozen=True)
class Trust:
    """Signers to accept: the holder of a public key, or of a certificate that a trusted root stands for."""

    key: Path | None = None
    roots: Path | None = None
    key_pem: bytes | None = field(init=False, repr=False, default=None)
    roots_pem: bytes | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        """Read the files once; raises UserError for those that hold something else."""
        public = "a public key in PEM, as `openssl pkey -pubout` writes it"
        object.__setattr__(self, "key_pem", _read_pem(self.key, load_pem_public_key, public))
        object.__setattr__(
            self, "roots_pem", _read_pem(self.roots, x509.load_pem_x509_certificates, "certificates in PEM")
        )

    def verify(self, path: Path, signature: Path) -> str:
        """Verify the signature of a file or folder; returns the signer in words.

        Raises SignatureError if the signature is damaged, by another signer, by a certificate that is expired or led to
        its root by an expired one, or of other files, and UserError if neither a key nor a root is given.
        """
        from model_signing.verifying import Config
        from OpenSSL.crypto import X509StoreContextError

        if self.key_pem is None and self.roots_pem is None:
            raise UserError(f"say whose signature of {path} you trust: give --key PUBLIC_KEY, or --trust ROOTS")
        try:
            if signature.stat().st_size > MAX_SIGNATURE_BYTES:
                raise SignatureError(f"{signature} is too large to be a signature")
            material = json.loads(signature.read_bytes())["verificationMaterial"]
            config = Config().set_hashing_config(_make_hashing_config())  # type: ignore[no-untyped-call]
            with TemporaryDirectory() as scratch:
                pem = Path(scratch, "trusted.pem")
                if "x509CertificateChain" in material:
                    if self.roots_pem is None:
                        raise SignatureError("it is signed with a certificate: give its root with --trust, not a key")
                    raw = [b64decode(entry["rawBytes"]) for entry in material["x509CertificateChain"]["certificates"]]
                    chain = [x509.load_der_x509_certificate(data) for data in raw]
                    _verify_chain(chain, self.roots_pem)
                    pem.write_bytes(self.roots_pem)
                    config.use_certificate_verifier(certificate_chain=[pem])
                    signer = describe(chain[0])
                elif self.key_pem is None or self.key is None:
                    raise SignatureError("it is signed with a bare key: give the public key with --key, not a root")
                else:
                    pem.write_bytes(self.key_pem)
                    config.use_elliptic_key_verifier(public_key=pem)
                    signer = f"the key of {self.key.name}"
            config.verify(path, signature)
        except InvalidSignature as error:
            raise SignatureError("its signature was altered, or is by another key") from error
        except X509StoreContextError as error:
            is_dated = error.errors[0] in (CERT_NOT_YET_VALID, CERT_HAS_EXPIRED)
            expiry = describe_invalid_period(error.certificate.to_cryptography()) if is_dated else None
            raise SignatureError(expiry or f"no root of {self.roots} stands for its certificate ({error})") from error
        except SignatureError:
            raise
        except Exception as error:
            # What the library says in its own words is a plain ValueError.
            message = str(error) if type(error) is ValueError else "its signature is none, or was altered"
            if message.startswith("Signature mismatch"):
                files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
                digests = {file.relative_to(path).as_posix(): sha256_file(file) for file in files}
                message = (
                    describe_differences(signed_files(signature), digests)
                    or "it is signed in another way than Darkroom's"
                )
                message = f"{path.name}{message[1:]}" if path.is_file() else message
            raise SignatureError(message) from error
        return signer

    def verify_bytes(self, data: bytes, signature: bytes) -> str:
        """Verify a signature of ``sign_bytes``, as ``verify`` does."""
        with TemporaryDirectory() as scratch:
            Path(scratch, "data").write_bytes(data)
            Path(scratch, "signature").write_bytes(signature)
            return self.verify(Path(scratch, "data"), Path(scratch, "signature"))


def signed_files(signature: Path) -> dict[str, str]:
    """SHA-256 of the files by their paths in a verified signature."""
    payload = json.loads(b64decode(json.loads(signature.read_bytes())["dsseEnvelope"]["payload"]))
    return {resource["name"]: resource["digest"] for resource in payload["predicate"]["resources"]}


def describe_differences(expected: Mapping[str, str], actual: Mapping[str, str]) -> str:
    """Name the files of other SHA-256; empty: there are none."""
    names = [name for name in sorted({*expected, *actual}) if expected.get(name) != actual.get(name)]
    texts = [
        f"{name} " + ("was added" if name not in expected else "is missing" if name not in actual else "was altered")
        for name in names
    ]
    return ", ".join(texts[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED} more" if names[MAX_NAMED:] else "")


def _verify_chain(chain: Sequence[x509.Certificate], roots: bytes) -> None:
    """Verify that a root stands for the first certificate today.

    The library does so as of the day when the certificate began. Raises X509StoreContextError otherwise.
    """
    from OpenSSL.crypto import X509, X509Store, X509StoreContext

    store = X509Store()
    for root in x509.load_pem_x509_certificates(roots):
        store.add_cert(X509.from_cryptography(root))
    store.set_time(datetime.now(UTC))
    certificate, *intermediates = map(X509.from_cryptography, chain)
    X509StoreContext(store, certificate, intermediates).verify_certificate()


def describe(certificate: x509.Certificate) -> str:
    """Name the subject of a certificate, with the SHA-256 of the certificate."""
    digest = sha256_bytes(certificate.public_bytes(Encoding.DER))
    return f"{certificate.subject.rfc4514_string()} (certificate {digest[:16]})"


def _make_hashing_config() -> Any:
    """SHA-256 of every file, git's included, which the library would leave out."""
    from model_signing.hashing import Config

    return Config().set_ignored_paths(paths=(), ignore_git_paths=False)  # type: ignore[no-untyped-call]


def _pem(value: str, variable: str | None = None) -> tuple[bytes, str]:
    """Contents of the PEM file that the ``value`` of an option or variable names, or is; and its name in errors.

    What a variable holds may be a secret whatever it looks like, and so no error repeats it.
    """
    value = value.strip()
    is_text = TEXT.search(value) is not None
    name = f"the value of {variable or 'an option'}" if variable or is_text else value
    if is_text:
        return value.encode(), name
    try:
        return Path(value).expanduser().read_bytes(), name
    # A path may also hold null bytes, or the home of a user that is none. Errors of the system repeat the path.
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a path"
        raise UserError(f"{name} cannot be read ({reason}): give the path of a PEM file") from None


def _signing_chain(pem: bytes, name: str, private: EllipticCurvePrivateKey) -> tuple[x509.Certificate, ...]:
    try:
        chain = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise UserError(f"{name} holds no certificates in PEM: give the signing certificate first") from error
    if chain[0].public_key() != private.public_key():
        raise UserError(f"the first certificate of {name} is for another key: put the signing key's first")
    if problem := describe_invalid_period(chain[0]):
        raise UserError(f"{name}: {problem}: get a new one")
    return tuple(chain)


def describe_invalid_period(certificate: x509.Certificate) -> str | None:
    """Describe why a certificate is not valid now; None if it is."""
    start, end, now = certificate.not_valid_before_utc, certificate.not_valid_after_utc, datetime.now(UTC)
    if start <= now <= end:
        return None
    reason = f"expired on {end:%Y-%m-%d}" if now > end else f"is not valid before {start:%Y-%m-%d}"
    return f"the certificate of {certificate.subject.rfc4514_string()} {reason}"


def _read_pem(path: Path | None, load: Callable[[bytes], object], kind: str) -> bytes | None:
    if path is None:
        return None
    pem, name = _pem(str(path))
    try:
        load(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UserError(f"{name} is not {kind}") from error
    return pem
