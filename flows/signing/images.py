"""C2PA manifests in images: who made them, with which model, from which data; and whether a byte changed since.

A manifest lies inside of the PNG. It binds the hash of all other bytes, and is signed with a key whose certificate it
holds. Nothing here uses the network: no time stamp, no revocation list, no manifest elsewhere.
"""

import io
import json
from dataclasses import dataclass
from threading import Lock
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_pem_x509_certificates

import diffusion
from diffusion.common.errors import UserError
from diffusion.common.image_grids import SYNTHETIC
from flows.signing.keys import SignatureError, SigningKey, describe_invalid_period

LINEAGE = "org.darkroom.lineage"
"""Label of the assertion with the way back from the image to its data."""
EDITED = SYNTHETIC.replace("trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia")
"""IPTC's digital source type of what a model made of an image."""
PNG = "image/png"
HASHES: dict[int, type[SHA256 | SHA384 | SHA512]] = {256: SHA256, 384: SHA384, 521: SHA512}
"""Hash of the signatures of a key by its size in bits."""
OFFLINE: dict[str, Any] = {
    "verify": {"verify_trust": True, "ocsp_fetch": False, "remote_manifest_fetch": False},
    "builder": {"thumbnail": {"enabled": False}},
}


class ImageSigner:
    """Signs images with one key, from several threads; raises UserError for a key without certificates."""

    def __init__(self, key: SigningKey) -> None:
        from c2pa import C2paSigningAlg, Context, Signer

        key.require_certificates()
        bits = key.private.curve.key_size
        self.serial_number = key.certificates[0].serial_number

        def sign(data: bytes) -> bytes:
            numbers = decode_dss_signature(key.private.sign(data, ECDSA(HASHES[bits]())))
            return b"".join(number.to_bytes(-(-bits // 8), "big") for number in numbers)

        algorithm = {256: C2paSigningAlg.ES256, 384: C2paSigningAlg.ES384, 521: C2paSigningAlg.ES512}[bits]
        self._context, self._lock = Context.from_dict(OFFLINE), Lock()
        # By a callback, so that the library never sees the key.
        self._signer = Signer.from_callback(sign, algorithm, key.chain_pem)

    def sign(self, png: bytes, title: str, lineage: dict[str, Any], parent: bytes | None = None) -> bytes:
        """Sign a copy of ``png`` that a model generated, or made of the image ``parent``; equal calls give other bytes.

        ``lineage`` is what it says of its origin. Raises UserError for an image or a certificate that C2PA does not
        allow.
        """
        from c2pa import Builder, C2paBuilderIntent, C2paError

        agent = {"name": "Darkroom", "version": diffusion.__version__}
        action = {"action": "c2pa.created", "digitalSourceType": SYNTHETIC, "softwareAgent": agent}
        if parent is not None:
            action |= {"action": "c2pa.edited", "digitalSourceType": EDITED}
        manifest = {
            "claim_generator_info": [agent],
            "title": title,
            "format": PNG,
            "assertions": [{"label": LINEAGE, "data": lineage}],
        }
        output = io.BytesIO()
        try:
            with self._lock, Builder(manifest, self._context) as builder:
                if parent is not None:
                    builder.set_intent(C2paBuilderIntent.EDIT)
                    ingredient = {"title": "the image that was edited", "relationship": "parentOf"}
                    builder.add_ingredient(ingredient, _media_type(parent), io.BytesIO(parent))
                builder.add_action(action)
                builder.sign(self._signer, PNG, io.BytesIO(png), output)
        except SignatureError as error:
            raise UserError(f"the image that was edited cannot be an ingredient: {error}") from error
        except C2paError as error:
            raise UserError(f"{title} cannot be signed ({error}): see docs/how-to/sign-and-verify.md") from error
        return output.getvalue()


def _media_type(image: bytes) -> str:
    """Media type of an image; raises SignatureError for anything else."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(image)) as file:
            return str(file.get_format_mimetype())
    # A damaged or hostile header; what the library says of it is about a buffer in memory.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SignatureError("it is not an image, is damaged, or is larger than any real one") from error


@dataclass(frozen=True)
class SignedImage:
    """A verified C2PA manifest."""

    title: str
    """Name of the image when it was signed."""
    signer: str
    serial_number: int
    """That of the signer's certificate."""
    trusted: bool
    """Whether a trusted root stands for its certificate; otherwise anybody may have signed it."""
    lineage: dict[str, Any]
    """What it says of its origin; empty: it was not signed by Darkroom."""


def verify_image(image: bytes, roots: str | None = None) -> SignedImage:
    """Verify the C2PA manifest of an image, with the trusted ``roots`` in PEM.

    Raises SignatureError if it has none, a byte was changed, or its certificate is expired or, with ``roots``, of none
    of them.
    """
    from c2pa import C2paError, Context, Reader

    trust: dict[str, Any] = {}
    if roots is not None:
        # The library takes roots that have expired.
        anchors = load_pem_x509_certificates(roots.encode())
        roots_pem = [
            root.public_bytes(Encoding.PEM).decode() for root in anchors if describe_invalid_period(root) is None
        ]
        if not roots_pem:
            raise SignatureError(f"no root is valid: {describe_invalid_period(anchors[0])}")
        trust = {"trust": {"trust_anchors": "".join(roots_pem)}}
    try:
        with Reader(_media_type(image), io.BytesIO(image), context=Context.from_dict(OFFLINE | trust)) as reader:
            report, state = json.loads(reader.json()), reader.get_validation_state()
    except C2paError.ManifestNotFound as error:
        raise SignatureError("it has no C2PA manifest: it was never signed, or saved again without it") from error
    except C2paError as error:
        raise SignatureError(f"it is damaged ({error})") from error
    failures = [
        entry.get("explanation") or entry["code"]
        for entry in report.get("validation_results", {}).get("activeManifest", {}).get("failure", ())
        if roots is not None or entry["code"] != "signingCredential.untrusted"
    ]
    if state not in ("Valid", "Trusted") or (roots is not None and state != "Trusted"):
        raise SignatureError("; ".join(dict.fromkeys(failures)) or f"its C2PA manifest is {str(state).lower()}")
    manifest = report["manifests"][report["active_manifest"]]
    signature, lineage = manifest.get("signature_info", {}), {}
    for entry in manifest.get("assertions", ()):
        if entry["label"] == LINEAGE and isinstance(entry["data"], dict):
            lineage = entry["data"]
    signer = ", ".join(filter(None, (signature.get("common_name"), signature.get("issuer"))))
    serial_number = int(signature.get("cert_serial_number") or 0)
    return SignedImage(str(manifest.get("title")), signer, serial_number, state == "Trusted", lineage)
