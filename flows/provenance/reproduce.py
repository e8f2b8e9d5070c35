"""Sampled images generated again by the code that their model version ships, and compared pixel by pixel.

The shipped code runs in a process of its own, with this machine's libraries and no way to the servers.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.client import MlflowClient
from safetensors.numpy import load_file

import diffusion
from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.files import write_bytes, write_json
from diffusion.common.fingerprint import Fingerprint
from diffusion.generation.config import Conditions
from flows import environment
from flows.environment import SERVER_PREFIXES
from flows.registry import model_versions
from flows.registry.model_versions import CODE, CODE_FOLDER, SERVED_MODEL, Version, digest_code
from flows.registry.takedown_marks import warn_of_takedown
from flows.sampling import sampling_batch
from flows.sampling.generate_batch import conditions_of, table_of
from flows.sampling.lookup import (
    Origin,
    Printed,
    StoredImage,
    find,
    pixels_sha256,
    read_image,
    read_pixels,
    read_rows,
)
from flows.sampling.request_table import RequestTable
from flows.sampling.sampling_batch import Batch, Row
from flows.storage.s3 import Location, Store
from flows.storage.s3_errors import Missing
from flows.tracking.progress_reporter import reporter

TOLERANCE = 2.0
"""Mean error of an image, in levels of 255, that other arithmetic may make: a model of 32×32 images was off by 0.3
in bf16 and by 0.001 in fp32 between AVX-512 and AVX2, and images of two seeds by 15 or more."""
NAMED = 20
"""Images named that are not what was printed."""
BEGIN = (
    "import runpy, sys; sys.path.insert(0, sys.argv[1]); script = sys.argv[2]; runpy.run_path(script, None, '__main__')"
)
"""Runs a script with a folder before all others on the import path, once Python itself has started without it."""
REQUIREMENT = re.compile(r"[A-Za-z0-9._-]{1,100}==[A-Za-z0-9._+!-]{1,100}")
LONGEST_REQUIREMENTS = 100_000
"""Characters that are read of them."""
INSTALLED = Path(diffusion.__file__).parent.parent
"""Where the code of this installation lies."""


class Compared(Config):
    """An image drawn again, beside what was printed."""

    key: str
    exact: bool
    """Every pixel is what was printed."""
    altered: bool
    """What lies there, if anything does, is no longer what was printed, as the manifest tells."""
    largest_error: int | None
    """In levels of 255; None if the printed image is gone."""
    mean_error: float | None
    differing_pixels: int | None


class Reproduced(Config):
    """How printed images drawn again compare with what was printed."""

    where: str
    model: str
    """The exact version, models:/NAME/NUMBER."""
    code: str
    """Whose code drew them: that shipped with the version, or that installed here."""
    images: int
    exact: int
    """Images that are the same bit for bit."""
    fingerprint: Fingerprint
    """Of the process that drew them."""
    differences: str
    """How the fingerprint that they were printed under differs from it; empty if it does not."""
    moved: list[str]
    """Libraries of other versions than the model was registered with."""
    largest_error: int
    """In levels of 255, of all images that can be compared."""
    mean_error: float
    """Of the image that is off most."""
    differing_pixels: int
    other: list[Compared]
    """The first of those that are not the same, or were altered."""
    altered: list[str]
    """Images that were changed since they were printed, or are gone."""
    folder: Path | None
    """Where the images were written to."""

    @property
    def failure(self) -> str | None:
        """What is not as promised; None if all is."""
        wrong = []
        if self.altered:
            wrong.append(f"altered or lost since printing: {_some(self.altered)}")
        missed = [each for each in self.other if not each.exact]
        if missed and not self.differences:
            wrong.append(
                f"not the same inside an equal fingerprint, which is promised: {_some([each.key for each in missed])}; "
                + ("drawn by other code than printed them? Try --installed" if self.code == "shipped" else "report it")
            )
        elif self.mean_error > TOLERANCE:
            wrong.append(f"further off than other arithmetic explains, a mean of {TOLERANCE:g} of 255 in an image")
        return "; ".join(wrong) or None


def reproduce(where: str, count: int | None = None, out: Path | None = None, installed: bool = False) -> Reproduced:
    """Draw a printed image, or the first ``count`` of a batch, again in a process of its own, and compare the pixels.

    That process has the code that the model version ships, or with ``installed`` what is installed here, and this
    machine's libraries. ``out``: a folder that the images are written to. Raises UserError if there is nothing that
    could be drawn again, or the code cannot run here.
    """
    store = Store()
    printed = find(where, store, environment.settings().bucket)
    batch, place = _known(printed)
    chunks = _chunks(batch, printed.image, count)
    version = model_versions.resolve(MlflowClient(), f"models:/{batch.model}/{batch.version}")
    if version.weights_sha256 != batch.weights_sha256:
        raise UserError(f"{version.uri} has other weights than {where} was printed with: it was registered anew since")
    warn_of_takedown(version)
    table = table_of(store, batch, place)
    cache = environment.settings().folder / "models"
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        request = _request(batch, model_versions.fetch_weights(version, cache), chunks, table, folder)
        code = INSTALLED if installed else _fetch_code(version, batch, place, folder / "shipped")
        answers = _run(request, code, version, installed)
        made = Fingerprint.model_validate(next(answers)["fingerprint"])
        compared = []
        total = sum(map(len, chunks))
        for chunk, answer in zip(chunks, answers, strict=True):
            again = _taken(Path(answer["file"]))
            originals = [printed.image] if printed.image else _originals(store, place, batch, chunk)
            compared += [compare(*each) for each in zip(map(batch.key, chunk), again, originals, strict=True)]
            if out is not None:
                conditions = conditions_of(batch, table, chunk)
                for index, pixels, original in zip(chunk, again, originals, strict=True):
                    _write(out, batch, index, pixels, original.row, conditions)
            reporter()("images drawn again", len(compared), total)
    return _summary(where, version, installed, batch.fingerprint.differences(made), made, compared, out)


def _fetch_code(version: Version, batch: Batch, place: Location, folder: Path) -> Path:
    """The code of ``version``, if its tag, its batch and its bytes agree on what that is."""
    code = fetch_code(version, folder)
    if batch.code_sha256 != version.code_sha256:
        said = "names none" if batch.code_sha256 is None else f"names other code, {batch.code_sha256[:12]}…"
        raise UserError(
            f"the code of {version.uri} is not run: its tag {CODE} and {place}/batch.json do not agree, which {said}: "
            "one was altered, or an older Darkroom began the batch; --installed runs what is installed here"
        )
    return code


def _known(printed: Printed) -> tuple[Batch, Location]:
    if isinstance(printed.origin, Origin) and printed.origin.task is not None:
        raise UserError(
            f"{printed.where} was made on request ({printed.origin.task}), not printed in a batch: the same command "
            "makes it again, and request.json beside it says with what"
        )
    if printed.batch is None or printed.place is None:
        raise UserError(
            f"the batch of {printed.where} is not at its usual place, and only that says how it was drawn: give the "
            "address that it was printed to, s3://BUCKET/PREFIX/00000007.png"
        )
    return printed.batch, printed.place


def _chunks(batch: Batch, image: StoredImage | None, count: int | None) -> list[range]:
    """The image numbers to draw, a few compute batches at a time."""
    if image is not None:
        if count is not None:
            raise UserError("--count says how many images of a batch: leave it out, or give the batch's prefix")
        return [range(image.index, image.index + 1)]
    if count is not None and count > batch.count:
        raise UserError(f"--count {count}: the batch has {batch.count} images")
    wanted, size = (
        range(batch.count if count is None else count),
        sampling_batch.CHUNK_BATCHES * batch.sampling.compute_batch,
    )
    return [
        wanted[start : min(start + size, each.stop)]
        for each in batch.chunks()
        for start in range(each.start, min(each.stop, len(wanted)), size)
    ]


def _request(
    batch: Batch, weights: Path, chunks: list[range], table: RequestTable | None, folder: Path
) -> dict[str, Any]:
    """The request to ``redraw_script``: only fields that the batch has, as the version's code may know no others."""
    conditions = {}
    if batch.conditions is not None or table is not None:
        each = (conditions_of(batch, table, chunk) for chunk in chunks)
        conditions = {"conditions": [one.model_dump(mode="json", exclude_none=True) for one in each]}
    return {
        "weights": str(weights.resolve()),
        "folder": str(folder),
        "seed": batch.seed,
        "sampling": batch.sampling.model_dump(mode="json", exclude_none=True),
        "fingerprint": batch.fingerprint.model_dump(mode="json"),
        "chunks": [(chunk.start, chunk.stop) for chunk in chunks],
        **conditions,
    }


