"""Tiny pipelines of every supported kind, written by diffusers itself, with random weights by a fixed seed.

Each maker writes a folder as ``save_pretrained`` does, with a model card that names a licence, and returns it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTokenizer, T5Config

WORDS = ("red", "blue", "green", "circle", "square", "a", "on", "the", "grey", "photo")
"""Words that the tokenizers have as one token each."""
CARD = "---\nlicense: openrail\ntags:\n- text-to-image\n---\n\n# A tiny pipeline with random weights\n"
BLOCKS = {"norm_num_groups": 4, "layers_per_block": 1}
VP = {"num_train_timesteps": 100}


def randomize(module: torch.nn.Module, std: float = 0.2) -> torch.nn.Module:
    """Give all weights a distribution in which each has an effect, modulations that begin as zeros too."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module


def write_pipeline(folder: Path, pipeline: Any, **options: Any) -> Path:
    """Write ``pipeline`` and a model card; ``options`` are those of ``save_pretrained``."""
    pipeline.save_pretrained(folder, **options)
    (folder / "README.md").write_text(CARD)
    return folder


def unet_2d(channels: int = 3, size: int = 16, **options: Any) -> diffusers.UNet2DModel:
    return diffusers.UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        **BLOCKS,
        **options,
    )


def autoencoder(channels: int = 4, **options: Any) -> diffusers.AutoencoderKL:
    """Downsamples by 2."""
    return diffusers.AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
        **BLOCKS,
        **options,
    )


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer of bytes and a few whole words, for 16 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = letters + [f"{letter}</w>" for letter in letters]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            if (pair := f"{parts[0]} {parts[1]}") not in merges:
                merges.append(pair)
                vocabulary.append(parts[0] + parts[1])
            parts = [parts[0] + parts[1], *parts[2:]]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    numbers = {token: number for number, token in enumerate(dict.fromkeys(vocabulary))}
    (folder / "vocab.json").write_text(json.dumps(numbers))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16, local_files_only=True)


def clip_config(tokenizer: CLIPTokenizer, width: int = 16) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS] + [(letter, -5.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    kind: Any = transformers.PreTrainedTokenizerFast
    if hasattr(transformers, "T5TokenizerFast"):
        kind = transformers.T5TokenizerFast
    return kind(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", extra_ids=0)


def ddpm(folder: Path, **scheduler: Any) -> Path:
    torch.manual_seed(0)
    return write_pipeline(folder, diffusers.DDPMPipeline(unet_2d(), diffusers.DDPMScheduler(**VP | scheduler)))


def ddim(folder: Path, **scheduler: Any) -> Path:
    torch.manual_seed(1)
    return write_pipeline(folder, diffusers.DDIMPipeline(unet_2d(1), diffusers.DDIMScheduler(**VP | scheduler)))


def class_conditional(folder: Path, classes: int = 3, **scheduler: Any) -> Path:
    torch.manual_seed(2)
    unet = unet_2d(num_class_embeds=classes)
    return write_pipeline(folder, diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(**VP | scheduler)))


def latent(folder: Path, **scheduler: Any) -> Path:
    torch.manual_seed(3)
    vqvae = diffusers.VQModel(
        latent_channels=3,
        num_vq_embeddings=16,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **BLOCKS,
    )
    scheduled = diffusers.DDIMScheduler(**VP | {"beta_schedule": "scaled_linear", "clip_sample": False} | scheduler)
    return write_pipeline(folder, diffusers.LDMPipeline(vqvae, unet_2d(3, 8), scheduled))


def dit(folder: Path, **scheduler: Any) -> Path:
    torch.manual_seed(4)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    )
    scheduled = diffusers.DDIMScheduler(**VP | {"clip_sample": False} | scheduler)
    write_pipeline(folder, diffusers.DiTPipeline(randomize(transformer, std=0.1), autoencoder(), scheduled))
    index = json.loads((folder / "model_index.json").read_text())  # as in the published one, but not by the library
    index["id2label"] = {"0": "tench, Tinca tinca", "1": "goldfish", "2": "ape"}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def stable_diffusion(folder: Path, variant: str | None = None, dtype: Any = torch.float32, **scheduler: Any) -> Path:
    """Stable Diffusion's architecture, with PNDM as its first versions have it; 32 tokens wide, 16 pixels high."""
    torch.manual_seed(5)
    tokenizer = clip_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        **BLOCKS,
    )
    scheduler_options = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "skip_prk_steps": True,
    }
    scheduled = scheduler.pop("scheduler", None) or diffusers.PNDMScheduler(
        **VP | scheduler_options | {"steps_offset": 1, "set_alpha_to_one": False} | scheduler
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=transformers.CLIPTextModel(clip_config(tokenizer)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduled,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return write_pipeline(folder, pipeline.to(dtype), variant=variant)


def stable_diffusion_3(folder: Path, t5: bool = True, **scheduler: Any) -> Path:
    torch.manual_seed(6)
    tokenizer = clip_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
    )
    third: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}
    if t5:
        config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        third = {"text_encoder_3": transformers.T5EncoderModel(config), "tokenizer_3": t5_tokenizer()}
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=randomize(transformer, std=0.1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **scheduler),
        vae=autoencoder(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=transformers.CLIPTextModelWithProjection(clip_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=transformers.CLIPTextModelWithProjection(clip_config(tokenizer)),
        tokenizer_2=tokenizer,
        **third,
    )
    return write_pipeline(folder, pipeline)


MAKERS: Mapping[str, Callable[..., Path]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "class_conditional": class_conditional,
    "latent": latent,
    "dit": dit,
    "stable_diffusion": stable_diffusion,
    "stable_diffusion_3": stable_diffusion_3,
}
"""Maker of each supported kind of pipeline."""
