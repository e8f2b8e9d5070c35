"""Signed copies of generated images: one for each, in a folder or on S3; the images themselves stay as they are.

``signing.json`` says of what and by whom, the copies have the names of the images, ``manifest/part-00000.jsonl`` leads
from the SHA-256 of each image to its copy's, and ``_SUCCESS``, written last, has the SHA-256 of the records. So
it lists all files, and ``_SUCCESS.sig`` is its signature.

Signatures are random. Therefore a name is written once: of two processes that sign an image the first one counts, and
a stopped process is continued by the same command.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn
from uuid import uuid4

from pydantic import Field, ValidationError

from diffusion.common.config import Config, is_unset
from diffusion.common.errors import ConflictError, UserError
from diffusion.common.files import canonical_json, make_folder, remove_partials, sha256_bytes, sync_file, sync_folder
from diffusion.common.progress import Progress, ignore_progress
from diffusion.data.manifest import Sha256
from diffusion.generation.requests import ABOUT, RequestRecord
from flows import environment
from flows.sampling.batch_format import (
    BATCH,
    MAX_IMAGE_BYTES,
    SUCCESS,
    Row,
    Success,
    find_conflicts,
    image_key,
    part_bytes,
    part_key,
)
from flows.sampling.lookup import find, read_image, read_rows
from flows.signing.images import ImageSigner, verify_image
from flows.signing.keys import SignatureError, SigningKey, describe
from flows.storage.s3 import DELETED, Location, Store
from flows.storage.s3_errors import LargeObjectError, MissingObjectError

SIGNING, SUCCESS_SIGNATURE = "signing.json", f"{SUCCESS}.sig"
AT_ONCE = 8  # images in transfer at the same time
CHUNK = 256  # images of a part of the manifest, for what is not a sampling batch
PROMPT = b"darkroom:prompt\0"  # beginning of the PNG chunk with the prompt


class Signing(Config):
    """Content of ``signing.json``: what is signed, and by whom."""

    format_version: Literal[1] = 1
    source: str
    """Sampling batch by its prefix in the bucket, or images made on request by the digest of their request."""
    record_sha256: Sha256
    """SHA-256 of ``batch.json``, or of ``request.json``."""
    count: int = Field(ge=0)
    signer: str
    """Subject of the signing certificate, and the beginning of its SHA-256."""
    prompts: bool = False
    parent_sha256: Sha256 | None = Field(None, exclude_if=is_unset)
    """SHA-256 of the image that was edited, if it is an ingredient."""

    @property
    def key(self) -> tuple[str, int]:
        """What each copy says of the images that it is one of."""
        return self.source, self.count


class SignedRow(Config):
    """Row of the manifest."""

    file: str
    index: int
    sha256: Sha256
    """SHA-256 of the image."""
    signed_sha256: Sha256
    """SHA-256 of its signed copy."""


class SignedImages(Config):
    """Result of signing."""

    out: str
    images: int
    signed: int
    """Images that this call signed; the others were signed before."""
    signer: str


@dataclass(frozen=True)
class UnsignedImage:
    """Image to sign: its name, what its copy says of its origin, and its PNG, which is read when it is signed."""

    name: str
    lineage: dict[str, Any]
    read: Callable[[], bytes]


@dataclass(frozen=True)
class LocalFolder:
    """Folder of this machine, of files that are written once."""

    path: Path

    def get(self, name: str) -> bytes | None:
        """Read a file; None if there is none, one of over MAX_IMAGE_BYTES bytes, or something else of its name."""
        path = self.path / name
        # Links lead elsewhere, and reading a pipe never ends.
        if not path.is_file() or path.is_symlink():
            return None
        with path.open("rb") as file:
            data = file.read(MAX_IMAGE_BYTES + 1)
        return data if len(data) <= MAX_IMAGE_BYTES else None

    def put(self, name: str, data: bytes) -> bytes:
        """Write a file whole unless it is there; returns what is there then."""
        path = self.path / name
        make_folder(path.parent)
        temporary_path = path.with_name(f".{path.name}.{uuid4().hex}.partial")
        try:
            # A process that finished first, and so wrote this name, also deletes this temporary file. A link, unlike a
            # rename, does not replace what another process wrote.
            with suppress(FileExistsError, FileNotFoundError):
                temporary_path.write_bytes(data)
                sync_file(temporary_path)
                os.link(temporary_path, path)
        finally:
            temporary_path.unlink(missing_ok=True)
        sync_folder(path.parent)
        if (written := self.get(name)) is None:
            raise ConflictError(f"{path} is there, and is not a file: give --out another place")
        return written

    def names(self) -> Iterator[str]:
        """Yield the names of all there is of any kind, in subfolders with their path; raises OSError."""

        def fail(error: OSError) -> NoReturn:
            raise error

        for folder, folders, files in os.walk(self.path, onerror=fail):
            path = Path(folder)
            # What would hide in an empty folder's name, or behind a link, counts as well.
            names = [*files, *(name for name in folders if (path / name).is_symlink())]
            if not files and not folders and path != self.path:
                yield path.relative_to(self.path).as_posix()
            yield from ((path / name).relative_to(self.path).as_posix() for name in names)

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class S3Prefix:
    """Prefix on S3, of objects that are written once; its methods are those of ``LocalFolder``."""

    place: Location
    store: Store

    def get(self, name: str) -> bytes | None:
        with suppress(MissingObjectError, LargeObjectError):
            return self.store.get(self.place.bucket, self.place.key(name), MAX_IMAGE_BYTES)
        return None

    def put(self, name: str, data: bytes) -> bytes:
        kind = "image/png" if name.endswith(".png") else "application/json"
        try:
            self.store.put_once(self.place.bucket, self.place.key(name), data, content_type=kind)
        except ConflictError:
            return self.store.get(self.place.bucket, self.place.key(name), MAX_IMAGE_BYTES)
        return data

    def names(self) -> Iterator[str]:
        prefix = self.place.key("")
        return (key.removeprefix(prefix) for key in self.store.list_keys(self.place.bucket, prefix))

    def __str__(self) -> str:
        return str(self.place)


CopyStore = LocalFolder | S3Prefix


def parse_place(address: str) -> CopyStore:
    """Folder or prefix that ``address`` names."""
    return S3Prefix(Location.parse(address), Store()) if address.startswith("s3://") else LocalFolder(Path(address))


def sign_images(
    what: str,
    out: str,
    key: SigningKey,
    prompts: bool = False,
    parent: Path | None = None,
    progress: Progress = ignore_progress,
) -> SignedImages:
    """Sign a copy of each image of ``what``, with C2PA, to ``out``; the same call goes on after a kill.

    Args:
        what: S3 address of a finished sampling batch, or folder of images made on request.
        out: Folder or S3 address of the copies, which holds nothing else.
        key: Signing key with its certificate.
        prompts: Whether the copies say the prompts; otherwise they are also left out of their PNG metadata.
        parent: Image that was edited, which becomes an ingredient of the copies; None: of none.
        progress: Shows the images signed.

    Raises:
        UserError: There are no images to sign, one was altered, or the key has no usable certificate.
        ConflictError: ``out`` holds something else.
    """
    signer, target = ImageSigner(key), parse_place(out)
    source = _Batch(what) if what.startswith("s3://") else _Request(Path(what))
    original = None if parent is None else source.read_parent(parent)
    signing = Signing(
        source=source.name,
        record_sha256=source.record_sha256,
        count=source.count,
        signer=describe(key.certificates[0]),
        prompts=prompts,
        parent_sha256=None if original is None else sha256_bytes(original),
    )
    _require_place_for_copies(target, source)
    record = canonical_json(signing.model_dump(mode="json")).encode()
    if target.put(SIGNING, record) != record:
        raise ConflictError(
            f"{target} holds signed copies of other images, or by another certificate: give --out another place"
        )
    image_count = signed_count = 0
    digests = {SIGNING: sha256_bytes(record)}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for number, images in enumerate(source.chunks(prompts)):
            name = part_key(number)
            if (part := target.get(name)) is None:
                rows = list(pool.map(partial(_sign, target, signer, original), images()))
                part = target.put(name, part_bytes(row.model_dump(mode="json") for row, _ in rows))
                signed_count += sum(is_new for _, is_new in rows)
            digests[name] = sha256_bytes(part)
            image_count += part.count(b"\n")
            progress("images signed", image_count, signing.count)
    success = canonical_json(Success(sha256=digests).model_dump(mode="json")).encode()
    if target.get(SUCCESS_SIGNATURE) is None:
        target.put(SUCCESS_SIGNATURE, key.sign_bytes(success))
    if target.put(SUCCESS, success) != success:
        raise ConflictError(f"{target} was altered: its {SUCCESS} names other records than there are")
    if isinstance(target, LocalFolder):
        # Left by a killed process; they would count as files that are not signed.
        remove_partials(target.path)
    return SignedImages(out=str(target), images=image_count, signed=signed_count, signer=signing.signer)


def _require_place_for_copies(target: CopyStore, source: "_Batch | _Request") -> None:
    if (
        isinstance(target, LocalFolder)
        and isinstance(source, _Request)
        and target.path.resolve() == source.folder.resolve()
    ):
        raise UserError(f"{target} holds the images themselves, which stay as they are: give --out another folder")
    if isinstance(target, S3Prefix):
        if f"{target}/".startswith(f"{source.place}/"):
            raise UserError(f"{target} lies inside of the batch, which stays as it is: give --out another place")
        target.store.require_conditional_puts(target.place.bucket, target.place.prefix)


def _sign(target: CopyStore, signer: ImageSigner, parent: bytes | None, image: UnsignedImage) -> tuple[SignedRow, bool]:
    """Sign an image unless its copy is there; also returns whether it was signed now."""
    copy, is_new = target.get(image.name), False
    if copy is None:
        signed = signer.sign(image.read(), image.name, image.lineage, parent)
        copy = target.put(image.name, signed)
        is_new = copy == signed
    if not is_new:
        try:
            signed_image = verify_image(copy)
            # Serial numbers of certificates are random. Whoever forges one as well fails at `darkroom verify --trust`.
            is_own = signed_image.serial_number == signer.serial_number and signed_image.lineage == image.lineage
        except SignatureError:
            is_own = False
        if not is_own:
            raise ConflictError(
                f"{target}/{image.name} is there, and is not a copy that this key signed: give --out another place"
            )
    digests = {"sha256": image.lineage["image_sha256"], "signed_sha256": sha256_bytes(copy)}
    return SignedRow(file=image.name, index=image.lineage["index"], **digests), is_new


class _Batch:
    """Sampling batch on S3."""

    def __init__(self, address: str) -> None:
        self.store = Store()
        source = find(address.rstrip("/"), self.store, environment.settings().bucket)
        if source.image is not None or source.batch is None or source.place is None:
            raise UserError(f"{address} is one image: give the address of its batch")
        self.batch, self.place = source.batch, source.place
        bucket, marker = self.place.bucket, f"{DELETED}/{self.place.prefix}"
        if self.store.exists(bucket, marker) or not self.store.exists(bucket, self.place.key(SUCCESS)):
            raise UserError(f"{address} is not finished, or deleted: give the same `darkroom sample` again first")
        self.name, self.count = self.place.prefix, self.batch.count
        self.record_sha256 = self.store.sha256(self.place.bucket, self.place.key(BATCH))

    def read_parent(self, path: Path) -> bytes:
        raise UserError(f"{path}: the images of a sampling batch were made of no image: leave --parent out")

    def chunks(self, prompts: bool) -> Iterator[Callable[[], Iterator[UnsignedImage]]]:
        return (partial(self._images, chunk, prompts) for chunk in range(len(self.batch.chunks())))

    def _images(self, chunk: int, prompts: bool) -> Iterator[UnsignedImage]:
        batch_fields = {"batch": self.name, "batch_sha256": self.record_sha256, "count": self.count}
        batch_fields |= self.batch.model_dump(include={"seed", "run_id", "content_digest", "weights_sha256"})
        batch_fields["model"] = f"models:/{self.batch.model}/{self.batch.version}"
        rows = read_rows(self.store, self.place, self.batch, chunk)
        if [row["index"] for row in rows] != list(self.batch.chunks()[chunk]):
            raise UserError(f"{self.place}/{part_key(chunk)} was altered: `darkroom trace {self.place}` says more")
        for row in rows:
            if problems := find_conflicts(self.batch, row["index"], row):
                raise UserError(f"{self.place}/{row['key']} contradicts its batch: {', '.join(problems)}")
            fields = {"index": row["index"], "label": row["label"], "prompt": row["prompt"] if prompts else None}
            lineage = batch_fields | fields | {"image_sha256": row["sha256"], "pixels_sha256": row["pixels_sha256"]}
            lineage = {name: value for name, value in lineage.items() if value is not None}
            yield UnsignedImage(image_key(row["index"]), lineage, partial(self._read, row, prompts))

    def _read(self, row: Row, prompts: bool) -> bytes:
        png = read_image(self.store, self.place, self.batch, row["index"], row)
        return _require_unaltered(png, row["sha256"], f"{self.place}/{row['key']}", prompts)


class _Request:
    """Folder of images that were made on request, such as edits."""

    place: Location | None = None

    def __init__(self, folder: Path) -> None:
        self.folder, record = folder, folder / ABOUT
        try:
            data = record.read_bytes()
            self.about = RequestRecord.model_validate_json(data)
        except FileNotFoundError as error:
            raise UserError(
                f"{folder} holds no {ABOUT}: give a folder that `darkroom edit` or `darkroom sample` wrote, or the S3 "
                "address of a sampling batch"
            ) from error
        except ValidationError as error:
            raise UserError(f"{record} says nothing of images made on request: give another folder") from error
        if not self.about.images:
            raise UserError(f"{folder} is not finished: give the command that generates it again")
        self.record_sha256, self.count = sha256_bytes(data), len(self.about.images)
        self.name = f"request {self.record_sha256}"

    def read_parent(self, path: Path) -> bytes:
        """Read the image that was edited; raises UserError for another one."""
        try:
            data, original = path.read_bytes(), self.about.request.get("image")
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): give --parent the image") from error
        if not isinstance(original, dict) or original.get("sha256") != sha256_bytes(data):
            raise UserError(f"{path} is not the image that {self.folder} was made of: give that, or leave --parent out")
        return data

    def chunks(self, prompts: bool) -> Iterator[Callable[[], Iterator[UnsignedImage]]]:
        return (partial(self._images, start, prompts) for start in range(0, self.count, CHUNK))

    def _images(self, start: int, prompts: bool) -> Iterator[UnsignedImage]:
        request = self.about.request
        request_fields = {"request_sha256": self.record_sha256, "count": self.count, **self.about.model}
        request_fields |= {name: request[name] for name in ("task", "seed", "label") if request.get(name) is not None}
        if prompts and request.get("prompt"):
            request_fields["prompt"] = request["prompt"]
        if isinstance(image := request.get("image"), dict):
            request_fields["parent_sha256"] = image["sha256"]
        for row in self.about.images[start : start + CHUNK]:
            if not isinstance(row.get("index"), int) or row.get("file") != image_key(row["index"]):
                raise UserError(f"{self.folder / ABOUT} was altered: generate the images again")
            lineage = request_fields | {"index": row["index"], "image_sha256": row["sha256"]}
            lineage["pixels_sha256"] = row["pixels_sha256"]
            yield UnsignedImage(row["file"], lineage, partial(self._read, row, prompts))

    def _read(self, row: Row, prompts: bool) -> bytes:
        path = self.folder / row["file"]
        if not path.is_file():
            raise UserError(f"{path} is missing: generate the images again")
        return _require_unaltered(path.read_bytes(), row["sha256"], str(path), prompts)


def _require_unaltered(png: bytes, sha256: str, name: str, prompts: bool) -> bytes:
    """Check that ``png`` is what was generated; returns it, without its prompt unless ``prompts``."""
    if sha256_bytes(png) != sha256:
        raise UserError(f"{name} was altered since it was generated, and is not signed: generate it again")
    return png if prompts else remove_prompt(png)


def remove_prompt(png: bytes) -> bytes:
    """Leave the text chunk with the prompt out of a PNG; all other bytes stay."""
    chunks, offset = [png[:8]], 8
    while offset < len(png):
        end = offset + 12 + int.from_bytes(png[offset : offset + 4], "big")
        if not png.startswith(PROMPT, offset + 8) or png[offset + 4 : offset + 8] != b"iTXt":
            chunks.append(png[offset:end])
        offset = end
    return b"".join(chunks)
