"""Signed copies of batches: one for each image, whatever stops the process; and each change of them is found."""

import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion.common.errors import ConflictError, UserError
from diffusion.generation.config import Conditions
from flows.provenance import signed_images
from flows.provenance.signed_images import LocalFolder, sign_images
from flows.provenance.verify import verify
from flows.sampling.batch_format import SamplingBatch
from flows.signing.images import verify_image
from flows.signing.keys import Trust
from flows.storage.s3 import Location, Store
from tests.builders.command_line import CommandLine
from tests.builders.gc_batches import generate
from tests.builders.sampling_batches import batch, stored_files
from tests.builders.signing_keys import Identity, identity
from tests.builders.small_models import write_model


def sampled(store: Store, bucket: str, tmp_path: Path, planned_batch: SamplingBatch) -> Location:
    weights = write_model(tmp_path / "weights.safetensors", 1, 0, classes={"even": 3, "odd": 1})
    return generate(store, planned_batch, bucket, weights)


@pytest.mark.parametrize("kind", ["png", "tar"])
def test_each_image_has_one_signed_copy_and_stays(
    store: Store, bucket: str, tmp_path: Path, alice: Identity, kind: str
) -> None:
    planned_batch = batch(20, format=kind, conditions=Conditions(labels=("even",)))
    place = sampled(store, bucket, tmp_path, planned_batch)
    before = stored_files(store, place)
    outs = str(Location(bucket, "signed")), str(tmp_path / "signed")
    for out in outs:
        result = sign_images(str(place), out, alice.signer())
        assert (result.images, result.signed) == (20, 20)
        again = sign_images(str(place), out, alice.signer())
        assert (again.images, again.signed) == (20, 0)
        checks = verify(out, alice.trust())
        assert len(checks) == 21
        assert all(each.verified and each.trusted for each in checks)
    assert stored_files(store, place) == before
    rows = [json.loads(line) for name in sorted(before) if "part-" in name for line in before[name].splitlines()]
    parts = sorted((tmp_path / "signed" / "manifest").iterdir())
    records = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    for row, record in zip(rows, records, strict=True):
        copy = (tmp_path / "signed" / record["file"]).read_bytes()
        assert (record["index"], record["sha256"]) == (row["index"], row["sha256"])
        assert record["signed_sha256"] == hashlib.sha256(copy).hexdigest()
        pixels = np.asarray(Image.open(io.BytesIO(copy)))
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == row["pixels_sha256"]
        lineage = verify_image(copy).lineage
        expected = {
            "batch": place.prefix,
            "count": 20,
            "content_digest": planned_batch.content_digest,
            "run_id": planned_batch.run_id,
            "model": "models:/blobs/3",
            "label": "even",
            "image_sha256": row["sha256"],
        }
        assert expected.items() <= lineage.items()
    # Of another key: other copies, which do not replace the first.
    other = identity(tmp_path / "other")
    with pytest.raises(ConflictError):
        sign_images(str(place), outs[1], other.signer())


def test_a_batch_that_is_unfinished_or_altered_is_not_signed(
    store: Store, bucket: str, tmp_path: Path, alice: Identity
) -> None:
    place = sampled(store, bucket, tmp_path, batch(4))
    with pytest.raises(UserError, match="inside of the batch"):
        sign_images(str(place), f"{place}/signed", alice.signer())
    key = place.key("00000002.png")
    image = store.get(bucket, key)
    store.delete_many(bucket, [key])
    store.put_once(bucket, key, image + b"more")
    with pytest.raises(UserError, match="altered"):
        sign_images(str(place), str(tmp_path / "signed"), alice.signer())
    store.delete_many(bucket, [place.key("_SUCCESS")])
    with pytest.raises(UserError, match="not finished"):
        sign_images(str(place), str(tmp_path / "signed"), alice.signer())


