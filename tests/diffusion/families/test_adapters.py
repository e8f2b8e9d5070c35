"""Adapters: merged weights compute what peft's adapted layers do, by closed forms, and other tensors are errors."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from diffusion.common.errors import UserError
from diffusion.families.adapters import AdapterConfig
from diffusion.families.config import ModelConfig
from diffusion.families.ddpm.network import UNet
from diffusion.families.fine_tuning import is_adaptable, merge_adapters, train_adapters

pytest.importorskip("peft")

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3, "alpha": 5},
    "lora of several ranks": {"rank": 3, "ranks": {"attention.*": 2, "conv1": 5}},
    "lora of several scales": {"rank": 3, "alpha": 5, "ranks": {"middle.0.*": 2}},
    "dora": {"kind": "dora", "rank": 3, "alpha": 5},
    "lokr": {"kind": "lokr", "rank": 1, "alpha": 20},
    "lokr of whole matrices": {"kind": "lokr", "rank": 64, "alpha": 32, "factor": 4},
    "oft": {"kind": "oft", "block_size": 4},
}


def adapter_of(**fields: Any) -> AdapterConfig:
    config: AdapterConfig = TypeAdapter(AdapterConfig).validate_python(fields)
    return config


@pytest.fixture(scope="module")
def network() -> UNet:
    torch.manual_seed(0)
    network = UNet(ModelConfig(width=16, channel_mult=(1, 2), attention=(1,), patch=2), 3, 16, 2)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network


def hidden_layers(network: nn.Module, adapter: AdapterConfig) -> list[str]:
    return [
        name
        for name, module in network.named_modules()
        if is_adaptable(module, adapter) and name.startswith(("down.", "middle.", "up."))
    ]


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_merged_network_computes_what_peft_does(network: UNet, fields: dict[str, Any]) -> None:
    adapter = adapter_of(**fields)
    x, t = torch.randn(2, 3, 16, 16), torch.ones(2)
    before = network(x, t)
    adapted = train_adapters(network, adapter, hidden_layers(network, adapter))
    torch.testing.assert_close(adapted(x, t), before, rtol=1e-5, atol=1e-6)
    for name, parameter in adapted.named_parameters():
        nn.init.normal_(parameter, 1.0 if "magnitude" in name else 0.0, std=0.1)
    merged = copy.deepcopy(network)
    merged.load_state_dict(merge_adapters(merged, adapter, adapted.state_dict()), strict=False)
    assert (merged(x, t) - before).abs().max() > 0.01
    torch.testing.assert_close(merged(x, t), adapted(x, t), rtol=1e-4, atol=2e-5)


def merged_layer(adapter: AdapterConfig, layer: nn.Module, tensors: dict[str, Tensor]) -> np.ndarray:
    named = {f"layer.{name}": value for name, value in tensors.items()}
    weight = merge_adapters(nn.ModuleDict({"layer": layer}), adapter, named)["layer.weight"]
    result: np.ndarray = weight.double().numpy()
    return result


def random_tensors(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name.replace("__", "."): torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def test_lora_adds_the_scaled_product() -> None:
    layer, tensors = nn.Linear(6, 4), random_tensors(lora_A__weight=(2, 6), lora_B__weight=(4, 2))
    a, b = (value.double().numpy() for value in tensors.values())
    expected = layer.weight.detach().double().numpy() + 3 / 2 * b @ a
    np.testing.assert_allclose(merged_layer(adapter_of(rank=2, alpha=3), layer, tensors), expected, rtol=1e-6)


def test_rows_of_dora_have_the_trained_norms() -> None:
    layer = nn.Conv2d(3, 4, 3)
    tensors = random_tensors(lora_A__weight=(2, 3, 3, 3), lora_B__weight=(4, 2, 1, 1))
    tensors["lora_magnitude_vector.weight"] = torch.arange(1.0, 5.0).view(1, 4, 1, 1)
    merged = merged_layer(adapter_of(kind="dora", rank=2), layer, tensors).reshape(4, -1)
    np.testing.assert_allclose(np.linalg.norm(merged, axis=1), [1, 2, 3, 4], rtol=1e-6)
    lora = {name: value for name, value in tensors.items() if "magnitude" not in name}
    directions = merged_layer(adapter_of(rank=2), layer, lora).reshape(4, -1)
    cosines = (merged * directions).sum(1) / np.linalg.norm(merged, axis=1) / np.linalg.norm(directions, axis=1)
    np.testing.assert_allclose(cosines, 1)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_lokr_adds_blocks_of_the_second_matrix(kernel: tuple[int, ...]) -> None:
    layer = nn.Conv2d(6, 4, 3) if kernel else nn.Linear(6, 4)
    tensors = random_tensors(lokr_w1=(2, 3), lokr_w2_a=(2, 1), lokr_w2_b=(1, 2 * math.prod(kernel)))
    first, a, b = (value.double().numpy() for value in tensors.values())
    second, delta = (a @ b).reshape(2, 2, *kernel), np.zeros((4, 6, *kernel))
    for row in range(2):
        for column in range(3):
            delta[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = first[row, column] * second
    merged = merged_layer(adapter_of(kind="lokr", rank=1, alpha=3), layer, tensors)
    np.testing.assert_allclose(merged, layer.weight.detach().double().numpy() + 3 * delta, rtol=1e-5, atol=1e-6)


def test_oft_rotates_blocks_of_the_inputs() -> None:
    layer, angle = nn.Linear(4, 3, bias=False), 0.1
    # (I + Q)(I − Q)⁻¹ of Q with tan(θ/2) above the diagonal turns by θ.
    tensors = {"oft_R.weight": torch.tensor([[math.tan(angle / 2)], [0.0]])}
    turn = np.eye(4)
    turn[:2, :2] = [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
    expected = layer.weight.detach().double().numpy() @ turn.T
    # The fifth term of the series leaves an error of Q⁴.
    np.testing.assert_allclose(merged_layer(adapter_of(kind="oft", block_size=2), layer, tensors), expected, atol=1e-5)


def test_rotations_keep_angles_between_rows() -> None:
    layer, tensors = nn.Linear(64, 8), {"oft_R.weight": torch.randn(2, 32 * 31 // 2) * 1e-3}
    merged = merged_layer(adapter_of(kind="oft"), layer, tensors)
    weight = layer.weight.detach().double().numpy()
    assert np.abs(merged - weight).max() > 1e-3
    np.testing.assert_allclose(merged @ merged.T, weight @ weight.T, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "shapes"),
    [
        ({"rank": 2}, {"lora_A__weight": (2, 6)}),
        ({"rank": 2}, {"lora_A__weight": (2, 6), "lora_B__weight": (4, 2), "lora_magnitude_vector__weight": (4,)}),
        ({"rank": 2}, {"lora_A__weight": (3, 6), "lora_B__weight": (4, 3)}),
        ({"kind": "dora", "rank": 2}, {"lora_A__weight": (2, 6), "lora_B__weight": (4, 2)}),
        (
            {"kind": "dora", "rank": 2},
            {"lora_A__weight": (2, 6), "lora_B__weight": (4, 2), "lora_magnitude_vector__weight": (6,)},
        ),
        ({"kind": "lokr"}, {"lokr_w1": (2, 2), "lokr_w2": (2, 2)}),
        ({"kind": "lokr"}, {"lokr_w1": (2, 3, 1), "lokr_w2": (2, 2)}),
        ({"kind": "lokr", "rank": 2}, {"lokr_w1": (2, 3), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 2)}),
        ({"kind": "lokr"}, {"lokr_w1": (2, 3), "lokr_w2": (2, 2), "lokr_w2_a": (2, 1)}),
        ({"kind": "oft"}, {"oft_R__weight": (2, 4)}),
        ({"kind": "oft"}, {"oft_R__weight": (4, 1)}),
        ({"kind": "oft"}, {"oft_R__weight": (0, 1)}),
        ({"kind": "oft"}, {"oft_R__weight": (6,)}),
    ],
)
def test_tensors_that_do_not_fit_are_errors(fields: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="layer"):
        merged_layer(adapter_of(**fields), nn.Linear(6, 4), random_tensors(**shapes))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dropout_depends_on_the_image_alone(network: UNet, kind: str) -> None:
    adapter = adapter_of(kind=kind, dropout=0.5)
    adapted = train_adapters(network, adapter, hidden_layers(network, adapter)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    x, t, draws = torch.randn(4, 3, 16, 16), torch.ones(4), torch.tensor([5, 7, 5, 9])
    whole = adapted(x, t, draws=draws)
    parts = [adapted(x[part], t[part], draws=draws[part]) for part in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(adapted(x, t, draws=draws + 1), whole, atol=1e-3)
    same = adapted(x[:1].expand(4, -1, -1, -1), t, draws=draws)
    assert torch.allclose(same[0], same[2], atol=1e-5)
    assert not torch.allclose(same[0], same[1], atol=1e-3)
    assert torch.equal(adapted(x, t), adapted(x, t))
    assert not torch.allclose(adapted(x, t), whole, atol=1e-3)


def test_dropout_is_of_the_inputs_of_the_first_matrix() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(400, 2), nn.Linear(400, 2)

        def forward(self, x: Tensor, draws: Tensor | None = None) -> Tensor:
            return torch.stack([self.first(x), self.second(x)])

    net = Net()
    adapted = train_adapters(net, adapter_of(rank=400, alpha=800, dropout=0.25), ("first", "second"))
    for name, parameter in adapted.named_parameters():
        nn.init.eye_(parameter) if "lora_A" in name else nn.init.ones_(parameter)
    x = torch.ones(3, 5, 400)
    added = (adapted(x, draws=torch.tensor([1, 2, 3])) - net(x)) * 0.75 / 2
    # Of 400 ones, those that are left: three quarters, others in each layer, image and position.
    torch.testing.assert_close(added, added.round(), rtol=0, atol=2e-3)
    assert 285 < added.mean() < 315
    assert len(set(added[..., 0].round().flatten().tolist())) > 8


def test_first_fitting_pattern_decides_on_the_rank() -> None:
    adapter = adapter_of(rank=2, alpha=4, ranks={"attn2.*": 16, "to_q": 4, "unet.up.0.*": 1})
    names = ("unet.down.attn2.to_q", "unet.down.attn1.to_q", "unet.up.0.to_k", "unet.to_k", "unet.cross_attn2.to_k")
    config = adapter.peft_config(names)
    network = nn.Module()
    for name in names:
        module = network
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.add_module(leaf, nn.Linear(32, 32))
    adapted = train_adapters(network, adapter, names)
    ranks = {name: len(adapted.state_dict()[f"{name}.lora_A.weight"]) for name in names}
    assert ranks == dict(zip(names, (16, 4, 1, 2, 2), strict=True))
    layers = dict(adapted.network.named_modules())
    assert [layers[name].scaling["default"] for name in names] == [4 / 16, 1, 4, 2, 2]  # type: ignore[index,union-attr]
    assert config.r == 2
    with pytest.raises(UserError, match="to_v"):
        adapter_of(ranks={"to_v": 2}).peft_config(names)


@pytest.mark.parametrize(
    "fields", [{"kind": "loha"}, {"kind": "oft", "rank": 4}, {"block_size": 8}, {"kind": "dora", "factor": 4}]
)
def test_options_of_other_kinds_are_unknown(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        adapter_of(**fields)
