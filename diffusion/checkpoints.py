"""Models and checkpoints as safetensors files: written atomically, read without unpickling anything."""

import hashlib
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffusion.common.errors import UserError
from diffusion.common.files import canonical_json, sha256_bytes, sha256_file, write_atomically
from diffusion.common.model_files import METADATA_KEY, read_header, tensor_bytes
from diffusion.families import family_of
from diffusion.families.config import classes_of
from diffusion.families.header import GUIDANCE_OPTIONS, Base, ModelHeader
from diffusion.families.model import Model, use_channels_last
from diffusion.families.vae.network import Latents
from diffusion.process.samplers import SamplingConfig

AVERAGED = "ema."
"""Prefix of the averaged weights' names in checkpoints and in final models."""
GUIDE = "guide."
"""Prefix of the weights of the guide that autoguidance leads away from."""
AUTOENCODER = "autoencoder."
"""Prefix of the weights of a latent diffusion model's autoencoder and of its latents' moments."""
CARRIED = "carried."
"""Prefix of the weights of an imported pipeline's components that are not run, by the path of their file."""
FILES = "files."
"""Prefix of an imported pipeline's files that are no weights, and of the headers of those that are: bytes, by path."""
PARTS = (AVERAGED, GUIDE, AUTOENCODER, CARRIED, FILES)
"""Prefixes of a final model's tensors."""
CONTENT_SHA256 = "content_sha256"
"""Key of a file's header: SHA-256 over the rest of the header and all tensors."""
MAX_FILES_BYTES = 128 * 2**20
"""Most bytes of all files of an imported pipeline that are no weights."""


