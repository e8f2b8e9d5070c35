"""Pipelines of the published configurations, built without memory, have as many parameters as was published."""

import pytest
import torch

from diffusion.families.pretrained.config import DiffusersConfig
from diffusion.families.pretrained.network import PipelineNetwork
from tests.builders.published_configs import PUBLISHED

pytestmark = pytest.mark.slow

PARAMETERS = {
    "StableDiffusionXLPipeline": {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    "FluxPipeline": {"transformer": 11_901_408_320, "text_encoder_2": 4_762_310_656, "vae": 83_819_683},
    "Flux2KleinPipeline": {"transformer": 3_875_544_576, "text_encoder": 4_022_468_096},
    "Flux2Pipeline": {"transformer": 32_223_281_152, "text_encoder": 24_011_361_280},
    "SanaPipeline": {"transformer": 1_604_462_752, "text_encoder": 2_614_341_888, "vae": 312_250_275},
    "ZImagePipeline": {"transformer": 6_154_908_736, "text_encoder": 4_022_468_096},
    "QwenImagePipeline": {"transformer": 20_430_401_088, "text_encoder": 8_292_166_656, "vae": 126_892_531},
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_configurations_are_built_as_they_were_published(kind: str) -> None:
    components = {name: {"kind": part, "config": config} for name, (part, config) in PUBLISHED[kind].items()}
    config = DiffusersConfig.model_validate({"pipeline": kind, "components": components})
    assert config.image_shape == (3, 1024, 1024)
    with torch.device("meta"):
        network = PipelineNetwork(config)
    counts = {name: sum(weight.numel() for weight in part.parameters()) for name, part in network.named_children()}
    assert {name: counts[name] for name in PARAMETERS[kind]} == PARAMETERS[kind]
