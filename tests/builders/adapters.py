"""Imported pipelines with low-rank matrices on top, whose weights are random by seed instead of trained."""

from pathlib import Path
from typing import Any

import torch

from diffusion.checkpoints import AVERAGED, link_base, load_model, read_model_header, save_tensors
from diffusion.families.header import Base
from diffusion.families.lora import LoRAConfig


def write_adapter(path: Path, base: Path, std: float = 0.25, version: str | None = None, **lora: Any) -> Path:
    """Matrices of standard deviation ``std`` for the pipeline in the file ``base``, which is linked beside them."""
    config = LoRAConfig.model_validate({"rank": 2, "alpha": 3} | lora)
    generator = torch.Generator().manual_seed(0)
    trained = load_model(base).make_trainable(config).state_dict()
    tensors = {AVERAGED + name: torch.randn(each.shape, generator=generator) * std for name, each in trained.items()}
    fields = {
        "base": Base(sha256=link_base(base, path.parent), version=version),
        "lora": config,
        "dataset": "circles",
        "images": 5,
        "origin": None,
    }
    header = read_model_header(base).model_copy(update=fields)
    save_tensors(path, tensors, {"model_header": header.model_dump(mode="json")})
    return path
