"""C2PA manifests: what they claim, and that any changed byte, foreign or expired certificate is found."""

import io
import json
import struct
import time
import zlib
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from c2pa import Reader
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from diffusion.common.errors import UserError
from diffusion.common.image_grids import encode_png_with_metadata
from flows.signing.images import ImageSigner, verify_image
from flows.signing.keys import SignatureError
from tests.builders.signing_keys import Identity, identity

LINEAGE = {"model": "models:/faces/3", "run_id": "r", "content_digest": "c" * 64, "index": 7}
PIXELS = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _environment(no_servers: None) -> None:
    """Without a key in it."""


@pytest.fixture(scope="module")
def png() -> bytes:
    return encode_png_with_metadata(Image.fromarray(PIXELS), {"model": "models:/faces/3"})


def test_a_signed_copy_keeps_pixels_and_names_its_origin(alice: Identity, png: bytes) -> None:
    signed_png = ImageSigner(alice.signer()).sign(png, "00000007.png", LINEAGE)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(signed_png))), PIXELS)
    verification = verify_image(signed_png, alice.root.read_text())
    assert (verification.title, verification.signer, verification.trusted) == ("00000007.png", "alice, Example", True)
    assert verification.lineage == LINEAGE
    [manifest] = json.loads(Reader("image/png", io.BytesIO(signed_png)).json())["manifests"].values()
    [actions] = [each["data"]["actions"] for each in manifest["assertions"] if "actions" in each["label"]]
    [created] = actions
    assert (created["action"], created["softwareAgent"]["name"]) == ("c2pa.created", "Darkroom")
    assert created["digitalSourceType"].endswith("/trainedAlgorithmicMedia")


def test_without_a_root_it_is_intact_and_untrusted(alice: Identity, png: bytes) -> None:
    signed_png = ImageSigner(alice.signer()).sign(png, "a.png", LINEAGE)
    assert not verify_image(signed_png).trusted


def test_a_flipped_byte_anywhere_is_found(alice: Identity, png: bytes) -> None:
    signed_png = ImageSigner(alice.signer()).sign(png, "a.png", LINEAGE)
    roots = alice.root.read_text()
    places = np.random.default_rng(1).integers(0, len(signed_png), 60)
    pixels = signed_png.rfind(b"IDAT") + 100
    claim = signed_png.find(b"models:/faces/3", signed_png.find(b"caBX"))
    unnoticed = []
    for place in (pixels, claim, *places):
        altered = bytearray(signed_png)
        altered[place] ^= 1
        try:
            verify_image(bytes(altered), roots)
        except SignatureError:
            continue
        unnoticed.append(place)
    # The signature is padded, and its padding means nothing.
    assert all(signed_png[place] == 0 for place in unnoticed)
    assert pixels not in unnoticed
    assert claim not in unnoticed
    for damaged_png in (signed_png[:-20], signed_png[:2000], signed_png + b"more", b""):
        with pytest.raises(SignatureError):
            verify_image(damaged_png, roots)


def test_a_stripped_manifest_and_a_foreign_key_are_found(alice: Identity, png: bytes, tmp_path: Path) -> None:
    bob = identity(tmp_path / "bob")
    with pytest.raises(SignatureError, match="no C2PA manifest"):
        verify_image(png, alice.root.read_text())
    signed_png = ImageSigner(bob.signer()).sign(png, "a.png", LINEAGE)
    with pytest.raises(SignatureError, match="untrusted"):
        verify_image(signed_png, alice.root.read_text())


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_hostile_image_is_not_verified_and_no_crash(png: bytes) -> None:
    huge = png[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)) + png[33:]
    text = zlib.compress(bytes(2**27), 1)
    bomb = png[:33] + chunk(b"zTXt", b"x\0\0" + text) + png[33:]
    for image in (huge, bomb, b"", b"GIF89a", b"\xff\xd8\xff", png[:40]):
        with pytest.raises(SignatureError) as error:
            verify_image(image)
        assert "BytesIO" not in str(error.value)


def test_a_parent_that_is_not_an_image_is_an_error(alice: Identity, png: bytes) -> None:
    with pytest.raises(UserError, match="ingredient"):
        ImageSigner(alice.signer()).sign(png, "a.png", LINEAGE, b"no image")


def test_an_expired_certificate_is_found_and_signs_nothing(png: bytes, tmp_path: Path) -> None:
    brief = identity(tmp_path / "brief", valid=timedelta(seconds=2))
    signer = ImageSigner(brief.signer())
    signed_png = signer.sign(png, "a.png", LINEAGE)
    assert verify_image(signed_png, brief.root.read_text()).trusted
    time.sleep(3.1)  # times in certificates are whole seconds
    for roots in (brief.root.read_text(), None):
        with pytest.raises(SignatureError, match="expired"):
            verify_image(signed_png, roots)
    with pytest.raises(UserError):
        signer.sign(png, "a.png", LINEAGE)
    with pytest.raises(UserError):
        brief.signer()


@pytest.mark.parametrize("expired", ["root", "intermediate"])
def test_an_expired_certificate_above_that_of_the_signer_is_found(png: bytes, tmp_path: Path, expired: str) -> None:
    chained, old = (identity(tmp_path / f"of-{end}", intermediate=True, expired=end) for end in (None, expired))
    signed_png = ImageSigner(chained.signer()).sign(png, "a.png", LINEAGE)
    assert verify_image(signed_png, old.root.read_text() + chained.root.read_text()).trusted
    with pytest.raises(SignatureError):
        verify_image(ImageSigner(old.signer()).sign(png, "a.png", LINEAGE), old.root.read_text())


def test_an_edit_names_the_image_it_was_made_of(alice: Identity, png: bytes) -> None:
    signer = ImageSigner(alice.signer())
    parent = signer.sign(png, "parent.png", {"index": 0})
    photo = io.BytesIO()
    Image.fromarray(PIXELS).save(photo, "JPEG")
    for parent_image, count in ((parent, 2), (photo.getvalue(), 1)):
        signed_png = signer.sign(png, "edit.png", LINEAGE, parent_image)
        assert verify_image(signed_png, alice.root.read_text()).lineage == LINEAGE
        about = json.loads(Reader("image/png", io.BytesIO(signed_png)).json())
        manifest = about["manifests"][about["active_manifest"]]
        assert [each["relationship"] for each in manifest["ingredients"]] == ["parentOf"]
        [actions] = [each["data"]["actions"] for each in manifest["assertions"] if "actions" in each["label"]]
        assert [each["action"] for each in actions] == ["c2pa.opened", "c2pa.edited"]
        assert actions[1]["digitalSourceType"].endswith("/compositeWithTrainedAlgorithmicMedia")
        # The manifest of a signed parent comes along.
        assert len(about["manifests"]) == count


@pytest.mark.parametrize("curve", [ec.SECP384R1, ec.SECP521R1])
def test_keys_of_larger_curves_sign_images(png: bytes, tmp_path: Path, curve: type[ec.EllipticCurve]) -> None:
    large = identity(tmp_path / "large", curve=curve)
    signed_png = ImageSigner(large.signer()).sign(png, "a.png", LINEAGE)
    assert verify_image(signed_png, large.root.read_text()).trusted


def test_a_key_without_a_certificate_signs_no_image(alice: Identity) -> None:
    with pytest.raises(UserError, match="certificate"):
        ImageSigner(alice.signer(certified=False))
