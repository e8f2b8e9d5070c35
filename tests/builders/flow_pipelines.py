"""Tiny pipelines of today's large ones, written by diffusers itself, with random weights by a fixed seed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from tests.builders.pipelines import (
    WORDS,
    autoencoder,
    clip_config,
    clip_tokenizer,
    randomize,
    t5_tokenizer,
    write_pipeline,
)

CHAT = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
"""What the template of Qwen3 comes to for a message of a user."""


MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


def qwen_tokenizer() -> Any:
    """Bytes, as those of Qwen, with the marks of a chat."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġ{word}" for word in WORDS]
    tokens = [*letters, *MARKS, "Ġ"]
    merges = []
    for word in words:
        parts = list(word)
        while len(parts) > 1:
            if (pair := (parts[0], parts[1])) not in merges:
                merges.append(pair)
                tokens.append(parts[0] + parts[1])
            parts = [parts[0] + parts[1], *parts[2:]]
    numbers = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(numbers, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    kind: Any = transformers.Qwen2TokenizerFast
    made = kind(tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", unk_token=None)
    made.chat_template = CHAT
    return made


def qwen3_config(tokenizer: Any, layers: int, **options: Any) -> Any:
    return transformers.Qwen3Config(
        vocab_size=len(tokenizer) + 8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=40960,
        rope_theta=1000000,
        **options,
    )


def stable_diffusion_xl(folder: Path, zeros: bool = True, **scheduler: Any) -> Path:
    torch.manual_seed(7)
    tokenizer = clip_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16 + 32,
        attention_head_dim=(2, 2),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 32,
        norm_num_groups=4,
        layers_per_block=1,
    )
    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025),
        text_encoder=transformers.CLIPTextModel(clip_config(tokenizer)),
        text_encoder_2=transformers.CLIPTextModelWithProjection(clip_config(tokenizer, 32)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**options | scheduler),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )
    return write_pipeline(folder, pipeline)


def flux(folder: Path, dev: bool = True) -> Path:
    torch.manual_seed(8)
    tokenizer = clip_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=dev,
        axes_dims_rope=(4, 6, 6),
    )
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    pipeline = diffusers.FluxPipeline(
        transformer=randomize(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev),
        vae=autoencoder(shift_factor=0.1159, scaling_factor=0.3611),
        text_encoder=transformers.CLIPTextModel(clip_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=transformers.T5EncoderModel(config),
        tokenizer_2=t5_tokenizer(),
    )
    return write_pipeline(folder, pipeline)


def flux_2_parts(**guidance: bool) -> dict[str, Any]:
    """Transformer, scheduler and autoencoder of both kinds of FLUX.2."""
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        **guidance,
    )
    vae = diffusers.AutoencoderKLFlux2(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"transformer": randomize(transformer), "scheduler": scheduler, "vae": vae}


def flux_2_klein(folder: Path, distilled: bool = False) -> Path:
    torch.manual_seed(9)
    tokenizer, parts = qwen_tokenizer(), flux_2_parts(guidance_embeds=False)
    pipeline = diffusers.Flux2KleinPipeline(
        **parts,
        text_encoder=transformers.Qwen3ForCausalLM(qwen3_config(tokenizer, 28, tie_word_embeddings=True)),
        tokenizer=tokenizer,
        is_distilled=distilled,
    )
    return write_pipeline(folder, pipeline)


MISTRAL_CHAT = (
    "{{- bos_token }}{%- for message in messages %}{%- set text = message.content[0].text %}"
    "{%- if message.role == 'system' %}{{- '[SYSTEM_PROMPT]' + text + '[/SYSTEM_PROMPT]' }}"
    "{%- else %}{{- '[INST]' + text + '[/INST]' }}{%- endif %}{%- endfor %}"
)
"""What the template of Mistral Small comes to for messages of a system and a user, of texts alone."""
MISTRAL_MARKS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "<pad>")


