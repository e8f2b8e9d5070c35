"""Model files small enough for tests of what is done with a model."""

from pathlib import Path

import torch

from diffusion.checkpoints import AVERAGED, GUIDE, link_base, load_model, read_model_header, save_tensors
from diffusion.families.adapters import LoRAConfig
from diffusion.families.config import ModelConfig
from diffusion.families.ddpm.network import UNet
from diffusion.families.header import Base, ModelHeader

CONFIG = ModelConfig(width=16, channel_mult=(1,), blocks=1, attention=(), heads=1, patch=2)


def header(config: ModelConfig = CONFIG, channels: int = 1, size: int = 8, images: int = 0) -> ModelHeader:
    return ModelHeader.model_validate(
        {
            "model": config.resolve(size),
            "channels": channels,
            "size": size,
            "dataset": "blobs",
            "content_digest": "0" * 64,
            "class_histogram": {},
            "images": images,
            "training": {},
        }
    )


def write_model(
    path: Path,
    seed: int,
    images: int,
    channels: int = 1,
    size: int = 8,
    config: ModelConfig = CONFIG,
    classes: dict[str, int] | None = None,
    training: dict[str, object] | None = None,
    guide: int | None = None,
) -> Path:
    """A model that was never trained: every weight is random, by seed; of its guide by the seed ``guide``."""
    tensors: dict[str, torch.Tensor] = {}
    for prefix, each in ((AVERAGED, seed), (GUIDE, guide)):
        if each is None:
            continue
        network = UNet(config, channels, size, len(classes or {}))
        generator = torch.Generator().manual_seed(each)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        tensors |= {prefix + name: value for name, value in network.state_dict().items()}
    about = header(config, channels=channels, size=size, images=images).model_copy(
        update={
            "class_histogram": classes or {},
            "training": training or {},
            "guide_images": None if guide is None else images // 4,
        }
    )
    save_tensors(path, tensors, {"model_header": about.model_dump(mode="json")})
    return path


def write_lora(path: Path, base: Path, seed: int, rank: int = 2) -> Path:
    """Low-rank matrices for the model in the file ``base``, random by seed, and a link to it beside them."""
    lora = LoRAConfig(rank=rank, alpha=4)
    generator = torch.Generator().manual_seed(seed)
    trained = load_model(base).make_trainable(lora).state_dict()
    tensors = {AVERAGED + name: torch.randn(each.shape, generator=generator) / 10 for name, each in trained.items()}
    about = read_model_header(base).model_copy(
        update={"base": Base(sha256=link_base(base, path.parent)), "adapter": lora, "images": 5}
    )
    save_tensors(path, tensors, {"model_header": about.model_dump(mode="json")})
    return path
