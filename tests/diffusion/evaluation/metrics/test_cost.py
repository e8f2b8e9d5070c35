"""What drawing costs: counted by hand, and as many operations as a drawing really takes."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusion.checkpoints import load_model
from diffusion.common.random import GaussianNoise
from diffusion.evaluation.model_evaluator import count_gflop
from diffusion.families.config import ModelConfig
from diffusion.families.diffusion_model import count_evaluations
from diffusion.families.model import ConditioningBatch
from diffusion.generation.generate import make_conditioning
from diffusion.process.samplers import SAMPLING_ADAPTER, sampling_config
from diffusion.process.schedules import make_schedule
from tests.builders.small_models import CONFIG, write_model

SCHEDULE = make_schedule(ModelConfig(), (1, 28, 28))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"sampler": "ddpm"}, 10),
        ({"sampler": "dpmpp_2m"}, 10),
        ({"sampler": "dpmpp_2m", "guidance": 3}, 20),
        ({"sampler": "heun"}, 19),
        ({"sampler": "heun", "guidance": 0}, 38),
        ({"sampler": "heun", "autoguidance": 2}, 38),
        ({"sampler": "heun", "autoguidance": 1}, 19),
        ({"sampler": "unipc"}, 10),
        ({"sampler": "deis"}, 10),
        ({"sampler": "euler", "guidance": 2, "guidance_interval": [0.01, 0.03]}, 10),
        ({"sampler": "euler", "guidance": 2, "guidance_interval": [0.03, 0.05]}, 11),
    ],
    ids=str,
)
def test_cost_counts_the_network_evaluations_of_the_sampler(sampling: dict[str, object], expected: int) -> None:
    config = SAMPLING_ADAPTER.validate_python({"steps": 10, **sampling})
    assert count_evaluations(config, SCHEDULE) == expected


@pytest.mark.parametrize("guidance", [None, 3.0])
def test_image_cost_equals_the_flops_of_sampling_it(guidance: float | None, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"attention": (0,), "heads": 2})
    path = write_model(tmp_path / "m.safetensors", 0, 1, size=16, config=config, classes={"a": 3, "b": 5})
    model = load_model(path)
    sampling = sampling_config(sampler="heun", steps=3, guidance=guidance, precision="fp32")
    batch = ConditioningBatch(
        make_conditioning(model, [0], 0), GaussianNoise(0, "sampling", [0], model.noise_shape), {}, None
    )
    with FlopCounterMode(display=False) as counter:
        model.sample(batch, sampling, torch.device("cpu"))
    assert count_gflop(model, sampling) == pytest.approx(counter.get_total_flops() / 1e9, rel=0.01)


def test_a_wider_network_costs_more(tmp_path: Path) -> None:
    wide = CONFIG.model_copy(update={"width": 32})
    paths = [write_model(tmp_path / f"{c.width}.safetensors", 0, 1, config=c) for c in (CONFIG, wide)]
    narrow_cost, wide_cost = (count_gflop(load_model(path), sampling_config()) for path in paths)
    assert 2 < wide_cost / narrow_cost < 4.5