def _run(request: dict[str, Any], code: Path, version: Version, installed: bool) -> Iterator[dict[str, Any]]:
    try:
        yield from run_code(request, code)
    except UserError as error:
        whose = "installed here" if installed else f"that {version.uri} ships"
        there = changed_libraries(fetch_requirements(version))
        mend = f"it was registered with other libraries ({', '.join(there)}): install those" if there else ""
        other = "" if installed else "if newer code printed it, --installed draws it with what is installed here"
        raise UserError(
            f"the code {whose} does not draw it: {'; '.join(filter(None, (str(error), mend, other)))}"
        ) from error


def _taken(file: Path) -> np.ndarray:
    """The images in ``file``, (N, H, W) or (N, H, W, 3) uint8, which is deleted."""
    images: np.ndarray = load_file(file)["images"].transpose(0, 2, 3, 1)
    file.unlink()
    return images[..., 0] if images.shape[-1] == 1 else images


def _originals(store: Store, place: Location, batch: Batch, chunk: range) -> list[StoredImage]:
    """The images of a chunk as they lie there, with their rows of the manifest."""
    try:
        rows = {row["index"]: row for row in read_rows(store, place, batch, chunk.start // batch.chunk_size)}
    except Missing as error:
        raise UserError(f"{place} is not finished: give the same `darkroom sample` again first") from error

    def get(index: int) -> StoredImage:
        try:
            png = read_image(store, place, batch, index, rows.get(index))
        except Missing:
            png = b""
        return StoredImage(png, None, index, rows.get(index))

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(get, chunk))


def compare(key: str, again: np.ndarray, original: StoredImage) -> Compared:
    """The image of that ``key`` drawn ``again``, (H, W) or (H, W, 3) uint8, beside the ``original``."""
    there = read_pixels(original.png)
    printed = original.row["pixels_sha256"] if original.row else pixels_sha256(there)
    altered = pixels_sha256(there) != printed
    exact = pixels_sha256(again) == printed
    errors = None
    if exact:
        errors = np.zeros(again.shape[:2])
    elif not altered and there is not None and there.shape == again.shape:
        errors = np.abs(there.astype(int) - again).reshape(*again.shape[:2], -1)
    return Compared(
        key=key,
        exact=exact,
        altered=altered,
        largest_error=None if errors is None else int(errors.max()),
        mean_error=None if errors is None else float(errors.mean()),
        differing_pixels=None if errors is None else int(errors.reshape(*again.shape[:2], -1).any(-1).sum()),
    )


def _write(out: Path, batch: Batch, index: int, pixels: np.ndarray, row: Row | None, conditions: Conditions) -> None:
    channels = torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1).copy())
    label = row and row.get("label")
    png, _ = sampling_batch.encode(batch, index, channels, None if label is None else str(label), conditions)
    write_bytes(out / sampling_batch.image_key(index), png)


