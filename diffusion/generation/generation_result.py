"""Images generated for a request, in a folder with what one needs to generate them again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from diffusion.checkpoints import load_model
from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.files import PARTIAL, digest_of, sha256_bytes, sha256_file, write_bytes, write_json
from diffusion.common.fingerprint import Fingerprint, fingerprint
from diffusion.common.image_grids import grid, image_of, save_png
from diffusion.common.png_metadata import marked_png
from diffusion.common.progress import Progress, silent
from diffusion.generation.config import GenerationRequest, Task
from diffusion.generation.requests import answer, original, sampling_of
from diffusion.process.samplers import SamplingConfig

SHOWN = 64
"""Images on the sheet."""
ABOUT = "request.json"


class GenerationResult(Config):
    """The images that answer a request, and where they lie."""

    folder: Path
    model: str
    """The model that generated them: models:/NAME/NUMBER, or a file."""
    task: Task
    count: int
    seed: int
    grid: Path
    """All of them, or the first, on one sheet, after the image that they began with if there is one."""
    about: Path
    """``request.json``: the request, the model and the digest of each image."""


class RequestRecord(Config):
    """Contents of ``request.json``, beside the images."""

    request: dict[str, Any]
    """The fields of the request; of images their SHA-256."""
    sampling: SamplingConfig
    """How they were sampled."""
    model: dict[str, str]
    """Where it comes from, and the SHA-256 of its weights."""
    fingerprint: Fingerprint
    images: tuple[dict[str, Any], ...] = ()
    """File, index, SHA-256 and that of the pixels of each; none before all are written."""


def generate_to_folder(
    weights: Path,
    request: GenerationRequest,
    sampling: SamplingConfig,
    output: Path | None = None,
    origin: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> GenerationResult:
    """Generate the images of ``request`` with the model in the file ``weights`` into the folder ``output``.

    The default folder lies in samples/ and is named for model and request. ``origin`` says where the model comes from,
    and goes into each image. Each file in the folder is whole; what ``request.json`` says of the images is written
    last. Raises UserError as ``answer`` does, and if the folder holds the answer to another request.
    """
    model = load_model(weights)
    digest = sha256_file(weights)
    generated_by = origin["model"] if origin else str(weights)
    # Images are passed on, and need not say where on whose machine a file lay.
    origin = origin or {"model": f"sha256:{digest}"}
    how = sampling_of(model, request, sampling)
    about = RequestRecord(
        request=_described(request),
        sampling=how,
        model={**origin, "weights_sha256": digest, "content_digest": model.header.content_digest},
        fingerprint=fingerprint(how.compute_batch, how.precision, how.device),
    )
    if output is None:
        name = f"{request.task}-{digest_of([about.request, how.model_dump(mode='json', exclude_none=True)])[:8]}"
        output = Path("samples", model.header.dataset, digest[:8], name)
    _require_own(output, about)
    [images] = answer(model, [request], sampling, progress)
    write_json(output / ABOUT, about.model_dump(mode="json", exclude_none=True))
    texts = {**origin, "content_digest": model.header.content_digest, "task": request.task, "seed": str(request.seed)}
    rows = tuple(
        _write(output / f"{index:08d}.png", image, texts | {"index": str(index)})
        for index, image in zip(request.indices, images, strict=True)
    )
    save_png(output / "grid.png", grid(torch.stack([*original(model, request), *images[:SHOWN]])))
    write_json(output / ABOUT, about.model_copy(update={"images": rows}).model_dump(mode="json", exclude_none=True))
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
    """Raise UserError if ``output`` is anything but a new folder, or that of this request."""
    found = output / ABOUT
    try:
        if found.is_file():
            theirs = RequestRecord.model_validate_json(found.read_bytes())
            if theirs.model_copy(update={"images": ()}) != about:
                raise UserError(f"{output} holds the answer to another request: give --out another folder")
        elif output.exists() and not (
            output.is_dir() and all(PARTIAL.fullmatch(each.name) for each in output.iterdir())
        ):
            raise UserError(f"{output} is there, and is no folder of images made on request: give --out another")
    except ValidationError as error:
        raise UserError(f"{found} says nothing of images made on request: give --out another folder") from error


def _described(request: GenerationRequest) -> dict[str, Any]:
    """The request as JSON has it: of images their digests."""
    fields = request.model_dump(exclude_none=True)
    return {
        name: {"sha256": sha256_bytes(value)} if isinstance(value, bytes) else value for name, value in fields.items()
    }


def _write(path: Path, image: Tensor, about: Mapping[str, str]) -> dict[str, Any]:
    pixels = image_of(image)
    digest = write_bytes(path, marked_png(pixels, about))
    return {
        "file": path.name,
        "index": int(about["index"]),
        "sha256": digest,
        "pixels_sha256": sha256_bytes(pixels.tobytes()),
    }
