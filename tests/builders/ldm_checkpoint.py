"""Single-file checkpoints of Stable Diffusion 1 and XL under the names of the code that they came from.

The names are those of CompVis' modules, of which Stability AI, A1111 and ComfyUI load files.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
OPEN_CLIP = {
    "encoder.layers": "transformer.resblocks",
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_ln_.": "ln_final.",
    "final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def write_checkpoint(path: Path, pipe: Any) -> Path:
    """Write the weights of ``pipe``, a StableDiffusionPipeline, as one file."""
    tensors = _denoiser_and_autoencoder(pipe, {"0": 1})
    for name, value in pipe.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    tensors["alphas_cumprod"] = torch.linspace(1, 0, 10)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


def write_checkpoint_xl(path: Path, pipe: Any) -> Path:
    """Write the weights of ``pipe``, a StableDiffusionXLPipeline, as one file."""
    tensors = _denoiser_and_autoencoder(pipe, {"0": 2})
    for name, value in pipe.text_encoder.state_dict().items():
        tensors[f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    second = {name.removeprefix("text_model."): value for name, value in pipe.text_encoder_2.state_dict().items()}
    for name, value in second.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            parts = [second[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            new_name, tensor = name.replace("self_attn.q_proj.", "attn.in_proj_"), torch.cat(parts)
        else:
            new_name, tensor = name.replace("self_attn.", "attn."), value
        for new, old in OPEN_CLIP.items():
            new_name = new_name.replace(new, old)
        is_projection = name == "text_projection.weight"
        tensors[f"conditioner.embedders.1.model.{new_name}"] = tensor.T if is_projection else tensor
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


def _denoiser_and_autoencoder(pipe: Any, upsampler_places: Mapping[str, int]) -> dict[str, torch.Tensor]:
    layers, levels = pipe.unet.config["layers_per_block"], len(pipe.vae.config["block_out_channels"])
    tensors = {
        f"model.diffusion_model.{unet_name(name, layers, upsampler_places)}": value
        for name, value in pipe.unet.state_dict().items()
    }
    for name, value in pipe.vae.state_dict().items():
        is_attention = ".attentions." in name and value.ndim == 2
        # Attention is convolutions of one pixel there.
        tensors[f"first_stage_model.{vae_name(name, levels)}"] = value[:, :, None, None] if is_attention else value
    return tensors


def unet_name(name: str, layers: int, upsampler_places: Mapping[str, int]) -> str:
    """Name a tensor of the U-Net; an upsampler is after the attention of its block, if it has any."""
    for new, old in ENDS.items():
        if name.startswith(f"{new}."):
            return name.replace(new, old, 1)
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        kind, number, rest = match.groups()
        return f"middle_block.{2 * int(number) if kind == 'resnets' else 1}.{_inner(kind, rest)}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name)
    assert match, name
    way, block, kind, number, rest = match.groups()
    if kind == "downsamplers":
        return f"input_blocks.{(int(block) + 1) * (layers + 1)}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{(int(block) + 1) * (layers + 1) - 1}.{upsampler_places[block]}.{rest}"
    place = int(block) * (layers + 1) + int(number) + (way == "down")
    return f"{'in' if way == 'down' else 'out'}put_blocks.{place}.{int(kind == 'attentions')}.{_inner(kind, rest)}"


def _inner(kind: str, rest: str) -> str:
    if kind == "resnets":
        first, _, end = rest.partition(".")
        return f"{RESNET[first]}.{end}"
    return rest


def vae_name(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        for new, old in ATTENTION.items():
            name = name.replace(f".{new}.", f".{old}.")
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda match: f"up.{levels - 1 - int(match[1])}.block", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda match: f"up.{levels - 1 - int(match[1])}.upsample", name)
