"""Folders of images generated for a request, with a record that reproduces them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from diffusion.checkpoints import load_model
from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.files import PARTIAL, digest_of, sha256_bytes, sha256_file, write_bytes, write_json
from diffusion.common.fingerprint import Fingerprint, fingerprint
from diffusion.common.image_grids import grid, image_of, marked_png, save_png
from diffusion.common.progress import Progress, silent
from diffusion.generation.config import GenerationRequest, Task
from diffusion.generation.requests import answer, original, sampling_of
from diffusion.process.samplers import SamplingConfig

SHOWN = 64
"""Most images in the grid."""
ABOUT = "request.json"


class GenerationResult(Config):
    """Images generated for a request, and their location."""

    folder: Path
    model: str
    """Model that generated them: models:/NAME/NUMBER, or a file."""
    task: Task
    count: int
    seed: int
    grid: Path
    """Grid of the images, or of the first ones, after the original of an edit."""
    about: Path
    """``request.json``: the request, the model and the digest of each image."""


class RequestRecord(Config):
    """Contents of ``request.json``, beside the images."""

    request: dict[str, Any]
    """Fields of the request; images as their SHA-256."""
    sampling: SamplingConfig
    """Effective sampling options."""
    model: dict[str, str]
    """Origin of the model, and the SHA-256 of its weights."""
    fingerprint: Fingerprint
    images: tuple[dict[str, Any], ...] = ()
    """File, index, SHA-256 and pixel SHA-256 of each image; empty until all are written."""


def generate_to_folder(
    weights: Path,
    request: GenerationRequest,
    sampling: SamplingConfig,
    output: Path | None = None,
    origin: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> GenerationResult:
    """Generate the images of ``request`` with the model in the file ``weights`` into the folder ``output``.

    The default folder in samples/ is named after model and request. Each image carries the ``origin`` of the model.
    ``request.json`` lists the images once all are written. Raises UserError as ``answer`` does, and if the folder
    belongs to another request.
    """
    model = load_model(weights)
    digest = sha256_file(weights)
    generated_by = origin["model"] if origin else str(weights)
    # Images are shared, so they carry a digest instead of a local path.
    origin = {**(origin or {"model": f"sha256:{digest}"}), "content_digest": model.header.content_digest}
    effective = sampling_of(model, request, sampling)
    fields = request.model_dump(exclude_none=True)
    about = RequestRecord(
        request={
            name: {"sha256": sha256_bytes(value)} if isinstance(value, bytes) else value
            for name, value in fields.items()
        },
        sampling=effective,
        model=origin | {"weights_sha256": digest},
        fingerprint=fingerprint(effective.compute_batch, effective.precision, effective.device),
    )
    if output is None:
        name = f"{request.task}-{digest_of([about.request, effective.model_dump(mode='json', exclude_none=True)])[:8]}"
        output = Path("samples", model.header.dataset, digest[:8], name)
    _require_own(output, about)
    [images] = answer(model, [request], sampling, progress)
    write_json(output / ABOUT, about.model_dump(mode="json", exclude_none=True))
    rows = []
    for index, image in zip(request.indices, images, strict=True):
        pixels, path = image_of(image), output / f"{index:08d}.png"
        texts = origin | {"task": request.task, "seed": str(request.seed), "index": str(index)}
        sha256, pixels_sha256 = write_bytes(path, marked_png(pixels, texts)), sha256_bytes(pixels.tobytes())
        rows.append({"file": path.name, "index": index, "sha256": sha256, "pixels_sha256": pixels_sha256})
    save_png(output / "grid.png", grid(torch.stack([*original(model, request), *images[:SHOWN]])))
    about = about.model_copy(update={"images": tuple(rows)})
    write_json(output / ABOUT, about.model_dump(mode="json", exclude_none=True))
    return GenerationResult(
        folder=output,
        model=generated_by,
        task=request.task,
        count=request.count,
        seed=request.seed,
        grid=output / "grid.png",
        about=output / ABOUT,
    )


def _require_own(output: Path, about: RequestRecord) -> None:
    """Raise UserError unless ``output`` is a new folder, or that of the same request."""
    record = output / ABOUT
    if record.is_file():
        try:
            theirs = RequestRecord.model_validate_json(record.read_bytes())
        except ValidationError as error:
            raise UserError(f"{record} says nothing of images made on request: give --out another folder") from error
        if theirs.model_copy(update={"images": ()}) != about:
            raise UserError(f"{output} holds the answer to another request: give --out another folder")
    elif output.exists() and not (output.is_dir() and all(PARTIAL.fullmatch(each.name) for each in output.iterdir())):
        raise UserError(f"{output} is there, and is no folder of images made on request: give --out another")
