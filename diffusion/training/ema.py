"""Moving averages of the weights: exponential (EMA), power-function, and those computed after training."""

import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.checkpoints import AUTOENCODER, AVERAGED, GUIDE, link_bases, read_tensors, save_tensors
from diffusion.common.errors import UserError
from diffusion.common.model_files import read_header
from diffusion.training.checkpointing import Checkpoints, is_whole

PREFIXES = (AVERAGED, "ema1.")
"""Prefixes of the averages' tensor names in checkpoints; the first average is the model."""
SNAPSHOTS = "averages"
"""Subfolder of a run that holds snapshots of its averages."""
STDS = "stds"
logger = logging.getLogger(__name__)


class EMA:
    """Moving average of a network's parameters, with the ``decay`` of each step (1, 2, …), from 0 to 1."""

    def __init__(self, network: nn.Module, decay: Callable[[int], float]) -> None:
        self.averages = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Update the averages with the network's parameters after ``step`` (1, 2, …) optimizer steps."""
        parameters = [parameter.detach() for parameter in network.parameters()]
        torch._foreach_lerp_(list(self.averages.values()), parameters, 1 - self.decay(step))


def exponential_decay(max_decay: float) -> Callable[[int], float]:
    """Make the decay of an exponential average with a warm-up: min(max_decay, 1 − (1 + step)^−¾)."""
    return lambda step: min(max_decay, 1 - float((1 + step) ** -0.75))


def power_decay(length: float) -> Callable[[int], float]:
    """Make the decay of a power-function average: step τ of t has weight τ^γ, so that its memory grows with training.

    ``length`` is the standard deviation of those weights over τ/t (arXiv 2312.02696, equations 1 to 4).
    """
    gamma = power(length)
    return lambda step: float((1 - 1 / step) ** (gamma + 1))


def power(length: float) -> float:
    """Compute γ of the power-function average with relative std ``length`` (arXiv 2312.02696, equation 126)."""
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return float(roots[np.isreal(roots)].real.max())


def mixture(snapshots: list[tuple[int, float]], images: int, length: float) -> tuple[list[float], float]:
    """Compute the weight of each of ``snapshots`` in the average of std ``length`` at ``images``, and the fit's error.

    A snapshot is a power-function average of some std at some number of images. The weights are the least-squares fit
    of the snapshots' weight functions to the target's (arXiv 2312.02696, section 3.2), constrained to the sum 1, as
    the fit alone shrinks the network where snapshots are few. The error is the function's, relative to its norm.
    """
    profiles = [(count, power(std)) for count, std in snapshots]
    overlaps = np.array([[_overlap(p, q) for q in profiles] for p in profiles])
    goal = (images, power(length))
    target = np.array([_overlap(p, goal) for p in profiles])
    # The last weight is what the others leave of 1.
    rest = overlaps[:-1] - overlaps[-1]
    solution = np.linalg.lstsq(rest[:, :-1] - rest[:, -1:], target[:-1] - target[-1] - rest[:, -1], rcond=None)[0]
    weights = np.append(solution, 1 - solution.sum())
    square_error = weights @ overlaps @ weights - 2 * weights @ target + _overlap(goal, goal)
    return weights.tolist(), math.sqrt(max(square_error, 0.0) / _overlap(goal, goal))


def _overlap(p: tuple[int, float], q: tuple[int, float]) -> float:
    """Compute ∫ p q of weight functions p(τ) = (γ + 1) τ^γ / t^(γ + 1) up to t (arXiv 2312.02696, appendix C.2)."""
    (t, gamma), (s, delta) = sorted((p, q))
    # With t ≤ s. In logarithms, as the powers overflow a float.
    shape = (gamma + 1) * (delta + 1) / (gamma + delta + 1)
    return shape * math.exp(delta * math.log(t) - (delta + 1) * math.log(s))


def models_to_evaluate(output: Path, report: Path, ema_stds: Iterable[float] = ()) -> list[Path]:
    """List the checkpoints in the run's folder ``output``, and its averages of ``ema_stds``, written to ``report``."""
    averages = [reconstruct_average(output / SNAPSHOTS, std, report / SNAPSHOTS) for std in ema_stds]
    # The first checkpoint was written before the first step.
    return [path for path in Checkpoints(output / "checkpoints").paths() if int(path.stem) > 0] + averages


def reconstruct_average(folder: Path, std: float, output: Path) -> Path:
    """Write the average of relative ``std`` at the last snapshot in ``folder`` to ``output``, or raise UserError."""
    if not (paths := Checkpoints(folder).paths()):
        raise UserError(
            f"evaluation.ema_stds needs the snapshots of training.ema_stds, and {folder} has none: train with it"
        )
    for path in paths:
        if not is_whole(path):
            raise UserError(f"{path} is damaged: train again with --restart, or leave evaluation.ema_stds out")
    header = read_header(paths[-1])
    stds = header.pop(STDS)
    averages = [(path, prefix, value) for path in paths for prefix, value in zip(PREFIXES, stds, strict=True)]
    shares, error = mixture([(int(path.stem), value) for path, _, value in averages], int(paths[-1].stem), std)
    logger.log(
        logging.WARNING if error > 0.1 else logging.INFO,
        "average of std %g from %d snapshots: %.1f %% off; more training.checkpoints bring it nearer",
        std,
        len(averages),
        100 * error,
    )
    total: dict[str, Tensor] = {}
    for (path, prefix, _), share in zip(averages, shares, strict=True):
        for name, value in read_tensors(path, prefix).items():
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + share * value.double()
    tensors = {AVERAGED + name: value.float() for name, value in total.items()}
    for prefix in (GUIDE, AUTOENCODER):
        tensors |= {prefix + name: value for name, value in read_tensors(paths[-1], prefix).items()}
    path = output / f"std-{std:g}.safetensors"
    link_bases(paths[-1], output)
    save_tensors(path, tensors, header)
    return path
