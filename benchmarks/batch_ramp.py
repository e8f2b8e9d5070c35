"""Ablation: a batch that grows during the training (arXiv 1711.00489), at the default learning rate and its decay.

    python benchmarks/batch_ramp.py --seen 92160 --seeds 0 1 2

The default network trains in batches of 32; and in batches of 16 in the first third, of 32 in the second and of 64 in
the last, by adding up gradients. Metric and options are those of ``magnitude_preserving.py``.
"""

import torch
from magnitude_preserving import compare
from torch import Tensor

from diffusion.families.model import TrainingBatch
from diffusion.training.trainer import Trainer

FIRST, GROWTH = 16, (1, 2, 4)
"""The first batch, and how many of it make one in each equal part of the training."""


class GrowingBatch(Trainer):
    """Trainer that steps after 1, then 2, then 4 batches, with the mean of their gradients."""

    def update(self, inputs: TrainingBatch, learning_rate: float) -> tuple[Tensor, Tensor, Tensor]:
        """Add up gradients, and update the weights if there are enough of them."""
        batches = GROWTH[min(len(GROWTH) * self.state.images // self.total, len(GROWTH) - 1)]
        [step] = self.state.steps
        if not hasattr(self, "sums"):
            self.sums, self.added = [torch.zeros_like(parameter) for parameter in step.parameters], 0
        loss = self.backward(step, inputs, None)
        for total, parameter in zip(self.sums, step.parameters, strict=True):
            assert parameter.grad is not None
            total += parameter.grad / batches
        self.added += 1
        norm = torch.zeros(())
        if self.added >= batches:
            for total, parameter in zip(self.sums, step.parameters, strict=True):
                parameter.grad = total.clone()
                total.zero_()
            self.added, norm = 0, torch.nn.utils.clip_grad_norm_(step.parameters, self.config.max_grad_norm)
            [optimizers] = self.state.optimizers
            for optimizer in optimizers.values():
                optimizer.param_groups[0]["lr"] = learning_rate
                optimizer.threads = self.threads  # type: ignore[attr-defined]
                optimizer.step()
        for parameter in step.parameters:
            parameter.grad = None
        self.state.images += self.config.images_per_step
        # After each batch, as decays count them: their memory would be of four times as many images else.
        for average in self.state.averages:
            average.update(self.state.network, self.state.images // self.config.images_per_step)
        if self.state.guide and self.state.images <= self.setup.guide_images(self.total):
            self.state.update_guide()
        return loss, norm, loss.isfinite()


def main() -> None:
    replaced = {"diffusion.training.train.Trainer": GrowingBatch}
    compare(__doc__, "default", "growing-batch", replaced, {"batch_size": FIRST}, both={"cpu_threads": 1})


if __name__ == "__main__":
    main()
