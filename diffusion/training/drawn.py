"""What one step draws at random of each of its pictures, each draw a function of seed and global sample index."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.model import Told


@dataclass(frozen=True)
class Drawn:
    """Of N pictures."""

    x0: Tensor
    """The pictures, (N, C, H, W) in [−1, 1]."""
    t: Tensor | None
    """Their times, (N,); None: the family knows none."""
    noise: Tensor | None
    """Standard Gaussian, (N, C, H, W), of what the family adds noise to; None: it adds none."""
    draws: Tensor | None
    """What dropout goes by, (N,) int64; None: nothing is dropped."""
    told: Told
    """What the network is told of them."""

    def on(self, device: torch.device) -> "Drawn":
        """The same on ``device``, as soon as it gets there."""
        if device.type == "cpu":
            return self
        # From pinned memory nobody waits for a copy.
        return self._each(lambda values: values.pin_memory().to(device, non_blocking=True))

    def split(self, count: int) -> list["Drawn"]:
        """In so many parts, as equal as can be."""

        def part(number: int) -> "Drawn":
            return self._each(lambda values: values.tensor_split(count)[number])

        return [part(number) for number in range(count)]

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Drawn":
        t, noise, draws = (None if each is None else change(each) for each in (self.t, self.noise, self.draws))
        return Drawn(change(self.x0), t, noise, draws, {name: change(values) for name, values in self.told.items()})


def kept_back(told: Told, u: Tensor, share: float, no_class: int) -> Told:
    """``told`` without what the draws ``u`` (N,), in [0, 1), keep from the network.

    Below ``share`` that is everything (arXiv 2207.12598). Where both are told, class and caption, it is one of them in
    as many pictures again, so that either can be asked for without the other (arXiv 2211.09800, section 3.2.1).
    """
    alone = share / 2 if len(told) == 2 else 0
    without_label = (u < share) | ((u >= share + alone) & (u < share + 2 * alone))
    kept = {}
    if "label" in told:
        kept["label"] = told["label"].masked_fill(without_label, no_class)
    if "text" in told:
        kept["text"] = told["text"].masked_fill((u < share + alone)[:, None], 0)
    return kept
