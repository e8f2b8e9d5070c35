"""Generation of images for requests from the command line, the flow and the served model."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from diffusion.checkpoints import load_model
from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.files import PARTIAL, digest_of, sha256_bytes, sha256_file, write_bytes, write_json
from diffusion.common.fingerprint import Fingerprint, fingerprint
from diffusion.common.image_grids import (
    GRID,
    encode_png_with_metadata,
    make_captioned_grid,
    repeat_pixels,
    to_pil_image,
)
from diffusion.common.progress import Progress, ignore_progress
from diffusion.common.shapes import Shape, height_and_width, shape_name
from diffusion.data.ingest.config import IngestConfig
from diffusion.data.ingest.decode import UnusableEntryError, decode_unscaled, prepare
from diffusion.families.model import Model
from diffusion.generation.config import (
    GenerationRequest,
    Img2ImgRequest,
    InpaintRequest,
    InterpolateRequest,
    SampleRequest,
    Task,
    UpscaleRequest,
    is_conditional,
)
from diffusion.generation.generate import (
    check_edit,
    check_interpolation,
    check_prompts,
    check_sampling,
    describe_conditions,
    interpolate,
    sample,
)
from diffusion.generation.limits import Budget, check_size, count_megapixels
from diffusion.generation.super_resolution import scale_of, tile_shape, upscale
from diffusion.process.editing import Edit
from diffusion.process.samplers import SamplingConfig

T = TypeVar("T")
HOLE = torch.tensor(128, dtype=torch.uint8)
"""Grey value that shows the hole of an image to inpaint."""
MAX_PIXELS = 2**23
"""Most pixels of all upscaled images of a request, whose tiles are all in memory at once."""
MAX_VALUES = 2**31
"""Most values of all images that are generated in one call, which are all in memory at once."""
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


def tasks_of(model: Model) -> tuple[Task, ...]:
    """List the tasks that ``model`` can do."""
    if model.config.low_resolution is not None:
        return ("upscale",)
    edits: tuple[Task, ...] = ("inpaint", "img2img") if "noise_levels" in model.config.abilities else ()
    return ("sample", *edits, "interpolate")


def answer(
    model: Model,
    requests: Sequence[GenerationRequest],
    sampling: SamplingConfig,
    progress: Progress = ignore_progress,
    budget: Budget | None = None,
) -> list[Tensor]:
    """Generate the images of each request, (count, C, H, W) uint8, with ``sampling`` where the request sets nothing.

    Samples of one seed in several requests are generated together. Raises UserError, before anything is generated, if
    ``model`` cannot do a task, was not trained with a label or prompt, an option would have no effect, or the requests
    take more work than a ``budget``; and StoppedError when its time is over.
    """
    plans: dict[tuple[object, ...], list[int]] = {}
    models: list[Model] = []
    configs: list[SamplingConfig] = []
    inputs: list[Edit | Tensor | None] = []
    values = 0
    for number, request in enumerate(requests):
        try:
            if budget:
                budget.check()
            configs.append(config := sampling_of(model, request, sampling))
            inputs.append(source := input_of(model, request))
            models.append(
                model.with_size(height_and_width(source.image) if isinstance(source, Edit) else size_of(request))
            )
            if budget:
                check_size(models[-1])
        except UserError as error:
            raise UserError(f"row {number}: {error}" if len(requests) > 1 else str(error)) from error
        size = source.numel() * scale_of(model) ** 2 if isinstance(source, Tensor) else math.prod(models[-1].shape)
        values += request.count * size
        key: tuple[object, ...] = (number,)
        if isinstance(request, SampleRequest):
            key = (request.seed, request.conditions, config.model_dump_json())
        plans.setdefault(key, []).append(number)
    if values > MAX_VALUES:
        raise UserError(
            f"the requested images have {values:,} values, and {MAX_VALUES:,} are held at once: ask for fewer, or have "
            "a registered version generate them in batches (darkroom sample --model models:/…)"
        )
    indices = {
        key: sorted({index for number in plan for index in requests[number].indices}) for key, plan in plans.items()
    }
    if budget:
        budget.check_work(
            sum(count_megapixels(models[n], configs[n], indices[key], inputs[n]) for key, (n, *_) in plans.items())
        )
    answers: dict[int, Tensor] = {}
    with budget.watch(model) if budget else nullcontext():
        for key, plan in plans.items():
            first = plan[0]
            images = _generate(models[first], requests[first], indices[key], configs[first], inputs[first], progress)
            by_index = dict(zip(indices[key], images, strict=True))
            for number in plan:
                answers[number] = torch.stack([by_index[index] for index in requests[number].indices])
    return [answers[number] for number in range(len(requests))]


def _generate(
    model: Model,
    request: GenerationRequest,
    indices: Sequence[int],
    config: SamplingConfig,
    source: Edit | Tensor | None,
    progress: Progress,
) -> Tensor:
    """Generate the images ``indices`` of a request, or of several that are samples and differ in them alone."""
    if isinstance(source, Tensor):
        copies = source.expand(len(indices), -1, -1, -1)
        return upscale(model, copies, request.seed, config, progress, indices[0])
    if isinstance(request, InterpolateRequest):
        to_seed, conditions = request.to_seed, request.conditions
        return interpolate(model, request.seed, to_seed, request.count, config, progress, conditions, by_step=True)
    return sample(model, indices, request.seed, config, progress, request.conditions, source, by_step=True)


def render_input(model: Model, request: GenerationRequest) -> list[Tensor]:
    """Return the input image of ``request``, if any, as large as generated ones, (C, H, W) uint8, with grey holes."""
    source = input_of(model, request)
    if isinstance(source, Edit):
        return [source.image if source.kept is None else torch.where(source.kept, source.image, HOLE)]
    return [] if source is None else repeat_pixels(source[None], scale_of(model))


def sampling_of(model: Model, request: GenerationRequest, sampling: SamplingConfig) -> SamplingConfig:
    """Resolve the sampling options of ``request``; raises UserError if ``model`` does not support them."""
    if request.task not in tasks_of(model):
        raise UserError(f"the model was not trained to {request.task}: it can {', '.join(tasks_of(model))}")
    use_default = is_conditional(model.classes, request.conditions) and getattr(request, "guidance", None) is None
    config = request.sampling(model.header.sampling(sampling, use_default))
    if (config.sampler == "consistency") != (model.header.student_steps is not None):
        raise UserError(
            f"sampler {config.sampler} does not fit: consistency is for students, and they have no other: leave it out"
        )
    if getattr(request, "guidance", None) is None and not is_conditional(model.classes, request.conditions):
        config = config.without_guidance()
    check_sampling(model, config, request.conditions)
    check_prompts(request.conditions, model.prompt_length)
    if isinstance(request, InterpolateRequest):
        check_interpolation(model, request.seed, request.to_seed, request.count, request.conditions)
    model.with_size(size_of(request)).check_sampling(config)  # raises for a size that its network does not take
    return config


def size_of(request: GenerationRequest) -> Shape | None:
    """Return (H, W) of the images that ``request`` names; None: it names none."""
    return request.conditions.size(0)


def input_of(model: Model, request: GenerationRequest) -> Edit | Tensor | None:
    """Decode the images of ``request``: an edit, or the image to upscale, (C, h, w) uint8."""
    if isinstance(request, UpscaleRequest):
        # Under 2,048 pixels high and wide.
        image = _channels_first(_decode(decode_unscaled, request.image, "image", 1024, model.header.channels))
        tile_shape(model, image[None])  # raises if it is too small
        if (pixels := request.count * image[0].numel() * scale_of(model) ** 2) > MAX_PIXELS:
            raise UserError(
                f"{pixels / 1e6:.1f} million pixels in all would be generated at once, and {MAX_PIXELS / 1e6:.1f} may "
                "be: give a smaller image, or ask for fewer"
            )
        return image
    if not isinstance(request, InpaintRequest | Img2ImgRequest):
        return None
    header = model.header
    shapes = [request.size] if request.size else [*header.trained_shapes]
    source = _decode(prepare, request.image, "image", header.size, header.channels, shapes)
    image = _channels_first(source.pixels)
    if isinstance(request, Img2ImgRequest):
        edit = Edit(image, strength=request.strength)
    else:
        mask = _decode(prepare, request.mask, "mask", header.size, 1, shapes)
        if mask.source_size != source.source_size:
            other, size = ("×".join(map(str, item.source_size)) for item in (mask, source))
            raise UserError(f"the mask has {other} pixels and the image {size} (width × height): make them equal")
        keep_mask = torch.from_numpy(mask.pixels < 32)  # nearly black, also after scaling
        edit = Edit(image, keep_mask, request.strength, request.resample_steps or 1, guided=request.method == "pigdm")
    check_edit(model.with_size(height_and_width(image)), edit)
    return edit


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.copy()).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)


def _decode(
    decode: Callable[[bytes, IngestConfig], T],
    payload: bytes,
    name: str,
    size: int,
    channels: int,
    shapes: Sequence[Shape] = (),
) -> T:
    """Decode an image of the user's, cropped to the nearest of ``shapes``, or to a square if there are none."""
    mode: Literal["grey", "rgb"] = "grey" if channels == 1 else "rgb"
    options: dict[str, Any] = {"size": size}
    if shapes and [*shapes] != [(size, size)]:
        square = size if len(shapes) > 1 else round(math.sqrt(math.prod(shapes[0])))
        options = {"size": square, "fit": "bucket", "buckets": [*map(shape_name, shapes)]}
    try:
        config = IngestConfig(mode=mode, enlarge=True, **options)
    except ValidationError as error:
        names = ", ".join(map(shape_name, shapes))
        raise UserError(f"no image can be fitted to {names}: {error.errors()[0]['msg']}: set another size") from error
    try:
        return decode(payload, config)
    except UnusableEntryError as error:
        raise UserError(f"the {name} cannot be used: {error}") from error