def _summary(
    where: str,
    version: Version,
    installed: bool,
    differences: str,
    made: Fingerprint,
    compared: list[Compared],
    out: Path | None,
) -> Reproduced:
    other = [each for each in compared if each.altered or not each.exact]
    return Reproduced(
        where=where,
        model=version.uri,
        code="installed" if installed else "shipped",
        images=len(compared),
        exact=sum(each.exact for each in compared),
        fingerprint=made,
        differences=differences,
        moved=changed_libraries(fetch_requirements(version)),
        largest_error=max((each.largest_error or 0 for each in compared), default=0),
        mean_error=max((each.mean_error or 0 for each in compared), default=0),
        differing_pixels=sum(each.differing_pixels or 0 for each in compared),
        other=other[:NAMED],
        altered=[each.key for each in compared if each.altered],
        folder=out,
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


REDRAW = Path(__file__).with_name("redraw_script.py")


def fetch_code(version: Version, folder: Path) -> Path:
    """Fetch the code of ``version`` into ``folder``; returns where its package ``diffusion`` lies there.

    Raises UserError if it ships none, or not that of which its tag has the digest: who can write to the bucket can
    replace it there, and not the tag.
    """
    there = {item.path for item in mlflow.artifacts.list_artifacts(artifact_uri=version.uri)}
    if not {CODE_FOLDER, SERVED_MODEL.name} <= there:
        raise UserError(f"{version.uri} ships no code (any more): --installed runs what is installed here")
    if version.code_sha256 is None:
        raise UserError(
            f"{version.uri} has no tag {CODE}, so that nobody can tell whether its code was replaced, and it is not "
            "run: --installed runs what is installed here"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CODE_FOLDER, SERVED_MODEL.name):
        mlflow.artifacts.download_artifacts(f"{version.uri}/{name}", dst_path=str(folder))
    if (found := digest_code(folder)) != version.code_sha256:
        raise UserError(
            f"the code of {version.uri} was altered after it was registered ({found[:12]}… there, "
            f"{version.code_sha256[:12]}… in its tag {CODE}), and is not run: find out who writes to the bucket; "
            "--installed runs what is installed here"
        )
    return folder / CODE_FOLDER


def fetch_requirements(version: Version) -> list[str]:
    """The libraries that ``version`` was registered with, as NAME==VERSION; lines that read otherwise are left out."""
    lines = str(mlflow.artifacts.load_text(f"{version.uri}/requirements.txt"))[:LONGEST_REQUIREMENTS].splitlines()
    return [line.strip() for line in lines if REQUIREMENT.fullmatch(line.strip())]


def changed_libraries(requirements: list[str]) -> list[str]:
    """Those of ``requirements`` that this machine has in another version, as ``NAME: theirs → ours``."""
    pinned = (line.strip().partition("==") for line in requirements)
    return [
        f"{name}: {wanted} → {here or 'not installed'}"
        for name, equal, wanted in pinned
        if equal and (here := _installed(name)) != wanted
    ]


def run_code(request: dict[str, Any], code: Path) -> Iterator[dict[str, Any]]:
    """The answers of ``redraw_script`` to ``request``, generated with the package ``diffusion`` in ``code``.

    The process has this machine's libraries, and no way to our servers. Nothing in ``code`` is loaded but what it
    imports: no ``sitecustomize``, no ``.pth``, and no bytecode is written there. Raises UserError, with its last words,
    if it fails.
    """
    folder = Path(request["folder"])
    asked, said = folder / "request.json", folder / "stderr"
    write_json(asked, request | {"code": str(code), "parent": os.getpid()})
    variables = {name: value for name, value in os.environ.items() if not name.startswith(SERVER_PREFIXES)}
    with asked.open() as words, said.open("w") as errors:
        process = subprocess.Popen(
            # Not -I, which implies -s: the libraries may be installed for this user alone.
            [sys.executable, "-E", "-P", "-B", "-c", BEGIN, str(code), str(REDRAW)],
            cwd=folder,
            env=variables,
            text=True,
            stdin=words,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    assert process.stdout is not None
    try:
        yield from map(json.loads, process.stdout)
        process.wait()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    if process.returncode:
        last = said.read_text().strip().splitlines()[-1:]
        raise UserError("".join(last) if process.returncode > 0 else f"killed by signal {-process.returncode}")


def _installed(name: str) -> str | None:
    try:
        # As they were when it was registered: without what builds for one device add.
        return installed(name).split("+")[0]
    except PackageNotFoundError:
        return None
