"""Imported pipelines with adapters on top, whose weights are random by seed instead of trained."""

from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from diffusion.checkpoints import AVERAGED, link_base, load_model, read_model_header, save_tensors
from diffusion.families.adapters import AdapterConfig
from diffusion.families.header import Base

_ADAPTER: TypeAdapter[AdapterConfig] = TypeAdapter(AdapterConfig)


def write_adapter(path: Path, base: Path, std: float = 0.25, version: str | None = None, **adapter: Any) -> Path:
    """Tensors of standard deviation ``std`` for the pipeline in the file ``base``, which is linked beside them."""
    config = _ADAPTER.validate_python(({} if "kind" in adapter else {"rank": 2, "alpha": 3}) | adapter)
    generator = torch.Generator().manual_seed(0)
    trained = load_model(base).make_trainable(config).state_dict()
    tensors = {AVERAGED + name: torch.randn(each.shape, generator=generator) * std for name, each in trained.items()}
    fields = {
        "base": Base(sha256=link_base(base, path.parent), version=version),
        "adapter": config,
        "dataset": "circles",
        "images": 5,
        "origin": None,
    }
    header = read_model_header(base).model_copy(update=fields)
    save_tensors(path, tensors, {"model_header": header.model_dump(mode="json")})
    return path
