"""How large the loss is at each noise level, learnt beside the network."""

import torch
from torch import Tensor, nn

from diffusion.models.unet import sinusoidal

FEATURES = 128


class Uncertainty(nn.Module):
    """u(t), with which a loss L becomes L / e^u + u: least where e^u = L (arXiv 2312.02696, equation 21).

    Then the gradients of all noise levels have the same size, whatever their losses are. Starts as u = 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(FEATURES))

    def forward(self, loss: Tensor, time: Tensor) -> Tensor:
        """``loss`` (N,) at ``time`` (N,), in steps of 0 … T−1, to what is minimised, (N,)."""
        u = sinusoidal(time, FEATURES) @ self.weight
        return loss * (-u).exp() + u
