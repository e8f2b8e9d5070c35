"""Signing keys with certificates of a root of their own."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from flows.signing.keys import SigningKey, Trust

DAY = timedelta(days=1)


@dataclass(frozen=True)
class Identity:
    """Files of a signer."""

    key: Path
    public: Path
    certificate: Path
    root: Path

    def signer(self, certified: bool = True) -> SigningKey:
        return SigningKey.load(self.key, self.certificate if certified else None)

    def trust(self, certified: bool = True) -> Trust:
        return Trust(roots=self.root) if certified else Trust(key=self.public)


def identity(
    folder: Path,
    valid: timedelta = DAY,
    curve: type[ec.EllipticCurve] = ec.SECP256R1,
    passphrase: str | None = None,
    intermediate: bool = False,
    expired: str | None = None,
) -> Identity:
    """A new signer in ``folder``, whose certificate began a day ago and ends after ``valid``.

    Its ``certificate`` may hold that of an ``intermediate`` authority; "root" or "intermediate" may be ``expired``.
    """
    folder.mkdir(parents=True)
    now = datetime.now(UTC)
    private = ec.generate_private_key(curve())
    authorities = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("root", "intermediate")}
    names = {
        name: x509.Name(
            [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Example"), x509.NameAttribute(NameOID.COMMON_NAME, name)]
        )
        for name in (*authorities, folder.name)
    }

    def certificate(name: str, by: str, public: ec.EllipticCurvePublicKey, end: datetime) -> bytes:
        is_authority = name in authorities
        end = now - timedelta(hours=1) if name == expired else end
        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
        )
        issuer = authorities[by]
        builder = (
            x509.CertificateBuilder(names[by], names[name], public, x509.random_serial_number(), now - DAY, end)
            .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=not is_authority,
                    key_cert_sign=is_authority,
                    crl_sign=is_authority,
                    decipher_only=False,
                    **usage,
                ),
                critical=True,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), critical=False)
        )
        if not is_authority:
            builder = builder.add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False
            )
        return builder.sign(issuer, SHA256()).public_bytes(Encoding.PEM)

    hidden = BestAvailableEncryption(passphrase.encode()) if passphrase else NoEncryption()
    chain = certificate(folder.name, "intermediate" if intermediate else "root", private.public_key(), now + valid)
    if intermediate:
        chain += certificate("intermediate", "root", authorities["intermediate"].public_key(), now + DAY)
    files = {
        "key.pem": private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, hidden),
        "public.pem": private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "certificate.pem": chain,
        "root.pem": certificate("root", "root", authorities["root"].public_key(), now + 2 * DAY),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return Identity(*(folder / name for name in files))
