"""Configurations of published pipelines, as their ``config.json`` have them, as far as they differ from defaults."""

from typing import Any

CLIP_L: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
}
CLIP_G = CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
QWEN3_4B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
}
QWEN_VL_7B: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128000,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": False,
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}

GEMMA_2B: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}
MISTRAL_SMALL_24B: dict[str, Any] = {
    "text_config": {
        "model_type": "mistral",
        "vocab_size": 131072,
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000000.0,
        "rms_norm_eps": 1e-05,
    },
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "head_dim": 64,
        "image_size": 1540,
        "patch_size": 14,
        "rope_theta": 10000.0,
    },
    "tie_word_embeddings": False,
    "image_token_index": 10,
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "vision_feature_layer": -1,
}


def autoencoder(channels: int, **options: Any) -> dict[str, Any]:
    return {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": channels,
        **options,
    }


FLUX_VAE = autoencoder(16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159)
FLOW = ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True})
PUBLISHED: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "StableDiffusionXLPipeline": {
        "unet": (
            "UNet2DConditionModel",
            {
                "sample_size": 128,
                "in_channels": 4,
                "out_channels": 4,
                "block_out_channels": [320, 640, 1280],
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                "transformer_layers_per_block": [1, 2, 10],
                "attention_head_dim": [5, 10, 20],
                "cross_attention_dim": 2048,
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
        ),
        "vae": ("AutoencoderKL", autoencoder(4, scaling_factor=0.13025)),
        "text_encoder": ("CLIPTextModel", CLIP_L),
        "tokenizer": ("CLIPTokenizer", {}),
        "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
        "tokenizer_2": ("CLIPTokenizer", {}),
        "scheduler": ("EulerDiscreteScheduler", {}),
    },
    "FluxPipeline": {
        "transformer": (
            "FluxTransformer2DModel",
            {
                "in_channels": 64,
                "num_layers": 19,
                "num_single_layers": 38,
                "attention_head_dim": 128,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "pooled_projection_dim": 768,
                "guidance_embeds": True,
            },
        ),
        "vae": ("AutoencoderKL", FLUX_VAE),
        "text_encoder": ("CLIPTextModel", CLIP_L),
        "tokenizer": ("CLIPTokenizer", {}),
        "text_encoder_2": ("T5EncoderModel", T5_XXL),
        "tokenizer_2": ("T5TokenizerFast", {}),
        "scheduler": FLOW,
    },
    "Flux2KleinPipeline": {
        "transformer": (
            "Flux2Transformer2DModel",
            {
                "in_channels": 128,
                "num_layers": 5,
                "num_single_layers": 20,
                "attention_head_dim": 128,
                "num_attention_heads": 24,
                "joint_attention_dim": 7680,
                "guidance_embeds": False,
            },
        ),
        "vae": ("AutoencoderKLFlux2", autoencoder(32)),
        "text_encoder": ("Qwen3ForCausalLM", QWEN3_4B),
        "tokenizer": ("Qwen2TokenizerFast", {}),
        "scheduler": FLOW,
    },
    "Flux2Pipeline": {
        "transformer": (
            "Flux2Transformer2DModel",
            {
                "in_channels": 128,
                "num_layers": 8,
                "num_single_layers": 48,
                "attention_head_dim": 128,
                "num_attention_heads": 48,
                "joint_attention_dim": 15360,
                "guidance_embeds": True,
            },
        ),
        "vae": ("AutoencoderKLFlux2", autoencoder(32)),
        "text_encoder": ("Mistral3ForConditionalGeneration", MISTRAL_SMALL_24B),
        "tokenizer": ("PixtralProcessor", {}),
        "scheduler": FLOW,
    },
    "SanaPipeline": {
        "transformer": (
            "SanaTransformer2DModel",
            {
                "in_channels": 32,
                "out_channels": 32,
                "num_layers": 20,
                "num_attention_heads": 70,
                "attention_head_dim": 32,
                "num_cross_attention_heads": 20,
                "cross_attention_head_dim": 112,
                "cross_attention_dim": 2240,
                "caption_channels": 2304,
                "mlp_ratio": 2.5,
                "sample_size": 32,
                "patch_size": 1,
            },
        ),
        "vae": (
            "AutoencoderDC",
            {
                "latent_channels": 32,
                "attention_head_dim": 32,
                "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
                "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
                "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
                "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
                "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
                "decoder_layers_per_block": [3] * 6,
                "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
                "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
                "downsample_block_type": "conv",
                "upsample_block_type": "interpolate",
                "scaling_factor": 0.41407,
            },
        ),
        "text_encoder": ("Gemma2Model", GEMMA_2B),
        "tokenizer": ("GemmaTokenizerFast", {}),
        "scheduler": (
            "DPMSolverMultistepScheduler",
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        ),
    },
    "ZImagePipeline": {
        "transformer": (
            "ZImageTransformer2DModel",
            {
                "in_channels": 16,
                "dim": 3840,
                "n_layers": 30,
                "n_refiner_layers": 2,
                "n_heads": 30,
                "n_kv_heads": 30,
                "cap_feat_dim": 2560,
                "axes_dims": [32, 48, 48],
                "axes_lens": [1536, 512, 512],
            },
        ),
        "vae": ("AutoencoderKL", FLUX_VAE),
        "text_encoder": ("Qwen3Model", QWEN3_4B),
        "tokenizer": ("Qwen2Tokenizer", {}),
        "scheduler": FLOW,
    },
    "QwenImagePipeline": {
        "transformer": (
            "QwenImageTransformer2DModel",
            {
                "in_channels": 64,
                "out_channels": 16,
                "num_layers": 60,
                "attention_head_dim": 128,
                "num_attention_heads": 24,
                "joint_attention_dim": 3584,
                "guidance_embeds": False,
            },
        ),
        "vae": (
            "AutoencoderKLQwenImage",
            {
                "z_dim": 16,
                "temperal_downsample": [False, True, True],
                "latents_mean": [0.0] * 16,
                "latents_std": [1.0] * 16,
            },
        ),
        "text_encoder": ("Qwen2_5_VLForConditionalGeneration", QWEN_VL_7B),
        "tokenizer": ("Qwen2Tokenizer", {}),
        "scheduler": FLOW,
    },
}
"""Class and configuration of each component, by pipeline."""
