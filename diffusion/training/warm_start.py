"""Warm start: initial weights from a trained model, identified by their digest.

Only the averaged weights are loaded. Optimizer, averages and learning rate start from scratch.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from diffusion.checkpoints import load_model
from diffusion.common.errors import UserError
from diffusion.data.dataset import Dataset
from diffusion.families.model import Model
from diffusion.models.config import FamilyConfig
from diffusion.models.text_encoder import ENCODER
from diffusion.training.autoencoder import DIGEST, weights_digest
from diffusion.training.config import TrainingConfig

ELSEWHERE = ("champion", "models:/")
"""Prefixes of training.init_from values that need a model registry to resolve."""


@dataclass(frozen=True)
class WarmStart:
    """A trained model whose weights initialize a network."""

    path: str
    model: Model
    digest: str

    def initialize(self, network: nn.Module, model: FamilyConfig, dataset: Dataset, classes: list[str]) -> None:
        """Load the weights into ``network`` of ``model`` for ``dataset``; raises UserError if they do not fit."""
        if words := self._misfit(model, dataset, classes):
            raise UserError(
                f"training.init_from {self.path} {words}: begin with a model of the same kind, or at random "
                "(training.init_from=null)"
            )
        network.load_state_dict(self.model.network.state_dict())

    def _misfit(self, model: FamilyConfig, dataset: Dataset, classes: list[str]) -> str | None:
        header = self.model.header
        if header.model.family != model.family:
            return f"is a model of the family {header.model.family}, and this is {model.family}"
        theirs, ours = header.model.model_dump(), model.model_dump()
        if different := [name for name in theirs | ours if theirs.get(name) != ours.get(name)]:
            name = different[0]
            return f"has model.{name} = {theirs.get(name)}, and this is {ours.get(name)}"
        if self.model.shape != dataset.shape:
            they, we = ("×".join(map(str, shape)) for shape in (self.model.shape, dataset.shape))
            return (
                f"generates images of {they} (channels × height × width), and data set {dataset.manifest.name} has {we}"
            )
        if self.model.classes != classes:
            they, we = (", ".join(names) or "none" for names in (self.model.classes, classes))
            return f"knows the classes {they}, and data set {dataset.manifest.name} has {we}"
        if model.text and header.encoder != ENCODER:
            return "was trained with another text encoder"
        return None


def open_warm_start(config: TrainingConfig) -> WarmStart | None:
    """Load the model of ``config.init_from``; None for random weights. Raises UserError if it does not exist."""
    if config.init_from is None:
        return None
    if config.init_from.startswith(ELSEWHERE):
        raise UserError(
            f"training.init_from = {config.init_from} names a registered model, which is not fetched here: give the "
            "path of its final.safetensors, or run `darkroom train`"
        )
    model = load_model(Path(config.init_from))
    return WarmStart(config.init_from, model, weights_digest(model))


def with_start_digest(config: TrainingConfig, start: WarmStart | None) -> TrainingConfig:
    """Replace the path of the initial weights by their digest, so that the run does not depend on where the file is."""
    return config if start is None else config.model_copy(update={"init_from": DIGEST + start.digest})