def pixtral_processor() -> Any:
    """Bytes, with the marks of a chat, and what prepares images."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    numbers = {token: number for number, token in enumerate([*MISTRAL_MARKS, *letters])}
    tokenizer = Tokenizer(models.BPE(numbers, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MISTRAL_MARKS])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    kind: Any = transformers.PreTrainedTokenizerFast
    made = kind(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    made.padding_side = "left"
    return transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessor(),
        tokenizer=made,
        chat_template=MISTRAL_CHAT,
        image_break_token="[IMG]",
        image_end_token="[IMG]",
    )


def flux_2(folder: Path) -> Path:
    torch.manual_seed(14)
    processor, parts = pixtral_processor(), flux_2_parts()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 8}
    text = {
        **sizes,
        "model_type": "mistral",
        "vocab_size": len(processor.tokenizer) + 8,
        "num_hidden_layers": 30,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
    }
    vision = {**sizes, "model_type": "pixtral", "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=7)
    pipeline = diffusers.Flux2Pipeline(
        **parts,
        text_encoder=transformers.Mistral3ForConditionalGeneration(config),
        tokenizer=processor,
    )
    return write_pipeline(folder, pipeline)


def z_image(folder: Path, dynamic: bool = False) -> Path:
    torch.manual_seed(10)
    tokenizer = qwen_tokenizer()
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    pipeline = diffusers.ZImagePipeline(
        transformer=randomize(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic),
        vae=autoencoder(shift_factor=0.1159, scaling_factor=0.3611),
        text_encoder=transformers.Qwen3Model(qwen3_config(tokenizer, 3)),
        tokenizer=tokenizer,
    )
    return write_pipeline(folder, pipeline)


def qwen_image(folder: Path) -> Path:
    torch.manual_seed(11)
    tokenizer = qwen_tokenizer()
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.7, 0.2, 0.1, 0.4],
        latents_std=[2.8, 1.4, 2.3, 1.1],
    )
    text = {
        "vocab_size": len(tokenizer) + 8,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"},
        "rope_theta": 1000000.0,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    pipeline = diffusers.QwenImagePipeline(
        transformer=randomize(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=vae,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
    )
    return write_pipeline(folder, pipeline)


def pixart_sigma(folder: Path) -> Path:
    torch.manual_seed(12)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=16,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=32,
        norm_num_groups=4,
    )
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    pipeline = diffusers.PixArtSigmaPipeline(
        transformer=randomize(transformer),
        scheduler=diffusers.DPMSolverMultistepScheduler(num_train_timesteps=1000),
        vae=autoencoder(scaling_factor=0.13025),
        text_encoder=transformers.T5EncoderModel(config),
        tokenizer=t5_tokenizer(),
    )
    return write_pipeline(folder, pipeline)


def gemma_tokenizer() -> Any:
    """Letters and a few whole words, after the mark of a beginning."""
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    pieces = [*special, "▁", *map(chr, range(33, 127))]
    merges = []
    for word in (f"▁{word}" for word in WORDS):
        parts = list(word)
        while len(parts) > 1:
            if (pair := (parts[0], parts[1])) not in merges:
                merges.append(pair)
                pieces.append(parts[0] + parts[1])
            parts = [parts[0] + parts[1], *parts[2:]]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return transformers.GemmaTokenizer(vocab=vocabulary, merges=merges)


def sana(folder: Path, euler: bool = False) -> Path:
    torch.manual_seed(13)
    tokenizer = gemma_tokenizer()
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
        timestep_scale=1.0,
    )
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        scaling_factor=0.41407,
    )
    config = transformers.Gemma2Config(
        vocab_size=len(tokenizer) + 4,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    pipeline = diffusers.SanaPipeline(
        transformer=randomize(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        if euler
        else diffusers.DPMSolverMultistepScheduler(**flow),
        vae=vae,
        text_encoder=transformers.Gemma2Model(config),
        tokenizer=tokenizer,
    )
    return write_pipeline(folder, pipeline)


FLOW_MAKERS: Mapping[str, Callable[..., Path]] = {
    "stable_diffusion_xl": stable_diffusion_xl,
    "flux": flux,
    "flux_2_klein": flux_2_klein,
    "z_image": z_image,
    "qwen_image": qwen_image,
    "pixart_sigma": pixart_sigma,
    "sana": sana,
    "flux_2": flux_2,
}
"""Maker of each kind."""
