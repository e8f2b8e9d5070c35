"""Warnings about a run that degrades without failing: loss spikes, over-fitting, weights that do not change."""

import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from torch import Tensor

logger = logging.getLogger(__name__)

SPIKE = 5.0
"""Factor above the median of recent losses from which a loss counts as a spike."""
REMEMBERED = 50
"""Number of recent losses that a spike is compared with; at least a tenth of them is needed."""
RISING = 3
"""Consecutive checkpoints with rising held-out loss and falling training loss that count as over-fitting."""


@dataclass
class TrainingMonitor:
    """Monitor of a run's metrics that logs a warning for anything suspicious."""

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    """Recent mean losses."""
    validation_losses: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=RISING + 1))
    """Recent losses of the averaged weights on training and held-out images."""
    sums: dict[str, list[float]] = field(default_factory=dict)
    """Sums of the weights at the last check."""

    def check_loss(self, loss: float, images: int) -> None:
        """Warn of a spike of the mean loss since the last check."""
        if len(self.losses) >= REMEMBERED // 10 and loss > SPIKE * median(self.losses):
            logger.warning(
                "the loss leapt to %.3g after %d images, from about %.3g: if it does not come back, lower "
                "training.learning_rate or training.max_grad_norm",
                loss,
                images,
                median(self.losses),
            )
        if math.isfinite(loss):
            self.losses.append(loss)

    def check_validation(self, metrics: Mapping[str, float], images: int) -> None:
        """Warn of over-fitting, by the losses of the averaged weights on fixed images of both splits."""
        train, held_out = (metrics.get(f"{split}_loss_ema", math.nan) for split in ("train", "held_out"))
        self.validation_losses.append((train, held_out))
        steps = list(pairwise(self.validation_losses))
        if len(steps) == RISING and all(after[0] < before[0] and after[1] > before[1] for before, after in steps):
            logger.warning(
                "after %d images the loss on held-out images has risen %d checkpoints in a row, while that on others "
                "fell: the network memorizes its images. Ingest more, train for less, or make it smaller",
                images,
                RISING,
            )
            self.validation_losses.clear()

    def check_weights(self, network: Mapping[str, Tensor], average: Mapping[str, Tensor], images: int) -> None:
        """Warn if the network, or the average of its weights, has not changed since the last check."""
        sums = {
            "network": [float(each.detach().double().sum()) for each in network.values()],
            "average of the weights": [float(each.double().sum()) for each in average.values()],
        }
        for what, now in sums.items():
            if self.sums.get(what) == now:
                logger.warning(
                    "the %s has not moved since the checkpoint before image %d: look at training.learning_rate, "
                    "training.ema_decay and the metric skipped",
                    what,
                    images,
                )
        self.sums = sums