def requested(folder: Path, count: int = 6, **request: object) -> Path:
    """Images made on request, of random pixels, with prompts in their metadata as those of batches have."""
    from diffusion.common.files import write_json
    from diffusion.common.fingerprint import fingerprint
    from diffusion.common.image_grids import encode_png_with_metadata
    from tests.builders.sampling_batches import SAMPLING

    rows = []
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 255, (8, 8), dtype=np.uint8)
        png = encode_png_with_metadata(
            Image.fromarray(pixels), {"seed": "0", "prompt": "a secret wish", "index": str(index)}
        )
        (folder / f"{index:08d}.png").parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:08d}.png").write_bytes(png)
        digests = {"sha256": hashlib.sha256(png).hexdigest(), "pixels_sha256": hashlib.sha256(pixels).hexdigest()}
        rows.append({"file": f"{index:08d}.png", "index": index, **digests})
    about = {
        "request": {"task": "sample", "seed": 0, "prompt": "a secret wish", **request},
        "sampling": SAMPLING.model_dump(mode="json"),
        "model": {"model": f"sha256:{'d' * 64}", "content_digest": "c" * 64, "weights_sha256": "d" * 64},
        "fingerprint": fingerprint(8, "fp32", "cpu").model_dump(mode="json"),
        "images": rows,
    }
    write_json(folder / "request.json", about)
    return folder


def test_prompts_leave_only_on_request(no_servers: None, tmp_path: Path, alice: Identity) -> None:
    source = requested(tmp_path / "images")
    sign_images(str(source), str(tmp_path / "silent"), alice.signer())
    sign_images(str(source), str(tmp_path / "open"), alice.signer(), prompts=True)
    for path in (tmp_path / "silent").rglob("*.*"):
        assert b"secret" not in path.read_bytes()
    for path in (tmp_path / "open").glob("*.png"):
        assert verify_image(path.read_bytes()).lineage["prompt"] == "a secret wish"
        assert Image.open(path).text["darkroom:prompt"] == "a secret wish"  # type: ignore[attr-defined]


def test_an_edit_has_its_parent_as_ingredient(no_servers: None, tmp_path: Path, alice: Identity) -> None:
    parent = tmp_path / "face.png"
    Image.new("L", (8, 8)).save(parent)
    digest = hashlib.sha256(parent.read_bytes()).hexdigest()
    source = requested(tmp_path / "images", task="img2img", image={"sha256": digest})
    sign_images(str(source), str(tmp_path / "signed"), alice.signer(), parent=parent)
    assert verify_image((tmp_path / "signed" / "00000000.png").read_bytes()).lineage["parent_sha256"] == digest
    assert all(each.verified for each in verify(str(tmp_path / "signed"), alice.trust()))
    Image.new("L", (8, 8), 255).save(parent)
    with pytest.raises(UserError, match="not the image"):
        sign_images(str(source), str(tmp_path / "other"), alice.signer(), parent=parent)


def test_a_name_that_leads_elsewhere_is_rejected(no_servers: None, tmp_path: Path, alice: Identity) -> None:
    source = requested(tmp_path / "images")
    about = (source / "request.json").read_text()
    (source / "request.json").write_text(about.replace("00000001.png", "../00000001.png"))
    with pytest.raises(UserError):
        sign_images(str(source), str(tmp_path / "signed"), alice.signer())


