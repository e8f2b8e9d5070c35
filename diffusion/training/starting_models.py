"""Models that a training begins with: initial weights, a pipeline or a teacher, and the autoencoder of its latents."""

import json
import logging
import shlex
from collections.abc import Callable
from pathlib import Path

from diffusion.checkpoints import load_model, read_model_header, weights_digest
from diffusion.common.errors import UserError
from diffusion.common.escaping import pluralize
from diffusion.common.files import sha256_file
from diffusion.data.dataset import Dataset
from diffusion.data.manifest import Manifest
from diffusion.families.config import FamilyConfig
from diffusion.families.header import Base
from diffusion.families.model import Model, StartConflict
from diffusion.families.vae.network import Autoencoder, Latents
from diffusion.training.config import TrainingConfig
from diffusion.training.identity import autoencoder_digest, identity_fields, local_file
from diffusion.training.warm_start import has_state, start_digest

logger = logging.getLogger(__name__)


def load_initial(model: FamilyConfig, config: TrainingConfig, dataset: Dataset) -> Model | None:
    """Load the model in ``config.init_from``, whose averaged weights initialize a network of ``model``, if any.

    Optimizer, averages and learning rate start from scratch. Raises UserError if the file does not exist or fit, or if
    there is none and ``model`` has no network of its own.
    """
    if config.init_from is None:
        if model.needs_initial_model:
            raise UserError(
                f"model.family = {model.family} has no network of its own: set training.init_from to an imported "
                "pipeline"
            )
        return None
    option, alternative = "distillation.teacher", "distil another model"
    if config.student is None:
        option = "training.init_from"
        alternative = "begin with a model of the same kind, or at random (training.init_from=null)"
    initial = load_model(local_file(option, config.init_from))
    if (conflict := start_conflict(initial, model, dataset.manifest)) is not None:
        advice = advise(conflict, config.init_from)
        raise UserError(
            f"{option} {config.init_from} {conflict.fact}: {f'{advice}, or ' if advice else ''}{alternative}"
        )
    if config.student is not None and initial.header.student_steps is not None:
        raise UserError(f"{config.init_from} is a student itself: name its teacher with distillation.teacher")
    for shape in dataset.shapes if initial.has_frozen_parts else ():
        initial.with_size(shape)  # raises if its network does not take it
    if config.adapter is not None and config.adapter.base_weights is not None and initial.header.adapter is not None:
        raise UserError(
            f"{config.init_from} is an adapter itself, of whose changes training.adapter.base_weights = "
            f"{config.adapter.base_weights} would keep few: leave it out, or begin with its base"
        )
    initial.round_base(config.adapter)
    return initial.select_classes(_classes(dataset.manifest))


def advise(conflict: StartConflict, autoencoder: str | None = None) -> str | None:
    """Say which options training can begin with a model by; None: there are none.

    ``autoencoder`` is what the options call the model's autoencoder; None: it is known by its weights alone.
    """
    values, note = {**conflict.settings}, ""
    if digest := values.get("autoencoder"):
        values["autoencoder"] = autoencoder or "FILE"
        note = "" if autoencoder else f" (FILE: the autoencoder whose weights have the digest {digest})"
    settings = [
        f"model.{name}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"
        for name, value in values.items()
    ]
    return f"give {' '.join(f'--set {shlex.quote(setting)}' for setting in settings)}{note}" if settings else None


def start_conflict(initial: Model, model: FamilyConfig, manifest: Manifest) -> StartConflict | None:
    """Describe why a training of ``model`` on a data set cannot begin with ``initial``; None if it can."""
    if initial.header.model.family != model.family:
        return StartConflict(f"is a model of the family {initial.header.model.family}, and this is {model.family}")
    shape = (manifest.channels, manifest.size, manifest.size)
    if initial.header.square != shape and not initial.header.takes_other_sizes(shape):
        actual, expected = ("×".join(map(str, each)) for each in (initial.header.square, shape))
        return StartConflict(
            f"generates images of {actual} (channels × height × width), and data set {manifest.name} has {expected}"
        )
    return initial.conflict_as_start(model, _classes(manifest))


def _classes(manifest: Manifest) -> list[str]:
    return sorted(manifest.class_histogram) if len(manifest.class_histogram) > 1 else []


def find_state(config: TrainingConfig, model: FamilyConfig) -> Path | None:
    """Find the checkpoint whose training state a warm start takes over; None, and a warning, if it has none that fits.

    None also for trainings that are not warm starts.
    """
    if not config.warm_start or config.init_from is None:
        return None
    path = Path(config.init_from)
    if (reason := state_conflict(path, config, model)) is not None:
        logger.warning("a warm start from the averaged weights of %s alone, as %s", path, reason)
        return None
    return path


def state_conflict(path: Path, config: TrainingConfig, model: FamilyConfig) -> str | None:
    """Describe why a warm start cannot take over the training state in the file at ``path``; None if it can."""
    if not has_state(path):
        return "it has no training state"
    before, fields = read_model_header(path).training, identity_fields(config, model)
    changes = (name for name in ("optimizer", "learned_uncertainty") if before.get(name) != fields.get(name))
    return next((f"its training state is for another training.{name}" for name in changes), None)


def identify_base(initial: Model, config: TrainingConfig, version: str | None) -> tuple[Base | None, TrainingConfig]:
    """Refer to the file of ``initial``, of registered ``version``, if training changes a part of its weights alone.

    Also returns the configuration with the digest of its weights in place of its path.
    """
    file = Path(config.init_from or "")
    is_base = config.adapter is not None or initial.has_frozen_parts
    if is_base and config.warm_start:
        raise UserError(
            f"training.warm_start continues all weights of a network, and training changes a part of "
            f"{config.init_from} alone: leave it out"
        )
    base = Base(sha256=sha256_file(file), version=version) if is_base else None
    digest = start_digest(file) if config.warm_start else weights_digest(file)
    return base, config.model_copy(update={"init_from": digest})


def make_latents(path: str, manifest: Manifest, load: Callable[[Path], Model] = load_model) -> Latents:
    """``load`` the autoencoder in the file ``path``, or that of the model there, without moments of latents.

    Raises UserError if the file has no autoencoder, or one for other channels than the images' or whose factor does not
    divide the image size.
    """
    model = load(local_file("model.autoencoder", path))
    if model.header.channels != manifest.channels:
        raise UserError(
            f"model.autoencoder {path} was trained on images of {pluralize(model.header.channels, 'channel')} and data "
            f"set {manifest.name} has {manifest.channels}: train an autoencoder on images like these"
        )
    autoencoder = model.autoencoder.network if isinstance(model.autoencoder, Latents) else model.autoencoder
    if not isinstance(autoencoder, Autoencoder):
        raise UserError(
            f"model.autoencoder {path} is a model of the family {model.header.model.family} that has no autoencoder: "
            "train one with model.family=vae, or take a model in latents"
        )
    digest = autoencoder_digest(path).removeprefix("sha256:")
    return Latents.copy_of(autoencoder, manifest.channels, digest, manifest.size, manifest.shapes)
