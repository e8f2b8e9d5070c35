"""Weights of 16 bits under autocast: the bits of float32."""

from pathlib import Path

import pytest
import torch
from torch import nn

from diffusion.common.device import CPU
from diffusion.families.narrow_weights import narrow_weights, widen_weights


def test_what_16_bits_do_not_hold_stays_float32() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)).requires_grad_(False)
    network[0].weight.copy_(network[0].weight.bfloat16())
    network[1].weight.copy_(torch.full((4, 4), 1 + 2**-10))  # of float16 alone
    before = [each.clone() for each in network.parameters()]
    narrow_weights(network, CPU)
    types = [network[number].weight.dtype for number in range(4)]
    assert types == [torch.bfloat16, torch.float16, torch.float32, torch.float32]
    widen_weights(network)
    assert all(torch.equal(each, weight) for each, weight in zip(network.parameters(), before, strict=True))


def test_trained_weights_stay_float32() -> None:
    network = nn.Linear(2, 2)
    network.weight.data = torch.ones(2, 2)
    narrow_weights(network, CPU)
    assert network.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, torch.bfloat16) for kind in ("flux", "flux_2_klein", "z_image", "qwen_image", "pixart_sigma")),
        *((kind, torch.float16) for kind in ("stable_diffusion_xl", "z_image")),
    ],
)
def test_predictions_under_autocast_have_the_bits_of_float32(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    pytest.importorskip("diffusers")
    from diffusion.checkpoints import load_model
    from diffusion.diffusers_format.import_pipeline import import_pipeline
    from diffusion.families.header import Origin
    from tests.builders.flow_pipelines import FLOW_MAKERS

    path = tmp_path / "model.safetensors"
    import_pipeline(FLOW_MAKERS[kind](tmp_path / "pipeline"), path, Origin(source=kind))
    model = load_model(path).with_size((16, 16))
    for weight in model.network.parameters():
        weight.data = weight.data.to(dtype).float()
    x, t = torch.randn(1, *model.noise_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([300.0])
    conditioning = {name: value[None] for name, value in model.encode_prompt("a red circle").items()}

    def predict() -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            prediction: torch.Tensor = model.network(x, t, **conditioning)
        return prediction

    expected = predict()
    narrow_weights(model.network, CPU)
    assert sum(weight.dtype == dtype for weight in model.network.parameters()) > 10
    assert torch.equal(predict(), expected)


def test_adapter_on_weights_of_16_bits_has_the_gradients_of_float32(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from diffusion.checkpoints import load_model
    from diffusion.diffusers_format.import_pipeline import import_pipeline
    from diffusion.families.adapters import LoRAConfig
    from diffusion.families.header import Origin
    from tests.builders.flow_pipelines import FLOW_MAKERS

    path = tmp_path / "model.safetensors"
    import_pipeline(FLOW_MAKERS["flux"](tmp_path / "pipeline"), path, Origin(source="flux"))
    model = load_model(path).with_size((16, 16))
    for weight in model.network.parameters():
        weight.data = weight.data.bfloat16().float()
    x, t = torch.randn(1, *model.noise_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([300.0])
    conditioning = {name: value[None] for name, value in model.encode_prompt("a red circle").items()}
    gradients = []
    for is_narrow in (False, True):
        torch.manual_seed(0)
        trained = model.make_trainable(LoRAConfig(rank=2))
        if is_narrow:
            trained.narrow(CPU)
            assert any(weight.dtype == torch.bfloat16 for weight in trained.network.parameters())
        assert {weight.dtype for weight in trained.parameters()} == {torch.float32}
        with torch.autocast("cpu", torch.bfloat16):
            loss = trained(x, t, **conditioning).float().square().sum()
        gradients.append(torch.autograd.grad(loss, [*trained.parameters()], materialize_grads=True))
    assert any(gradient.any() for gradient in gradients[0])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
