"""Headers of model files, read without torch, which takes seconds to import."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from diffusion.common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

METADATA_KEY = "darkroom"
HEADER = TypeAdapter(dict[str, Any])
"""Parser of the header, which is stored under a single metadata key: safetensors writes several in random order."""
MAX_HEADER_BYTES = 16 * 2**20
"""Largest accepted size of a safetensors header, with names and shapes of all tensors, in bytes."""


def read_header(path: Path) -> dict[str, Any]:
    """Read the header of a file that ``diffusion.checkpoints`` wrote; raises UserError for any other file."""
    fix = "give the final.safetensors of a run, or import a diffusers pipeline as a folder by `darkroom model import`"
    try:
        with path.open("rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise UserError(f"{path} is not a model, as it is not a safetensors file: {fix}")
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        return HEADER.validate_json(metadata[METADATA_KEY])
    except FileNotFoundError as error:
        raise UserError(
            f"no model at {path}: check the path, train one with `darkroom train`, or import one with `darkroom model "
            "import`"
        ) from error
    except IsADirectoryError as error:
        raise UserError(
            f"{path} is a folder: give a model file; `darkroom model import {path} --out FILE.safetensors` writes one "
            "of a diffusers pipeline"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): give the file of a model") from error
    except SafetensorError as error:
        raise UserError(f"{path} is not a model, or is damaged ({error}): {fix}") from error
    except (KeyError, ValidationError) as error:
        raise UserError(f"{path} has tensors of something else than a model of Darkroom: {fix}") from error


def tensor_bytes(value: "Tensor") -> memoryview:
    """Return the bytes of a tensor of any type on the CPU, of which NumPy has no bfloat16."""
    import torch

    return value.contiguous().reshape(-1).view(torch.uint8).numpy().data
