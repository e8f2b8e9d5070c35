"""Pictures made on request, in a folder with what one needs to make them again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from diffusion.checkpoints import load_model
from diffusion.config import Config
from diffusion.config_sampling import SamplingConfig
from diffusion.errors import UserError
from diffusion.files import PARTIAL, digest_of, sha256_bytes, sha256_file, write_bytes, write_json
from diffusion.fingerprint import Fingerprint, fingerprint
from diffusion.grids import grid, image_of, save_png
from diffusion.marked import marked_png
from diffusion.progress import Progress, silent
from diffusion.requests import Request, Task, Wanted, answer, original, request_of, sampling_of

SHOWN = 64
"""Pictures on the sheet."""
ABOUT = "request.json"
LARGEST_FILE = 64 * 2**20
"""Bytes that a picture to begin with may have."""


class Made(Config):
    """The answer to a request."""

    folder: Path
    model: str
    """Which model drew: models:/NAME/NUMBER, or a file."""
    task: Task
    count: int
    seed: int
    grid: Path
    """All of them, or the first, on one sheet, after the picture that they began with if there is one."""
    about: Path
    """What was asked for, what drew it, and the digest of each picture."""


class About(Config):
    """What ``request.json`` says of the pictures beside it."""

    request: dict[str, Any]
    """What was asked for; of pictures their SHA-256."""
    sampling: SamplingConfig
    """How they were drawn in the end."""
    model: dict[str, str]
    """Where it comes from, and the SHA-256 of its weights."""
    fingerprint: Fingerprint
    pictures: tuple[dict[str, Any], ...] = ()
    """File, index, SHA-256 and that of the pixels of each; none before all are written."""


def read_request(wanted: Wanted, image: Path | None = None, mask: Path | None = None) -> Request:
    """``wanted`` with the pictures in those files; raises UserError as ``request_of``, or for a file it cannot read."""
    files = {name: _read(path, name) for name, path in (("image", image), ("mask", mask)) if path is not None}
    return request_of(wanted.model_dump(exclude_none=True) | files)


def make(
    weights: Path,
    request: Request,
    sampling: SamplingConfig,
    output: Path | None = None,
    origin: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> Made:
    """Draw what ``request`` asks of the model in the file ``weights`` into the folder ``output``.

    The default folder lies in prints/ and is named for model and request. ``origin`` says where the model comes from,
    and goes into each picture. Each file in the folder is whole; what ``request.json`` says of the pictures is written
    last. Raises UserError as ``answer`` does, and if the folder holds the answer to another request.
    """
    model = load_model(weights)
    digest = sha256_file(weights)
    drawn_by = origin["model"] if origin else str(weights)
    # Pictures are passed on, and need not say where on whose machine a file lay.
    origin = origin or {"model": f"sha256:{digest}"}
    how = sampling_of(model, request, sampling)
    about = About(
        request=_described(request),
        sampling=how,
        model={**origin, "weights_sha256": digest, "content_digest": model.header.content_digest},
        fingerprint=fingerprint(how.compute_batch, how.precision, how.device),
    )
    if output is None:
        name = f"{request.task}-{digest_of([about.request, how.model_dump(mode='json', exclude_none=True)])[:8]}"
        output = Path("prints", model.header.dataset, digest[:8], name)
    _require_own(output, about)
    [pictures] = answer(model, [request], sampling, progress)
    write_json(output / ABOUT, about.model_dump(mode="json", exclude_none=True))
    texts = {**origin, "content_digest": model.header.content_digest, "task": request.task, "seed": str(request.seed)}
    rows = tuple(
        _write(output / f"{index:08d}.png", picture, texts | {"index": str(index)})
        for index, picture in zip(request.indices, pictures, strict=True)
    )
    save_png(output / "grid.png", grid(torch.stack([*original(model, request), *pictures[:SHOWN]])))
    write_json(output / ABOUT, about.model_copy(update={"pictures": rows}).model_dump(mode="json", exclude_none=True))
    return Made(
        folder=output,
        model=drawn_by,
        task=request.task,
        count=request.count,
        seed=request.seed,
        grid=output / "grid.png",
        about=output / ABOUT,
    )


def _require_own(output: Path, about: About) -> None:
    """Raise UserError if ``output`` is anything but a new folder, or that of this request."""
    found = output / ABOUT
    try:
        if found.is_file():
            theirs = About.model_validate_json(found.read_bytes())
            if theirs.model_copy(update={"pictures": ()}) != about:
                raise UserError(f"{output} holds the answer to another request: give --out another folder")
        elif output.exists() and not (
            output.is_dir() and all(PARTIAL.fullmatch(each.name) for each in output.iterdir())
        ):
            raise UserError(f"{output} is there, and is no folder of pictures made on request: give --out another")
    except ValidationError as error:
        raise UserError(f"{found} says nothing of pictures made on request: give --out another folder") from error


def _described(request: Request) -> dict[str, Any]:
    """The request as JSON has it: of pictures their digests."""
    fields = request.model_dump(exclude_none=True)
    return {
        name: {"sha256": sha256_bytes(value)} if isinstance(value, bytes) else value for name, value in fields.items()
    }


def _write(path: Path, picture: Tensor, about: Mapping[str, str]) -> dict[str, Any]:
    image = image_of(picture)
    digest = write_bytes(path, marked_png(image, about))
    return {
        "file": path.name,
        "index": int(about["index"]),
        "sha256": digest,
        "pixels_sha256": sha256_bytes(image.tobytes()),
    }


def _read(path: Path, name: str) -> bytes:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(f"the {name} {path} has over {LARGEST_FILE} bytes: give a smaller one")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"the {name} {path} cannot be read ({error.strerror}): give the path of a picture") from error
