"""Offline verification of what was signed: images, exported models, and ledgers."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.files import sha256_bytes
from flows.provenance.signed_images import (
    SIGNING,
    SUCCESS_SIGNATURE,
    CopyStore,
    LocalFolder,
    S3Prefix,
    SignedRow,
    Signing,
    parse_place,
)
from flows.registry.ledger import MAX_ENTRY_BYTES, SIGNATURES, BrokenChainError, LedgerEntry, follow_chain
from flows.sampling.batch_format import SUCCESS, Success, part_key
from flows.signing.images import SignedImage, verify_image
from flows.signing.keys import SignatureError, Trust, signature_path, signed_files
from flows.storage.numbered_objects import NAME
from flows.storage.s3 import PROBE, PROBE_BODY

SIGNATURE = re.compile(rf"{SIGNATURES}/[0-9a-f]+/([0-9]{{8}})\.sig")
SHA256 = re.compile("[0-9a-f]{64}")
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
CheckKind = Literal["image", "signed images", "model", "ledger"]


class Check(Config):
    """Verification of one thing."""

    path: str
    kind: CheckKind
    verified: bool
    trusted: bool = False
    """Whether it was signed by a key or certificate that the user trusts."""
    complete: bool = False
    """Whether a list of all its files is signed as well, so that none is missing and none was added."""
    summary: str = ""
    """Signer and contents of what is verified."""
    problem: str = ""
    """What is wrong with what is not."""
    lineage: dict[str, Any] = Field(default_factory=dict)
    """What a signed image says of its origin."""

    def __str__(self) -> str:
        state = "FAILED" if not self.verified else "verified" if self.trusted else "UNTRUSTED"
        return f"{state}  {self.kind} {self.path}: {self.problem or self.summary}"


def verify(path: str, trust: Trust, head: str | None = None, model: str | None = None) -> list[Check]:
    """Verify an image, a folder of images, an exported model or a ledger, in files or on S3, without a network else.

    Args:
        path: Path or S3 address. A model or any other signed file has its signature beside it, as PATH.sig.
        trust: Signers to accept. Without a root, images are verified with the certificate that they hold.
        head: SHA-256 of an entry of the ledger that was its newest once; None: none is known.
        model: Name of the registered model of the ledger; None: the last part of an address on S3, any one in files.

    Raises:
        UserError: There is nothing to verify, no key that the signature of a model or a ledger could be compared to, or
            an option has no effect on what there is.
    """
    if head is not None and not SHA256.fullmatch(head):
        raise UserError(f"--head {head} is not a SHA-256: give the 64 hex digits that `darkroom verify` shows as head")
    of_ledger = {"--head": head, "--model": model}
    place, local = parse_place(path), None if path.startswith("s3://") else Path(path)
    if path.lower().endswith(IMAGES) and not (local is not None and local.is_dir()):
        _reject_options("an image", of_ledger | {"--key": trust.key})
        folder, _, name = (path if local is None else str(local.resolve())).rpartition("/")
        data = parse_place(folder).get(name)
        if data is None:
            raise UserError(f"there is no image {path} of a usual size: give an image, a folder, or an S3 address")
        return [_image(path, data, trust)[0]]
    if local is not None and (local.is_file() or signature_path(local).is_file()):
        _reject_options("a signed file or folder", of_ledger)
        return [_signed_file(local, trust)]
    # A place on S3, and a download of it, has what the server was probed with.
    listing = place.names() if local is None or local.is_dir() else ()
    names = sorted(name for name in listing if name != PROBE or place.get(name) != PROBE_BODY)
    if any(NAME.fullmatch(name) for name in names):
        expected = model or (place.place.prefix.rpartition("/")[2] if isinstance(place, S3Prefix) else None)
        return [_ledger(path, place, names, trust, head, expected)]
    if SIGNING in names or any(name.lower().endswith(IMAGES) for name in names):
        _reject_options("images", of_ledger | {"--key": trust.key})
        return list(_images(path.rstrip("/"), place, names, trust))
    raise UserError(f"nothing to verify at {path}: give an image, a folder of images, an export, or a ledger")


def _reject_options(kind: str, options: Mapping[str, object]) -> None:
    if names := [name for name, value in options.items() if value is not None]:
        fix = "; give the root of its certificate with --trust" if "--key" in names else ""
        raise UserError(f"{' and '.join(names)} cannot verify {kind}: leave it out{fix}")


def _fail(path: str, kind: CheckKind, problem: str) -> Check:
    return Check(path=path, kind=kind, verified=False, problem=problem)


def _signed_file(path: Path, trust: Trust) -> Check:
    """Verify a file or folder by the signature beside it."""
    signature = signature_path(path)
    try:
        if not path.exists():
            raise SignatureError("it is gone, and its signature is there")
        if not signature.is_file():
            raise SignatureError(f"it has no signature {signature.name} beside it")
        signer = trust.verify(path, signature)
        # The library passes over folders that are empty, or that it must not read.
        if path.is_dir() and (others := set(LocalFolder(path).names()) - signed_files(signature).keys()):
            raise SignatureError(f"{min(others)} was added")
    except SignatureError as error:
        return _fail(str(path), "model", str(error))
    return Check(
        path=str(path), kind="model", verified=True, trusted=True, complete=True, summary=f"signed by {signer}"
    )


def _image(path: str, data: bytes, trust: Trust) -> tuple[Check, SignedImage | None]:
    try:
        image = verify_image(data, None if trust.roots_pem is None else trust.roots_pem.decode())
    except SignatureError as error:
        return _fail(path, "image", str(error)), None
    summary = f"signed by {image.signer}"
    if not image.trusted:
        summary += ", as its own certificate says, and anybody can make such a one: give its root with --trust"
    if path.rpartition("/")[2] != image.title:
        summary += f", as {image.title}"
    check = Check(path=path, kind="image", verified=True, trusted=image.trusted, summary=summary, lineage=image.lineage)
    return check, image


def _images(path: str, place: CopyStore, names: list[str], trust: Trust) -> Iterator[Check]:
    """Verify every image, that all images which were signed with it are there under their names, and no other file.

    Each copy says how many there are. Which other files belong to them is said by the list of ``darkroom sign`` alone:
    without its signature the folder is never called complete.
    """
    others = {name for name in names if not name.lower().endswith(IMAGES)}
    signing = _read_signing(place) if SIGNING in others else None
    digests, titles, counts = dict[str, tuple[str, str]](), dict[str, set[str]](), dict[str, int]()
    failures = 0
    for name in names:
        if name in others:
            continue
        stored = place.get(name)
        data = stored or b""
        check, image = _image(f"{path}/{name}", data, trust)
        if stored is None:
            check = _fail(check.path, "image", "it is too large, a link, or not a file at all")
        lineage = {} if image is None else image.lineage
        if image is not None and isinstance(count := lineage.get("count"), int):
            digests[name] = str(lineage.get("image_sha256")), sha256_bytes(data)
            source = _source(lineage)
            counts[source] = max(count, counts.get(source, 0))
            titles.setdefault(source, set()).add(image.title)
            if image.title != name:
                check = _fail(check.path, "image", f"it was renamed: it was signed as {image.title}")
        if image is not None and signing is not None and (_source(lineage), lineage.get("count")) != signing.key:
            check = _fail(check.path, "image", f"it is signed, and not of the images that {SIGNING} names")
        failures += not check.verified
        yield check
    if not others and not counts:
        return
    problems = [f"{failures} images are not verified"] if failures else []
    problems += [
        f"{len(titles[source])} of {count} images of {source}"
        for source, count in sorted(counts.items())
        if len(titles[source]) != count
    ]
    signer = ""
    if signing is not None:
        problems += _compare_manifest(place, signing, digests, others)
        if SUCCESS in others:
            try:
                signer = _verify_list(place, trust)
            except SignatureError as error:
                problems.append(f"{SUCCESS}: {error}")
    else:
        is_altered = SIGNING in others
        problems += [f"{SIGNING} was altered"] if is_altered else [f"{name or path} is not signed" for name in others]
    summary = f"all {sum(counts.values())} images of {', '.join(sorted(counts))}"
    summary += f", and no other file, by the list of {signer}" if signer else "; no list of files is verified"
    yield Check(
        path=path,
        kind="signed images",
        verified=not problems,
        trusted=trust.roots is not None and not problems,
        complete=bool(signer) and not problems,
        summary="" if problems else summary,
        problem="; ".join(sorted(problems)[:10]),
    )


def _verify_list(place: CopyStore, trust: Trust) -> str:
    """Verify the signature of the list of files; returns the signer, "" without a root to trust."""
    if (signature := place.get(SUCCESS_SIGNATURE)) is None:
        raise SignatureError("this list of files is not signed: give `darkroom sign` again")
    return trust.verify_bytes(place.get(SUCCESS) or b"", signature) if trust.roots is not None else ""


def _source(lineage: dict[str, Any]) -> str:
    return str(lineage.get("batch") or f"request {lineage.get('request_sha256')}")


def _read_signing(place: CopyStore) -> Signing | None:
    try:
        return Signing.model_validate_json(place.get(SIGNING) or b"")
    except ValidationError:
        return None


def _compare_manifest(
    place: CopyStore, signing: Signing, digests: dict[str, tuple[str, str]], others: set[str]
) -> Iterator[str]:
    """Describe how the records of signed copies, and no ``others``, differ from images with these digests by name."""
    data = place.get(SUCCESS)
    if data is None:
        yield f"signing is not finished: {len(digests)} of {signing.count} images; give `darkroom sign` again"
        return
    rows = list[SignedRow]()
    try:
        records = Success.model_validate_json(data).sha256
        if records.keys() != {SIGNING, *map(part_key, range(len(records) - 1))}:
            yield f"{SUCCESS} names other files than signed copies have"
        yield from (f"{name or 'a file'} was added" for name in sorted(others - {SUCCESS, SUCCESS_SIGNATURE, *records}))
        for name, digest in records.items():
            # The names are not trusted either.
            part = (place.get(name) or b"") if name in others else b""
            if sha256_bytes(part) != digest:
                yield f"{name} is missing, or was altered"
            elif name != SIGNING:
                rows += [SignedRow.model_validate_json(line) for line in part.splitlines()]
    except ValidationError:
        yield f"{SUCCESS} or a part of the manifest was altered"
    manifest_digests = {row.file: (row.sha256, row.signed_sha256) for row in rows}
    if len(manifest_digests) != signing.count:
        yield f"the manifest names {len(manifest_digests)} of {signing.count} images"
    for name in sorted({*manifest_digests, *digests}):
        if manifest_digests.get(name) != digests.get(name):
            problem = "is missing, or not verified" if name not in digests else "is not the one in the manifest"
            yield f"{name} {problem}"


def _ledger(path: str, place: CopyStore, names: list[str], trust: Trust, head: str | None, model: str | None) -> Check:
    """Verify the chain of a ledger up to its newest entry, which must be signed, and that ``head`` is part of it."""
    if trust.key is None and trust.roots is None:
        raise UserError(f"say whose signature of {path} you trust: give --key PUBLIC_KEY, or --trust ROOTS")
    objects = {
        int(match[1]): data
        for name in names
        if (match := NAME.fullmatch(name)) and (data := place.get(name)) is not None and len(data) <= MAX_ENTRY_BYTES
    }
    if not objects:
        return _fail(path, "ledger", f"no entry has at most {MAX_ENTRY_BYTES} bytes")
    signed_heads, signer, failures = dict[int, str](), "", list[tuple[int, str]]()
    signatures = [(int(match[1]), name) for name in names if (match := SIGNATURE.fullmatch(name))]
    for number, name in sorted(signatures, reverse=True):
        try:
            if number not in objects:
                raise SignatureError("the entry is missing")
            signer = trust.verify_bytes(objects[number], place.get(name) or b"")
            # It stands for all before it.
            signed_heads = {number: sha256_bytes(objects[number])}
            break
        except SignatureError as error:
            failures.append((number, f"the signature of entry {number}: {error}"))
    try:
        first_entry = LedgerEntry.model_validate_json(objects[min(objects)])
        if model is not None and first_entry.model != model:
            raise SignatureError(f"it is the ledger of {first_entry.model}, not of {model}")
        if not signed_heads:
            raise SignatureError(
                f"no entry is signed by a trusted key ({failures[0][1] if failures else 'there is no signature'})"
            )
        entries, reasons = follow_chain(first_entry.model, objects, signed_heads)
    except ValidationError:
        return _fail(path, "ledger", f"entry {min(objects)} was altered")
    except BrokenChainError as error:
        return _fail(path, "ledger", f"entry {error.number} {error}")
    except SignatureError as error:
        return _fail(path, "ledger", str(error))
    signed_number, newest_entry = max(signed_heads), entries[-1]
    problems = [f"entry {number} {reason}" for number, reason in reasons.items()]
    problems += [
        f"{name} is not of a ledger" for name in names if not (NAME.fullmatch(name) or SIGNATURE.fullmatch(name))
    ]
    # Of an entry that is not there any more, or was replaced; an older one may be signed by an older key.
    problems += [text for number, text in failures if number > signed_number]
    if newest_entry.number > signed_number:
        problems.append(
            f"the newest signed entry is {signed_number}, and {newest_entry.number} is not signed by a trusted key"
        )
    if head is not None and head not in {entry.digest for entry in entries}:
        problems.append(f"the entry with SHA-256 {head} is not in it: it was rolled back, or is another branch")
    if problems:
        return _fail(path, "ledger", "; ".join(problems))
    champion = newest_entry.alias_numbers.champion
    text = (
        f"model {newest_entry.model}, {len(entries)} entries, champion {'none' if champion is None else champion}, "
        f"head {newest_entry.digest}, signed by {signer}"
    )
    return Check(path=path, kind="ledger", verified=True, trusted=True, summary=text)
