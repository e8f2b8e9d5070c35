"""Colour, brightness, contrast and saturation of drawn pictures against real ones, each with its error."""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffusion.config import Config

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""
Appearance = Mapping[str, Tensor]
"""Per figure its value for each of N pictures, (N,) float64."""


class Shift(Config):
    """How one figure of the drawn pictures differs from the same of real ones."""

    drawn: float
    """Mean over the drawn pictures."""
    real: float
    """Mean over the real ones."""
    difference: float
    """Drawn less real."""
    standard_error: float
    """Of the difference, over new draws of both (Welch, Biometrika 34, 1947)."""
    drawn_spread: float
    """Standard deviation from one drawn picture to another: less than the real one is variety that is missing."""
    real_spread: float
    """The same of real ones."""

    @property
    def spreads(self) -> float | None:
        """The difference in units of the real spread; None: real pictures do not differ in this."""
        return self.difference / self.real_spread if self.real_spread > 0 else None


class Drift(Config):
    """What drawn pictures look like as a whole, against real ones."""

    drawn: int
    """Drawn pictures."""
    real: int
    """Real ones."""
    shifts: dict[str, Shift]
    """By figure: see ``appearance``."""

    def named(self) -> dict[str, float]:
        """The differences in units of the real spread, under names that say what they are."""
        found = {f"drift_{name}": shift.spreads for name, shift in self.shifts.items()}
        return {name: value for name, value in found.items() if value is not None}


def appearance(pictures: Tensor) -> dict[str, Tensor]:
    """Of each of ``pictures``, (N, C, H, W) uint8 with C 1 or 3: what it looks like as a whole, all (N,) float64.

    ``brightness``: mean luma, 0 to 1. ``contrast``: its standard deviation over the picture. Of pictures with colours
    besides ``red_green``, the mean of red less green, and ``yellow_blue``, that of yellow less blue, −1 to 1 (the
    opponent colours of Hasler and Süsstrunk, SPIE 5007, 2003), and ``saturation``, the mean of the largest less the
    smallest channel, 0 to 1.
    """
    values = pictures.double() / 255
    if values.shape[1] == 1:
        return _of_luma(values[:, 0])
    red, green, blue = values.unbind(1)
    luma = torch.einsum("c,nchw->nhw", torch.tensor(LUMA, dtype=torch.float64), values)
    colours = {
        "red_green": red - green,
        "yellow_blue": (red + green) / 2 - blue,
        "saturation": values.amax(1) - values.amin(1),
    }
    return _of_luma(luma) | {name: value.mean((1, 2)) for name, value in colours.items()}


def drift(drawn: Appearance, real: Appearance) -> Drift:
    """Compare the ``appearance`` of ``drawn`` pictures with that of ``real`` ones, two or more of each."""
    return Drift(
        drawn=len(drawn["brightness"]),
        real=len(real["brightness"]),
        shifts={name: _shift(drawn[name], real[name]) for name in drawn},
    )


def _of_luma(luma: Tensor) -> dict[str, Tensor]:
    return {"brightness": luma.mean((1, 2)), "contrast": luma.std((1, 2), correction=0)}


def _shift(drawn: Tensor, real: Tensor) -> Shift:
    difference = drawn.mean() - real.mean()
    error = (drawn.var() / len(drawn) + real.var() / len(real)).sqrt()
    return Shift(
        drawn=drawn.mean().item(),
        real=real.mean().item(),
        difference=difference.item(),
        standard_error=error.item(),
        drawn_spread=drawn.std().item(),
        real_spread=real.std().item(),
    )