def test_without_the_extra_one_line_names_it(
    signed: Path, alice: Identity, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = requested(signed.with_name("images")), signed.with_name("new")
    monkeypatch.setitem(sys.modules, "c2pa", None)
    words = ("sign", source, "--out", out, "--key", alice.key, "--certificates", alice.certificate)
    for command in (words, ("verify", source / "00000001.png")):
        assert "[signing]" in command_line.mistake(*command)
    assert not out.exists()


@pytest.fixture(scope="module")
def signed_once(tmp_path_factory: pytest.TempPathFactory, alice: Identity) -> Path:
    """A folder with signed copies of two requests, to be copied: to sign takes longer than to verify."""
    folder = tmp_path_factory.mktemp("signed")
    for name, seed in (("signed", 0), ("other", 1)):
        sign_images(str(requested(folder / f"images {name}", seed=seed)), str(folder / name), alice.signer())
    return folder


@pytest.fixture
def signed(no_servers: None, signed_once: Path, tmp_path: Path) -> Path:
    """Signed copies of six images, and others beside them in ``other``."""
    for name in ("signed", "other"):
        shutil.copytree(signed_once / name, tmp_path / name)
    return tmp_path / "signed"


class Stopped(BaseException):
    """The process ends here."""


def test_a_stopped_process_is_continued_and_signs_no_image_twice(
    no_servers: None, tmp_path: Path, alice: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signed_images, "AT_ONCE", 1)
    source, out = requested(tmp_path / "images"), tmp_path / "signed"
    put, left, copies = LocalFolder.put, [0], dict[str, bytes]()

    def stopping(self: LocalFolder, name: str, data: bytes) -> bytes:
        if left[0] == 0:
            raise Stopped
        left[0] -= 1
        return put(self, name, data)

    monkeypatch.setattr(LocalFolder, "put", stopping)
    for _ in range(5):
        left[0] = 2
        with pytest.raises(Stopped):
            sign_images(str(source), str(out), alice.signer())
        for path in out.glob("*.png"):
            assert copies.setdefault(path.name, path.read_bytes()) == path.read_bytes()
    assert len(copies) > 2
    left[0] = 100
    (out / f".00000005.png.{'0' * 32}.partial").touch()
    assert sign_images(str(source), str(out), alice.signer()).signed == 6 - len(copies)
    assert all(each.verified for each in verify(str(out), alice.trust()))
    assert copies.items() <= {path.name: path.read_bytes() for path in out.glob("*.png")}.items()


def test_processes_side_by_side_agree_on_one_copy_of_each(no_servers: None, tmp_path: Path, alice: Identity) -> None:
    source, out = requested(tmp_path / "images"), tmp_path / "signed"
    with ThreadPoolExecutor(4) as pool:
        works = [pool.submit(sign_images, str(source), str(out), alice.signer()) for _ in range(4)]
        assert sum(work.result().signed for work in works) == 6
    assert all(each.verified for each in verify(str(out), alice.trust()))


def test_a_foreign_image_in_place_of_a_copy_is_kept(no_servers: None, tmp_path: Path, alice: Identity) -> None:
    source, out = requested(tmp_path / "images"), tmp_path / "signed"
    out.mkdir()
    (out / "00000003.png").write_bytes((source / "00000003.png").read_bytes())
    with pytest.raises(ConflictError, match="00000003"):
        sign_images(str(source), str(out), alice.signer())


def swap(folder: Path) -> None:
    (folder / "00000001.png").rename(folder / "x")
    (folder / "00000002.png").rename(folder / "00000001.png")
    (folder / "x").rename(folder / "00000002.png")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.rfind(b"IDAT") + 10] ^= 1
    path.write_bytes(data)


def strip(folder: Path) -> None:
    with Image.open(folder / "00000001.png") as image:
        image.save(folder / "00000001.png")


def rewrite(folder: Path) -> None:
    part = folder / "manifest" / "part-00000.jsonl"
    part.write_text(part.read_text().replace('"index":1', '"index":7'))


def test_a_copy_signed_by_another_key_does_not_count(no_servers: None, tmp_path: Path, alice: Identity) -> None:
    source, out = requested(tmp_path / "images"), tmp_path / "signed"
    sign_images(str(source), str(tmp_path / "others"), identity(tmp_path / "keys" / "alice").signer())
    out.mkdir()
    shutil.copy(tmp_path / "others" / "00000003.png", out)
    with pytest.raises(ConflictError, match="00000003"):
        sign_images(str(source), str(out), alice.signer())


