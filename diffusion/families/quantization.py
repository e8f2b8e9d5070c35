"""Frozen linear layers whose weights have 8 or 4 bits, as the base of an adapter.

The numbers are those of the formulas here on every device: a model's file names the kind alone, and who loads it
rounds the weights of its base in the same way. Rounding weights that are rounded already changes no bit.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from diffusion.families.adapters import BaseWeights

BLOCK = 64
"""Weights that have one scale in nf4."""
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 16 numbers of nf4, quantiles of a normal distribution (arXiv 2305.14314, appendix E)."""


def quantize(weight: Tensor, kind: BaseWeights) -> tuple[Tensor, Tensor]:
    """Round ``weight`` (out, in): returns codes and scales.

    int8: (out, in) int8 in [−127, 127] and (out, 1) bfloat16, so that each weight is at most half a scale off. nf4: two
    numbers of ``NF4`` in a byte, (⌈out · in / 64⌉, 32) uint8, and (⌈out · in / 64⌉, 1) float32.
    """
    weight = weight.detach().float()
    if kind == "int8":
        # 127 times eight bits is exact, so that rounding twice finds the same scale.
        scales = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
        codes = (weight / _without_zeros(scales.float())).round().clamp(-127, 127)
        return codes.to(torch.int8), scales
    blocks = pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scales, numbers = blocks.abs().amax(1, keepdim=True), weight.new_tensor(NF4)
    codes = torch.bucketize(blocks / _without_zeros(scales), (numbers[1:] + numbers[:-1]) / 2).to(torch.uint8)
    return codes[:, ::2] * 16 + codes[:, 1::2], scales


def _without_zeros(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 1.0, scales)


def dequantize(codes: Tensor, scales: Tensor, shape: tuple[int, int], kind: BaseWeights) -> Tensor:
    """Undo ``quantize`` for weights of ``shape`` (out, in): float32."""
    if kind == "int8":
        return codes.float() * scales.float()
    halves = torch.stack([codes // 16, codes % 16], dim=2).flatten(1)
    weights = scales.new_tensor(NF4)[halves.int()] * scales
    return weights.flatten()[: shape[0] * shape[1]].view(shape)


class QuantizedLinear(nn.Linear):
    """Linear layer with rounded, frozen weights, through which gradients reach its inputs."""

    def __init__(self, layer: nn.Linear, kind: BaseWeights) -> None:
        nn.Module.__init__(self)  # nn.Linear would make weights
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        codes, scales = quantize(layer.weight, kind)
        # Parameters, so that copies can share them.
        self.codes, self.scales = (nn.Parameter(each, requires_grad=False) for each in (codes, scales))
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The rounded weights, (out, in) float32, computed at each access."""
        return dequantize(self.codes, self.scales, (self.out_features, self.in_features), self.kind)

    def forward(self, x: Tensor) -> Tensor:
        """Compute x Wᵀ + b from ``x`` (…, in), in the type of autocast if it is on."""
        shape = self.out_features, self.in_features
        y: Tensor = _Linear.apply(x, self.codes, self.scales, self.bias, shape, self.kind)  # type: ignore[no-untyped-call]
        return y


class _Linear(torch.autograd.Function):
    """x Wᵀ + b, whose backward pass computes the weights again instead of keeping them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        shape: tuple[int, int],
        kind: BaseWeights,
    ) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.shape, ctx.kind, ctx.dtype = shape, kind, x.dtype
        return linear(x, dequantize(codes, scales, shape, kind), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales = ctx.saved_tensors
        weight = dequantize(codes, scales, ctx.shape, ctx.kind)
        return (gradient @ weight.to(gradient.dtype)).to(ctx.dtype), None, None, None, None, None


def quantizable_layers(network: nn.Module) -> set[str]:
    """Name the linear layers of ``network``, without those of subclasses, which may use weights in other ways."""
    return {name for name, module in network.named_modules() if type(module) is nn.Linear}


def quantize_layers(network: nn.Module, layers: Iterable[str], kind: BaseWeights) -> None:
    """Replace the linear ``layers`` of ``network``."""
    for name in layers:
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        network.set_submodule(name, QuantizedLinear(layer, kind))


def round_weights(network: nn.Module, layers: Iterable[str], kind: BaseWeights) -> None:
    """Give the linear ``layers`` of ``network`` the weights that they have once they are quantized."""
    for name in layers:
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        shape = layer.out_features, layer.in_features
        layer.weight.data = dequantize(*quantize(layer.weight, kind), shape, kind).to(layer.weight.dtype)
