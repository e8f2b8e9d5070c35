"""Trainers of small networks, to take single steps with."""

from concurrent.futures import Executor
from pathlib import Path

from torch import Tensor

from diffusion.data.dataset import Dataset
from diffusion.families.config import FamilyConfig
from diffusion.process.samplers import sampling_config
from diffusion.training.config import TrainingConfig
from diffusion.training.distributed import SINGLE_PROCESS
from diffusion.training.setup import make_setup
from diffusion.training.trainer import Trainer, scheduled_learning_rate


def make_trainer(data: Path, model: FamilyConfig, config: TrainingConfig, pool: Executor, total: int = 0) -> Trainer:
    """A trainer on the data set in folder ``data``, in this process, that has seen nothing of ``total`` images."""
    setup = make_setup(Dataset.open(data), model, config, sampling_config(), SINGLE_PROCESS)
    trainer = Trainer(setup, pool)
    trainer.total = total
    return trainer


def take_step(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """One step at the scheduled learning rate: loss and gradient norm."""
    return trainer.train_step(scheduled_learning_rate(trainer.config, trainer.state.images, trainer.total))