def save_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    """Write a safetensors file atomically with ``header`` in its metadata; returns the file's SHA-256.

    The header gets the digest of both, by which ``verify_weights`` finds damage.
    """
    contiguous_tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    header = header | {CONTENT_SHA256: content_digest(contiguous_tensors, header)}
    metadata = {METADATA_KEY: canonical_json(header)}

    def write(partial: Path) -> None:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(contiguous_tensors, partial, metadata)
        partial.chmod(mode)  # save_file leaves a file that only its owner can read

    try:
        return write_atomically(path, write)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def content_digest(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Compute the SHA-256 over ``header``, but for its own digest, and names, types, shapes and bytes of tensors."""
    rest = {key: value for key, value in header.items() if key != CONTENT_SHA256}
    digest = hashlib.sha256(canonical_json(rest).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()


def verify_weights(path: Path) -> None:
    """Raise UserError if a model file, or one that it is based on, is damaged or has weights that are not finite.

    Files of versions before there was a digest are searched for the latter alone.
    """
    stat = path.stat()
    _verify_file(path.absolute(), stat.st_size, stat.st_mtime_ns)
    if (base := read_model_header(path).base) is not None:
        verify_weights(find_base(path, base))


@lru_cache(64)
def _verify_file(path: Path, size: int, mtime: int) -> None:
    """Verify one file, which is read again only after a change."""
    header, tensors = read_header(path), read_tensors(path, "")
    if CONTENT_SHA256 in header and header[CONTENT_SHA256] != content_digest(tensors, header):
        raise UserError(f"{path} is damaged, as its content is not what its digest says: fetch or make it again")
    for name, value in tensors.items():
        # Weights are computed with in float32, in which those of other types may be infinite.
        is_finite = not value.is_floating_point() or value.to(torch.float32).isfinite().all()
        if name.startswith(PARTS) and (value.is_complex() or not is_finite):
            raise UserError(
                f"{path} has weights that are not finite, in {name.removeprefix(AVERAGED)}: use a checkpoint from "
                "before its training diverged, or fetch it again"
            )


def read_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file whose names begin with ``prefix``, without it."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (no mapping)
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def model_digest(path: Path) -> str:
    """Compute the SHA-256 of the model in a file, header and weights: equal for a checkpoint and its final model."""
    digest = hashlib.sha256(read_model_header(path).model_dump_json().encode())
    for prefix in PARTS:
        for name, value in sorted(read_tensors(path, prefix).items()):
            digest.update(f"{prefix}{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(tensor_bytes(value))
    return digest.hexdigest()


def weights_digest(path: Path) -> str:
    """Compute ``sha256:`` and the SHA-256 over configuration, names and weights, equal for all files of a model.

    That of an imported pipeline is also over the files of its tokenizers, on which training depends, and that of a
    model with a guide over its weights.
    """
    header = read_model_header(path)
    digest = hashlib.sha256(header.model.model_dump_json().encode())
    if header.base is not None:
        adapter = header.adapter and header.adapter.model_dump(mode="json")
        digest.update(canonical_json({"base": header.base.sha256, "adapter": adapter}).encode())
    for name, value in sorted(read_tensors(path, AVERAGED).items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(tensor_bytes(value))
    for part, prefix in ((f"{FILES}tokenizer", "tokenizer"), (GUIDE, GUIDE)):
        for name, value in sorted(read_tensors(path, part).items()):
            digest.update(f"{prefix}{name} {tuple(value.shape)}".encode())
            digest.update(tensor_bytes(value))
    return f"sha256:{digest.hexdigest()}"


def export(checkpoint: Path, path: Path, sampling: SamplingConfig | None = None) -> str:
    """Write the final model of a checkpoint to ``path``, with the guidance of ``sampling``; returns its SHA-256.

    The files that the model is based on are linked beside it. Raises UserError if the checkpoint is damaged.
    """
    verify_weights(checkpoint)
    tensors = {prefix + name: value for prefix in PARTS for name, value in read_tensors(checkpoint, prefix).items()}
    header = read_header(checkpoint)
    if sampling is not None:
        header["model_header"] |= sampling.model_dump(mode="json", include=GUIDANCE_OPTIONS)
    link_bases(checkpoint, path.parent)
    return save_tensors(path, tensors, header)


def locate_base(path: Path, base: Base) -> Path:
    """Find the file of the model that the one at ``path`` is based on; raises UserError if it is missing."""
    name = f"{base.sha256}.safetensors"
    file = next((candidate for folder in path.absolute().parents[:2] if (candidate := folder / name).is_file()), None)
    if file is None:
        base_name = base.version or f"the model with SHA-256 {base.sha256}"
        raise UserError(
            f"{path} holds what was changed in {base_name}, whose file is not there: put it beside it as {name}"
        )
    return file


def find_base(path: Path, base: Base) -> Path:
    """Find the file of the model that the one at ``path`` is based on; raises UserError if it is missing or damaged."""
    file = locate_base(path, base)
    stat = file.stat()
    if _sha256(file, stat.st_size, stat.st_mtime_ns) != base.sha256:
        raise UserError(f"{file} is damaged, as its SHA-256 is not that of its name: fetch it again")
    return file


@lru_cache(16)
def _sha256(path: Path, size: int, mtime: int) -> str:
    """SHA-256 of a file, which is computed again only after a change: a base may have gigabytes."""
    return sha256_file(path)


def link_base(file: Path, folder: Path) -> str:
    """Link the model ``file``, and those that it is based on, into ``folder`` by their SHA-256; returns its own."""
    stat = file.stat()
    digest = _sha256(file.absolute(), stat.st_size, stat.st_mtime_ns)
    if not (link := folder / f"{digest}.safetensors").exists():

        def write(partial: Path) -> None:
            try:
                os.link(file, partial)
            except OSError:  # on another disk
                shutil.copyfile(file, partial)

        write_atomically(link, write)
    link_bases(file, folder)
    return digest


def link_bases(file: Path, folder: Path) -> None:
    """Link the files that the model ``file`` is based on into ``folder``; raises UserError if they are missing."""
    if (base := read_model_header(file).base) is not None:
        link_base(find_base(file, base), folder)


def read_model_header(path: Path) -> ModelHeader:
    """Read the header of a model file; raises UserError as ``load_model`` does."""
    raw = read_header(path)
    try:
        return ModelHeader.model_validate(raw.get("model_header"))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "model_header"
        raise UserError(
            f"{path} has a header this version cannot read ({field}: {first['msg']}): use the version that wrote it"
        ) from error


def load_model(path: Path) -> Model:
    """Load the averaged network of a model or checkpoint, unpickling nothing; raises UserError for any other file.

    It also raises UserError for a file that is damaged, and for weights that are not finite.

    A fine-tuned model is loaded with the one that it is based on, into whose weights its adapter is merged.
    """
    header = read_model_header(path)
    if header.base is not None:
        verify_weights(path)
        return _load_on_base(path, header, load_model(find_base(path, header.base)))
    # The header is untrusted: no memory is allocated for it before the file is known to hold these tensors.
    mismatch = UserError(
        f"{path} was written by another version of the network, or is damaged: its tensors are not those that its "
        "header describes; load it with the code that its version ships"
    )
    if (names := match_tensors(header, read_shapes(path))) is None:
        raise mismatch
    verify_weights(path)
    with _SkipInitialization():
        modules = _modules(header)
    for prefix, module in modules.items():
        tensors = {
            names[prefix + name]: value for name, value in read_tensors(path, prefix).items() if prefix + name in names
        }
        try:
            # Not strict: tensors that are one in memory are one in files, too.
            module.load_state_dict(tensors, strict=False)
        except RuntimeError as error:  # torch's message is a page long; the cause is always the same
            raise mismatch from error
        use_channels_last(module.eval().requires_grad_(False))
    files = read_pipeline_files(path, header) if header.origin else {}
    model: Model = family_of(header.model).make_model(header, modules[AVERAGED], modules.get(AUTOENCODER))
    return replace(model.with_files(files), guide=modules.get(GUIDE))


def outline_model(path: Path) -> Model:
    """Build the model of a file on the meta device, without reading weights; that of a fine-tuned model is its base's.

    Raises UserError for a file that is not a model, or whose base is missing.
    """
    header = read_model_header(path)
    if header.base is not None:
        base = outline_model(locate_base(path, header.base))
        return replace(base, header=header, guide=None).with_size(None)
    with torch.device("meta"), _SkipInitialization():
        modules = _modules(header)
    for module in modules.values():
        use_channels_last(module.eval().requires_grad_(False))
    files = read_pipeline_files(path, header) if header.origin else {}
    model: Model = family_of(header.model).make_model(header, modules[AVERAGED], modules.get(AUTOENCODER))
    return replace(model.with_files(files), guide=modules.get(GUIDE))


def _load_on_base(path: Path, header: ModelHeader, base: Model) -> Model:
    """Change the weights of ``base`` as the file at ``path`` says."""
    classes = classes_of(header.model, header.class_histogram)
    try:
        if header.latents != base.header.latents:
            raise ValueError
        if header.square != base.header.square and not base.header.takes_other_sizes(header.square):
            raise ValueError
        # Training may use some of the classes of a pipeline.
        model = base.select_classes(classes) if set(classes) <= set(base.classes) else base
        if model.config != header.model or (model is base and classes != base.classes):
            raise ValueError
        base.round_base(header.adapter)
        weights = base.tuned_weights(header.adapter, read_tensors(path, AVERAGED))
    except ValueError as error:
        raise UserError(
            f"{path} does not fit the model that it names as its base: load it with the code that its version ships"
        ) from error
    model.network.load_state_dict(weights, strict=False)
    # The guide of the base knows nothing of what was trained.
    return replace(model, header=header, guide=None).with_size(None)


def read_shapes(path: Path) -> dict[str, list[int]]:
    """Read the names and shapes of a model's tensors from the head of its file."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(PARTS)]  # noqa: SIM118 (no mapping)
        return {name: file.get_slice(name).get_shape() for name in names}


def match_tensors(header: ModelHeader, shapes: Mapping[str, list[int]]) -> dict[str, str] | None:
    """Find the tensor of its module that each tensor of a file loads into; None if they are not those of ``header``.

    ``shapes`` are those of all tensors in the file. Modules are built without memory.
    """
    with torch.device("meta"), _SkipInitialization():
        modules = _modules(header)
    if header.model.image_shape not in (None, header.square):
        return None
    names: dict[str, str] = {}
    others = set(shapes)
    for prefix, module in modules.items():
        file_shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        targets = family_of(header.model).tensor_names(module, file_shapes)
        state = module.state_dict(keep_vars=True)
        target_ids = {id(state[target]) for target in targets.values() if target in state}
        for name, target in targets.items():
            if target not in state or list(state[target].shape) != file_shapes[name]:
                return None
        if len(set(targets.values())) < len(targets) or any(id(tensor) not in target_ids for tensor in state.values()):
            return None
        names |= {prefix + name: target for name, target in targets.items()}
        others -= {prefix + name for name in file_shapes}
    pipeline_prefixes = (CARRIED, FILES) if header.origin else ()
    return names if all(name.startswith(pipeline_prefixes) for name in others) else None


def read_pipeline_files(path: Path, header: ModelHeader) -> dict[str, bytes]:
    """Read the files of an imported pipeline that are no weights, by path; raises UserError if one is damaged."""
    shapes = {name: shape for name, shape in read_shapes(path).items() if name.startswith(FILES)}
    if sum(math.prod(shape) for shape in shapes.values()) > MAX_FILES_BYTES:
        raise UserError(f"{path} has over {MAX_FILES_BYTES} bytes of files besides weights: import the pipeline again")
    files = {name: value.to(torch.uint8).numpy().tobytes() for name, value in read_tensors(path, FILES).items()}
    digests = {} if header.origin is None else header.origin.files
    for name, content in files.items():
        is_head = name.endswith(".safetensors") and name in digests
        if not is_head and digests.get(name) != sha256_bytes(content):
            raise UserError(f"{path} has another {name} than its header says: import the pipeline again")
    return files


class _SkipInitialization(TorchFunctionMode):
    """Skip random initial weights, all of which are replaced, and on meta tensors take torch seconds of imports."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "uniform_", "trunc_normal_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _modules(header: ModelHeader) -> dict[str, Any]:
    """Build the network of ``header``, its guide and its autoencoder if any, with random weights, by their prefixes."""
    inner = header.latents.shape if header.latents else header.square
    classes = classes_of(header.model, header.class_histogram)
    networks = (AVERAGED,) if header.guide_images is None else (AVERAGED, GUIDE)
    modules = {prefix: family_of(header.model).make_network(header.model, inner, len(classes)) for prefix in networks}
    return modules | ({AUTOENCODER: Latents(header.latents, header.channels)} if header.latents else {})
