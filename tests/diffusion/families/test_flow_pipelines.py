"""Pipelines of today, as tiny ones with random weights: images are those of diffusers' own pipelines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.checkpoints import load_model
from diffusion.common.fingerprint import CPU
from diffusion.diffusers_format.import_pipeline import import_pipeline
from diffusion.families.header import Origin
from diffusion.families.model import ConditioningBatch
from diffusion.families.pretrained.model import PretrainedModel
from diffusion.generation.config import Conditions
from diffusion.generation.generate import encode_prompts, make_conditioning
from diffusion.process.samplers import sampling_config
from tests.builders.flow_pipelines import FLOW_MAKERS

Make = Callable[..., tuple[Path, PretrainedModel]]
PROMPTS = ("a red circle", "blue square on the grey photo", "green")
NAMES = {
    "stable_diffusion_xl": "StableDiffusionXLPipeline",
    "flux": "FluxPipeline",
    "flux_2_klein": "Flux2KleinPipeline",
    "z_image": "ZImagePipeline",
    "qwen_image": "QwenImagePipeline",
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[str, tuple[Path, PretrainedModel]] = {}

    def make(kind: str, **options: Any) -> tuple[Path, PretrainedModel]:
        key = f"{kind} {options}"
        if key not in made:
            folder = tmp_path_factory.mktemp(kind)
            source, path = FLOW_MAKERS[kind](folder / "pipeline", **options), folder / "model.safetensors"
            import_pipeline(source, path, Origin(source="tiny"))
            model = load_model(path)
            assert isinstance(model, PretrainedModel)
            made[key] = source, model
        return made[key]

    return make


class Recorder(PretrainedModel):
    """Keeps images as they are before they are rounded."""

    decoded: ClassVar[list[Tensor]] = []

    def decode(self, x: Tensor) -> Tensor:
        self.decoded.append(super().decode(x))
        return self.decoded[-1]


def generate(
    model: PretrainedModel, count: int, size: tuple[int, int], conditions: Conditions, guidance: float | None
) -> Tensor:
    """Generate with noise as diffusers takes it from a generator: (N, H, W, C) in [0, 1]."""
    model, generator = model.with_size(size), torch.Generator().manual_seed(3)
    config = sampling_config(sampler="scheduler", steps=4, precision="fp32", guidance=guidance)
    encodings = encode_prompts(model, conditions)
    conditioning = make_conditioning(model, range(count), 0, conditions, encodings)
    recorder = Recorder(model.header, model.network, model.schedule, model.latents, size=model.size)
    batch = ConditioningBatch(
        conditioning,
        lambda: torch.randn(count, *model.noise_shape, generator=generator),
        encodings[conditions.negative_prompt],
        None,
    )
    recorder.sample(batch, config, CPU)
    return (recorder.decoded.pop() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def generate_by_diffusers(folder: Path, kind: str, count: int, size: tuple[int, int], **options: Any) -> np.ndarray:
    pipeline = getattr(diffusers, NAMES[kind]).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    images: np.ndarray = pipeline(
        prompt=list(PROMPTS[:count]),
        height=size[0],
        width=size[1],
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
        **options,
    ).images
    return images


CASES: tuple[tuple[str, dict[str, Any], float | None, dict[str, Any]], ...] = (
    ("stable_diffusion_xl", {}, 5.0, {"guidance_scale": 5.0}),
    ("stable_diffusion_xl", {"zeros": False}, 5.0, {"guidance_scale": 5.0}),
    ("stable_diffusion_xl", {}, None, {"guidance_scale": 1.0}),
    ("flux", {}, 3.5, {"guidance_scale": 3.5}),
    ("flux", {"dev": False}, None, {}),
    ("flux_2_klein", {}, 4.0, {"guidance_scale": 4.0}),
    ("flux_2_klein", {"distilled": True}, None, {}),
    ("z_image", {}, 6.0, {"guidance_scale": 5.0}),
    ("z_image", {"dynamic": True}, None, {"guidance_scale": 0.0}),
    ("qwen_image", {}, 4.0, {"true_cfg_scale": 4.0, "negative_prompt": ""}),
    ("qwen_image", {}, None, {"true_cfg_scale": 1.0}),
)


@pytest.mark.parametrize(("count", "size"), [(1, (32, 32)), (3, (32, 48))])
@pytest.mark.parametrize(("kind", "options", "guidance", "call"), CASES)
def test_images_are_those_of_diffusers(
    make: Make,
    kind: str,
    options: dict[str, Any],
    guidance: float | None,
    call: dict[str, Any],
    count: int,
    size: tuple[int, int],
) -> None:
    folder, model = make(kind, **options)
    images = generate(model, count, size, Conditions(prompts=PROMPTS[:count]), guidance)
    call = {name: [value] * count if name == "negative_prompt" else value for name, value in call.items()}
    expected = torch.from_numpy(generate_by_diffusers(folder, kind, count, size, **call))
    assert images.shape == expected.shape
    assert images.std() > 0.02  # of something
    assert (images - expected).abs().max() < 2e-6


@pytest.mark.parametrize(
    ("kind", "name", "guidance", "scale"),
    [
        ("stable_diffusion_xl", "guidance_scale", 5.0, 5.0),
        ("z_image", "guidance_scale", 6.0, 5.0),
        ("qwen_image", "true_cfg_scale", 4.0, 4.0),
    ],
)
def test_negative_prompts_are_those_of_diffusers(
    make: Make, kind: str, name: str, guidance: float, scale: float
) -> None:
    folder, model = make(kind)
    conditions = Conditions(prompts=PROMPTS[:2], negative_prompt="grey photo")
    images = generate(model, 2, (32, 32), conditions, guidance)
    call = {name: scale, "negative_prompt": ["grey photo"] * 2}
    expected = torch.from_numpy(generate_by_diffusers(folder, kind, 2, (32, 32), **call))
    assert (images - expected).abs().max() < 2e-6