def test_copies_do_not_go_into_the_folder_of_their_images(no_servers: None, tmp_path: Path, alice: Identity) -> None:
    source = requested(tmp_path / "images")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(UserError, match="--out"):
        sign_images(str(source), f"{tmp_path}/images/../images/", alice.signer())
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def unsign(folder: Path) -> None:
    """Leave the images alone: each says that it is one of six."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.suffix != ".png":
            path.rmdir() if path.is_dir() else path.unlink()


def name_added(folder: Path) -> None:
    """Name a file in the list, as whoever can write to the folder could."""
    (folder / "logo.gif").touch()
    about = json.loads((folder / "_SUCCESS").read_text())
    about["sha256"]["logo.gif"] = hashlib.sha256(b"").hexdigest()
    (folder / "_SUCCESS").write_text(json.dumps(about))


def linked(path: Path) -> None:
    """Put a link to the same bytes in the place of a file."""
    target = path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(target)


def write_hole(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**42)


ADDED: dict[str, Callable[[Path], object]] = {
    "a text": lambda folder: (folder / "notes.txt").write_text("hello"),
    "a GIF": lambda folder: Image.new("L", (8, 8)).save(folder / "logo.gif"),
    "an SVG": lambda folder: (folder / "logo.svg").write_text("<svg/>"),
    "an empty file": lambda folder: (folder / "x").touch(),
    "a dot-file": lambda folder: (folder / ".hidden").write_text("hello"),
    "the file of a killed process": lambda folder: (folder / f".x.{'0' * 32}.partial").write_text("hello"),
    "a file named as the probe of S3": lambda folder: (folder / ".darkroom-conditional-put").write_text("hello"),
    "a file of bytes that are no text": lambda folder: os.mknod(os.fsencode(folder) + b"/\xff\n.gif"),
    "a file in a folder": lambda folder: [(folder / "sub").mkdir(), (folder / "sub" / "x").touch()],
    "an empty folder": lambda folder: (folder / "sub").mkdir(),
    "a folder named as an image": lambda folder: (folder / "00000009.png").mkdir(),
    "a link to a file": lambda folder: (folder / "link").symlink_to(folder / "00000001.png"),
    "a link to an image": lambda folder: (folder / "link.png").symlink_to(folder / "00000001.png"),
    "a link to a folder": lambda folder: (folder / "link").symlink_to(folder.parent),
    "a link to nothing": lambda folder: (folder / "link").symlink_to("nothing"),
    "an image as large as no memory": lambda folder: write_hole(folder / "large.png"),
    "a pipe": lambda folder: os.mkfifo(folder / "pipe"),
    "a pipe named as an image": lambda folder: os.mkfifo(folder / "pipe.png"),
}
KEPT = {f"{index:08d}.png" for index in range(5)}
TAMPERING: dict[str, Callable[[Path], object]] = {
    "a pixel": lambda folder: flip(folder / "00000001.png"),
    "a stripped manifest": strip,
    "a missing image": lambda folder: (folder / "00000001.png").unlink(),
    "a renamed image": lambda folder: (folder / "00000001.png").rename(folder / "00000007.png"),
    "a copied image": lambda folder: shutil.copy(folder / "00000001.png", folder / "00000007.png"),
    "swapped images": swap,
    "an added file that the list names": name_added,
    "a list without a signature": lambda folder: (folder / "_SUCCESS.sig").unlink(),
    "a list with a signature of something else": lambda folder: shutil.copy(
        folder.parent / "other" / "_SUCCESS.sig", folder
    ),
    "no images": lambda folder: [path.unlink() for path in folder.glob("*.png")],
    "a link in place of an image": lambda folder: linked(folder / "00000001.png"),
    "a link in place of a record": lambda folder: linked(folder / "manifest" / "part-00000.jsonl"),
    "an added image": lambda folder: Image.new("L", (8, 8)).save(folder / "more.png"),
    "an image of another batch": lambda folder: shutil.copy(
        folder.parent / "other" / "00000001.png", folder / "00000001.png"
    ),
    "an altered manifest": rewrite,
    "an altered description": lambda folder: (folder / "signing.json").write_text("{}"),
    "a missing description": lambda folder: (folder / "signing.json").unlink(),
    "missing records and a missing image": lambda folder: [
        path.unlink() for path in folder.rglob("*") if path.is_file() and path.name not in KEPT
    ],
    "a missing end": lambda folder: (folder / "_SUCCESS").unlink(),
}


@pytest.mark.parametrize("what", TAMPERING)
def test_each_change_of_signed_copies_is_found(signed: Path, alice: Identity, what: str) -> None:
    assert all(each.verified for each in verify(str(signed), alice.trust()))
    TAMPERING[what](signed)
    checks = verify(str(signed), alice.trust())
    assert not all(each.verified for each in checks)
    assert not any(each.trusted for each in checks if not each.verified)
    assert not any(each.complete for each in checks)


@pytest.mark.parametrize("what", ADDED)
def test_a_file_of_any_kind_beside_signed_copies_is_found(
    signed: Path, alice: Identity, what: str, command_line: CommandLine
) -> None:
    bare = shutil.copytree(signed, signed.with_name("bare"))
    unsign(bare)
    for folder, complete in ((signed, True), (bare, False)):
        before = verify(str(folder), alice.trust())
        assert all(each.verified for each in before)
        assert before[-1].complete is complete
        assert ("no other file" in str(before[-1])) is complete
        ADDED[what](folder)
        for trust in (alice.trust(), Trust()):
            checks = verify(str(folder), trust)
            assert not checks[-1].verified
            assert not any(each.complete for each in checks)
        about = command_line("verify", folder, "--trust", alice.root, "--json", code=3)
        assert json.loads(about)["verified"] is False


@pytest.mark.parametrize("what", [name for name in ADDED if "image" not in name])
def test_any_file_added_to_a_signed_export_is_found(tmp_path: Path, alice: Identity, what: str) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    alice.signer().sign(folder, tmp_path / "export.sig")
    [before] = verify(str(folder), alice.trust())
    assert (before.verified, before.complete) == (True, True)
    ADDED[what](folder)
    [after] = verify(str(folder), alice.trust())
    assert (after.verified, after.complete) == (False, False)


def test_a_list_without_a_trusted_root_is_not_complete(signed: Path) -> None:
    assert not any(each.complete for each in verify(str(signed), Trust()))


def test_copies_by_another_signer_are_found(signed: Path, tmp_path: Path) -> None:
    assert not any(each.verified for each in verify(str(signed), identity(tmp_path / "another").trust()))
    untrusting = verify(str(signed), Trust())
    assert all(each.verified and not each.trusted for each in untrusting)
    assert str(untrusting[0]).startswith("UNTRUSTED")


def test_verify_names_untrusted_files_and_options_without_effect(
    signed: Path, tmp_path: Path, alice: Identity, command_line: CommandLine
) -> None:
    image, source = signed / "00000001.png", requested(tmp_path / "images", task="img2img", image={"sha256": "0" * 64})
    for what in (signed, image):
        command_line("verify", what, "--trust", alice.root)
        command_line("verify", what, code=3)
        assert command_line("verify", what, "--untrusted").splitlines()[-1].startswith("UNTRUSTED")
        for unused in (("--key", alice.public), ("--head", "0" * 64), ("--model", "faces"), ("--untrusted",)):
            command_line("verify", what, "--trust", alice.root, *unused, code=2)
    flip(image)
    command_line("verify", signed, "--untrusted", code=3)
    about = json.loads(command_line("verify", signed, "--trust", alice.root, "--json", code=3))
    assert (about["verified"], about["trusted"], about["checks"][-1]["trusted"]) == (False, False, False)
    # A folder may be named like an image, and a hostile image ends the verification of no other.
    folder = tmp_path / "folder.png"
    folder.mkdir()
    shutil.copytree(tmp_path / "images", folder, dirs_exist_ok=True)
    command_line("verify", folder, "--trust", alice.root, code=3)
    for parent in (tmp_path / "missing.png", tmp_path):
        words = ("--parent", parent, "--key", alice.key, "--certificates", alice.certificate)
        command_line("sign", source, "--out", tmp_path / "edits", *words, code=2)


def test_a_lone_image_and_a_folder_of_images_are_verified(signed: Path, tmp_path: Path, alice: Identity) -> None:
    some = tmp_path / "some"
    some.mkdir()
    shutil.copy(signed / "00000001.png", some / "cat.png")
    [check] = verify(str(some / "cat.png"), alice.trust())
    assert (check.verified, check.trusted) == (True, True)
    assert check.summary.endswith("as 00000001.png")
    # In a folder it is one of six.
    assert [each.verified for each in verify(str(some), alice.trust())] == [False, False]
    for path in signed.glob("*.png"):
        shutil.copy(path, some)
    assert not all(each.verified for each in verify(str(some), alice.trust()))
    (some / "cat.png").unlink()
    checks = verify(str(some), alice.trust())
    assert (len(checks), all(each.verified and each.trusted for each in checks)) == (7, True)
    with pytest.raises(UserError):
        verify(str(some / "dog.png"), alice.trust())
    with pytest.raises(UserError):
        verify(str(tmp_path / "images" / "nothing"), alice.trust())