def generate_to_folder(
    weights: Path,
    request: GenerationRequest,
    sampling: SamplingConfig,
    output: Path | None = None,
    origin: Mapping[str, str] | None = None,
    progress: Progress = ignore_progress,
) -> GenerationResult:
    """Generate the images of ``request`` with the model in the file ``weights`` into the folder ``output``.

    By default it is named after model and request, in samples/. Each image carries the ``origin`` of the model. Raises
    UserError as ``answer`` does, and if the folder belongs to another request.
    """
    model = load_model(weights)
    digest = sha256_file(weights)
    generated_by = origin["model"] if origin else str(weights)
    # Images are shared, so they carry a digest instead of a local path.
    origin = {**(origin or {"model": f"sha256:{digest}"}), "content_digest": model.header.content_digest}
    effective = sampling_of(model, request, sampling)
    record = RequestRecord(
        request={
            name: {"sha256": sha256_bytes(value)} if isinstance(value, bytes) else value
            for name, value in request.model_dump(exclude_none=True).items()
        },
        sampling=effective,
        model=origin | {"weights_sha256": digest},
        fingerprint=fingerprint(effective.compute_batch, effective.precision, effective.device),
    )
    if output is None:
        name = f"{request.task}-{digest_of([record.request, effective.model_dump(mode='json', exclude_none=True)])[:8]}"
        output = Path("samples", model.header.dataset, digest[:8], name)
    _require_own(output, record)
    [images] = answer(model, [request], sampling, progress)
    write_json(output / ABOUT, record.model_dump(mode="json", exclude_none=True))
    rows = []
    for index, image in zip(request.indices, images, strict=True):
        path = output / f"{index:08d}.png"
        sha256 = write_bytes(path, encode(image, index, request, origin))
        pixels_sha256 = sha256_bytes(to_pil_image(image).tobytes())
        rows.append({"file": path.name, "index": index, "sha256": sha256, "pixels_sha256": pixels_sha256})
    write_bytes(output / "grid.png", _encode_grid(model, images[:SHOWN], request, origin))
    record = record.model_copy(update={"images": tuple(rows)})
    write_json(output / ABOUT, record.model_dump(mode="json", exclude_none=True))
    fields = {name: getattr(request, name) for name in ("task", "count", "seed")}
    return GenerationResult(folder=output, model=generated_by, grid=output / "grid.png", about=output / ABOUT, **fields)


