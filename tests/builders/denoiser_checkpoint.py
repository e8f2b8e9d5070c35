"""Files of denoisers alone, as their authors publish them: written from a tiny pipeline, by the authors' names."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

PREFIX = "model.diffusion_model."
"""What other tools put before all names."""


def _fused(weights: Mapping[str, Tensor], names: tuple[str, ...], kind: str) -> Tensor:
    return torch.cat([weights[f"{name}.{kind}"] for name in names])


def z_image(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of Z-Image's transformer."""
    file: dict[str, Tensor] = {}
    for name, value in weights.items():
        new = name.replace("all_final_layer.2-1.", "final_layer.").replace("all_x_embedder.2-1.", "x_embedder.")
        new = re.sub(r"attention\.norm_([qk])\.", r"attention.\1_norm.", new.replace("to_out.0.", "out."))
        if match := re.fullmatch(r"(.*attention)\.to_([qkv])\.weight", name):
            if match[2] == "q":
                file[f"{match[1]}.qkv.weight"] = _fused(
                    weights, tuple(f"{match[1]}.to_{part}" for part in "qkv"), "weight"
                )
            continue
        file[new] = value
    return file


def qwen_image(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep the names of Qwen-Image's transformer, which its authors published as diffusers has them."""
    return dict(weights)


DENOISERS: Mapping[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {
    "z_image": z_image,
    "qwen_image": qwen_image,
}


def write_denoiser(path: Path, kind: str, weights: Mapping[str, Tensor]) -> Path:
    """Write the denoiser of a pipeline of this kind as one file."""
    tensors = {f"{PREFIX}{name}": value.contiguous().clone() for name, value in DENOISERS[kind](weights).items()}
    save_file(tensors, path)
    return path
