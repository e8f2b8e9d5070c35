"""Pictures made on request, in a folder with what one needs to make them again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.config import Config
from diffusion.config_sampling import SamplingConfig
from diffusion.errors import UserError
from diffusion.files import digest_of, sha256_bytes, sha256_file, write_bytes, write_json
from diffusion.fingerprint import fingerprint
from diffusion.grids import grid, image_of, save_png
from diffusion.marked import marked_png
from diffusion.model import load_model
from diffusion.progress import Progress, silent
from diffusion.requests import Request, Task, Wanted, answer, original, request_of

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
    and goes into each picture. Whatever stands in the folder is whole; ``request.json`` is written last.
    """
    model = load_model(weights)
    origin = origin or {"model": str(weights)}
    [pictures] = answer(model, [request], sampling, progress)
    how = request.sampling(sampling)
    asked = _described(request)
    digest = sha256_file(weights)
    if output is None:
        name = f"{request.task}-{digest_of([asked, how.model_dump(mode='json', exclude_none=True)])[:8]}"
        output = Path("prints", model.header.dataset, digest[:8], name)
    begun_with = original(model, request)
    shown = [*begun_with, *pictures[:SHOWN]]
    about = {**origin, "content_digest": model.header.content_digest, "task": request.task, "seed": str(request.seed)}
    rows = [
        _write(output / f"{index:08d}.png", picture, about | {"index": str(index)})
        for index, picture in zip(request.indices, pictures, strict=True)
    ]
    save_png(output / "grid.png", grid(torch.stack(shown)))
    write_json(
        output / ABOUT,
        {
            "request": asked,
            "sampling": how.model_dump(mode="json", exclude_none=True),
            "model": {**origin, "weights_sha256": digest, "content_digest": model.header.content_digest},
            "fingerprint": fingerprint(how.compute_batch, how.precision, how.device).model_dump(mode="json"),
            "pictures": rows,
        },
    )
    return Made(
        folder=output,
        model=origin["model"],
        task=request.task,
        count=request.count,
        seed=request.seed,
        grid=output / "grid.png",
        about=output / ABOUT,
    )


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
