"""Rounded weights: closed forms of their error, and products and gradients through them."""

import pytest
import torch
from torch import nn

from diffusion.families.adapters import BaseWeights
from diffusion.families.quantization import NF4, QuantizedLinear, dequantize, quantize, round_weights

KINDS: tuple[BaseWeights, ...] = ("int8", "nf4")


def weights(out: int = 7, inputs: int = 45) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(out, inputs, generator=generator) * torch.logspace(-3, 1, out)[:, None]


def test_int8_is_off_by_half_a_step_of_its_channel_at_most() -> None:
    weight = weights()
    codes, scales = quantize(weight, "int8")
    assert codes.dtype == torch.int8
    assert (codes.abs().amax(1) == 127).all()
    assert torch.allclose(scales.float(), weight.abs().amax(1, keepdim=True) / 127, rtol=2**-8)
    error = (dequantize(codes, scales, (7, 45), "int8") - weight).abs()
    assert (error <= scales.float() * (0.5 + 1e-5)).all()


def test_nf4_is_off_by_half_a_gap_of_its_quantiles_at_most() -> None:
    weight, numbers = weights(), torch.tensor(NF4)
    codes, scales = quantize(weight, "nf4")
    assert codes.shape == (5, 32)  # 315 weights in blocks of 64
    error = (dequantize(codes, scales, (7, 45), "nf4") - weight).abs().flatten()
    largest = torch.cat([block.abs().amax().expand(len(block)) for block in weight.flatten().split(64)])
    assert (error <= largest * numbers.diff().amax() / 2 * (1 + 1e-6)).all()


def test_numbers_of_nf4_are_quantiles_of_a_normal_distribution() -> None:
    normal, offset = torch.distributions.Normal(0.0, 1.0), 0.9677083
    positive = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    expected = torch.cat([positive, torch.zeros(1), negative]).sort().values / positive.max()
    assert torch.allclose(torch.tensor(NF4), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_twice_changes_no_bit(kind: BaseWeights) -> None:
    network = nn.Sequential(nn.Linear(45, 70), nn.Linear(70, 3))
    round_weights(network, ["0", "1"], kind)
    once = [layer.weight.clone() for layer in network]  # type: ignore[union-attr]
    round_weights(network, ["0", "1"], kind)
    for layer, weight in zip(network, once, strict=True):
        assert isinstance(layer, nn.Linear)
        assert torch.equal(layer.weight, weight)
        assert torch.equal(QuantizedLinear(layer, kind).weight, weight)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind: BaseWeights) -> None:
    assert not dequantize(*quantize(torch.zeros(3, 4), kind), (3, 4), kind).any()


@pytest.mark.parametrize("kind", KINDS)
def test_products_and_gradients_are_those_of_the_rounded_weights(kind: BaseWeights) -> None:
    layer = nn.Linear(45, 7)
    quantized = QuantizedLinear(layer, kind)
    round_weights(layer, [""], kind)
    x = torch.randn(2, 3, 45)
    actual, expected = (x.clone().requires_grad_() for _ in range(2))
    y, y_expected = quantized(actual), layer(expected)
    assert torch.allclose(y, y_expected, atol=1e-6)
    y.square().sum().backward()
    y_expected.square().sum().backward()
    assert actual.grad is not None
    assert expected.grad is not None
    assert torch.allclose(actual.grad, expected.grad, rtol=1e-4, atol=1e-5)
    assert [parameter.requires_grad for parameter in (quantized.codes, quantized.scales)] == [False, False]


def test_product_under_autocast_is_in_its_type() -> None:
    layer = QuantizedLinear(nn.Linear(45, 7), "int8")
    x = torch.randn(2, 45, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
