"""What a network that judges pictures says of them, and how steeply (zero-centred gradient penalties)."""

from collections.abc import Callable

import torch
from torch import Tensor


def penalties(judge: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """``judge`` of ``x`` (N, …), (N,), and ‖∂judge/∂x‖² of each picture, (N,), of which weights have a gradient.

    What it says of a picture must depend on no other. By real pictures this is R1, by drawn ones R2 (arXiv 1801.04406,
    equation 9, and section 4.1).
    """
    x = x.detach().requires_grad_()
    # As a view, since torch counts no operations of modules that are given a leaf.
    said = judge(x.view_as(x))
    (gradient,) = torch.autograd.grad(said.sum(), x, create_graph=True)
    return said, gradient.float().square().flatten(1).sum(1)
