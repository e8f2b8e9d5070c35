"""Safetensors files of other tools, read within limits: LoRAs and single-file checkpoints."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffusion.common.errors import UserError
from diffusion.common.model_files import MAX_HEADER_BYTES, METADATA_KEY

TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)
"""Types of tensors that are read; others belong to quantized weights."""
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
PICKLE_STARTS = (b"PK\x03\x04", b"\x80")
"""First bytes of what ``torch.save`` writes, now and before its version 1.6."""


class SafetensorsFile:
    """Tensors of a safetensors file by name, which stay on disk until they are read."""

    def __init__(self, path: Path) -> None:
        """Read the head of the file; raises UserError for pickles, other files, and types that are not supported."""
        self.path = path
        try:
            with path.open("rb") as raw:
                start = raw.read(8)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): check the path") from error
        # The first eight bytes are the length of the header, which no pickle has so small.
        is_safetensors = int.from_bytes(start, "little") <= MAX_HEADER_BYTES
        if path.suffix.lower() in PICKLE_SUFFIXES or (not is_safetensors and start.startswith(PICKLE_STARTS)):
            raise UserError(f"{path} is a pickle, which can run code: use its .safetensors, or ask its author for one")
        if not is_safetensors:
            raise UserError(f"{path} is not a safetensors file, or names too many tensors: use another file")
        try:
            with safe_open(path, framework="pt") as file:
                self.metadata: dict[str, str] = file.metadata() or {}
                self.names: list[str] = sorted(file.keys())
        except SafetensorError as error:
            raise UserError(f"{path} is damaged, or not a safetensors file ({error}): fetch it again") from error

    @property
    def is_model_file(self) -> bool:
        """Whether Darkroom wrote it."""
        return METADATA_KEY in self.metadata

    @cached_property
    def is_adapter(self) -> bool:
        """Whether it holds an adapter instead of all weights of a model."""
        parts = ("lora", "hada_", "lokr_", "oft_")
        return any(name.endswith(".alpha") or part in name for name in self.names for part in parts)

    def read(self, name: str) -> Tensor:
        """Read one tensor; raises UserError for a type that is not supported."""
        file: Any
        with safe_open(self.path, framework="pt") as file:
            value: Tensor = file.get_tensor(name)
        if value.dtype not in TYPES:
            raise UserError(
                f"{name} in {self.path} is of the type {value.dtype}, and quantized weights are not supported"
            )
        return value
