"""Models and checkpoints as safetensors files: written atomically, read without unpickling anything."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffusion.common.errors import UserError
from diffusion.common.files import canonical_json, write_atomically
from diffusion.common.model_files import METADATA_KEY, read_header
from diffusion.families import family_of
from diffusion.families.model import Model, ModelHeader
from diffusion.models.config import classes_of
from diffusion.models.vae import Latents
from diffusion.process.samplers import SamplingConfig

AVERAGED = "ema."
"""Prefix of the averaged weights' names in checkpoints and in final models."""
AUTOENCODER = "autoencoder."
"""Prefix of the weights of a latent diffusion model's autoencoder and of its latents' moments."""
PARTS = (AVERAGED, AUTOENCODER)
"""Prefixes of a final model's tensors."""


def save_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    """Write a safetensors file atomically with ``header`` in its metadata; returns the file's SHA-256."""
    metadata = {METADATA_KEY: canonical_json(header)}
    packed = {name: value.detach().contiguous() for name, value in tensors.items()}
    try:
        return write_atomically(path, lambda partial: save_file(packed, partial, metadata))
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


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
            digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def export(checkpoint: Path, path: Path, sampling: SamplingConfig | None = None) -> str:
    """Write the final model of a checkpoint to ``path``, with the guidance of ``sampling``; returns its SHA-256."""
    tensors = {prefix + name: value for prefix in PARTS for name, value in read_tensors(checkpoint, prefix).items()}
    header = read_header(checkpoint)
    if sampling is not None:
        header["model_header"] |= sampling.model_dump(mode="json", include={"guidance", "guidance_interval"})
    return save_tensors(path, tensors, header)


def read_model_header(path: Path) -> ModelHeader:
    """Read the header of a model file; raises UserError as ``load_model`` does."""
    raw = read_header(path)
    try:
        return ModelHeader.model_validate(raw.get("model_header"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "model_header"
        raise UserError(
            f"{path} has a header this version cannot read ({where}: {first['msg']}): use the version that wrote it"
        ) from error


def load_model(path: Path) -> Model:
    """Load the averaged network of a model or checkpoint, unpickling nothing; raises UserError for any other file."""
    header = read_model_header(path)
    # The header is untrusted: no memory is allocated for it before the file is known to hold these tensors.
    with torch.device("meta"), _SkipInitialization():
        expected = {
            prefix + name: list(tensor.shape)
            for prefix, module in _modules(header).items()
            for name, tensor in module.state_dict().items()
        }
    mismatch = UserError(
        f"{path} was written by another version of the network, or is damaged: its tensors are not those that its "
        "header describes; load it with the code that its version ships"
    )
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(PARTS)]  # noqa: SIM118 (no mapping)
        if {name: file.get_slice(name).get_shape() for name in names} != expected:
            raise mismatch
    modules = _modules(header)
    for prefix, module in modules.items():
        try:
            module.load_state_dict(read_tensors(path, prefix))
        except RuntimeError as error:  # torch's message is a page long; the cause is always the same
            raise mismatch from error
        module.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    model: Model = family_of(header.model).make_model(header, modules[AVERAGED], modules.get(AUTOENCODER))
    return model


class _SkipInitialization(TorchFunctionMode):
    """Skip ``normal_``, for which torch imports code for seconds if the tensor is a meta tensor."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ == "normal_":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _modules(header: ModelHeader) -> dict[str, Any]:
    """Build the network of ``header``, and its autoencoder if there is one, with random weights, by their prefixes."""
    shape = header.channels, header.size, header.size
    inner = header.latents.shape if header.latents else shape
    classes = classes_of(header.model, header.class_histogram)
    modules = {AVERAGED: family_of(header.model).make_network(header.model, inner, len(classes))}
    return modules | ({AUTOENCODER: Latents(header.latents, shape)} if header.latents else {})