def encode(image: Tensor, index: int, request: GenerationRequest, origin: Mapping[str, str]) -> bytes:
    """Encode image ``index`` of ``request``, (C, H, W) uint8, as a PNG that carries the ``origin`` of its model."""
    conditions, metadata = request.conditions, _metadata(index, request, origin)
    metadata |= {"label": conditions.label(index), "prompt": conditions.prompt(index)}
    return encode_png_with_metadata(to_pil_image(image), metadata)


def _metadata(index: int, request: GenerationRequest, origin: Mapping[str, str]) -> dict[str, str | None]:
    return {**origin, "task": request.task, "seed": str(request.seed), "index": str(index)}


def _encode_grid(model: Model, images: Tensor, request: GenerationRequest, origin: Mapping[str, str]) -> bytes:
    """Encode the grid of a request as a PNG that can be traced like its images."""
    inputs, texts = render_input(model, request), [""] * len(images)
    if not isinstance(request, InterpolateRequest):  # whose images are in order
        texts = describe_conditions(model, request.indices[: len(images)], request.seed, request.conditions)
    input_text = "input" if len(set(texts)) > 1 else texts[0]
    grid = make_captioned_grid([*inputs, *images], [*(input_text for _ in inputs), *texts])
    return encode_png_with_metadata(grid, _metadata(request.indices[0], request, origin) | {GRID: request.task})


def _require_own(output: Path, request_record: RequestRecord) -> None:
    """Raise UserError unless ``output`` is a new folder, or holds the same request."""
    record = output / ABOUT
    if record.is_file():
        try:
            previous = RequestRecord.model_validate_json(record.read_bytes())
        except ValidationError as error:
            raise UserError(f"{record} says nothing of images made on request: give --out another folder") from error
        if previous.model_copy(update={"images": ()}) != request_record:
            raise UserError(f"{output} holds the answer to another request: give --out another folder")
    elif output.exists() and not (output.is_dir() and all(PARTIAL.fullmatch(path.name) for path in output.iterdir())):
        raise UserError(f"{output} is there, and is not a folder of images made on request: give --out another")
