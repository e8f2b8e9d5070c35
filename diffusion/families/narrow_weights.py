"""Weights that are kept in 16 bits where autocast computes with 16 bits in any case.

Files of large pipelines have weights of 16 bits, which are loaded as float32. Under autocast linear layers and
convolutions take them in bfloat16, to the same bits whether they are stored in float32 or in a type that holds them
exactly. Normalisations and other layers, which compute in float32, keep it.
"""

from collections.abc import Iterator

import torch
from torch import nn

NARROW = (torch.bfloat16, torch.float16)
"""Types of 16 bits."""


def _weights(network: nn.Module) -> Iterator[nn.Parameter]:
    """Find the frozen weights of linear layers and convolutions, without those of subclasses that store others."""
    for name, module in network.named_modules():
        # Z-Image computes in the type that its time embedding has.
        if type(module) in (nn.Linear, nn.Conv2d, nn.Conv3d) and "t_embedder" not in name:
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            if not weight.requires_grad:
                yield weight


def narrow_weights(network: nn.Module, device: torch.device) -> None:
    """Copy these weights to ``device``, and store in 16 bits what 16 bits hold exactly; trained ones stay as they are.

    One after another, so that the device never holds all in 32 bits.
    """
    for weight in _weights(network):
        weight.data = weight.data.to(device)
        for dtype in NARROW if weight.dtype == torch.float32 else ():
            if torch.equal((narrow := weight.data.to(dtype)).float(), weight.data):
                weight.data = narrow
                break


def widen_weights(network: nn.Module) -> None:
    """Undo ``narrow_weights``."""
    for weight in _weights(network):
        if weight.dtype in NARROW:
            weight.data = weight.data.float()
