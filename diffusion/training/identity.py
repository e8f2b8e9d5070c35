"""What makes two trainings the same: digests of all that determines the weights, but the fingerprint of the machine.

Pretrained models, an autoencoder or initial weights, are identified by the digest of their weights, so that a run does
not depend on where the file is.
"""

from pathlib import Path
from typing import Any

from diffusion.checkpoints import read_model_header, weights_digest
from diffusion.common.device import resolve_device
from diffusion.common.errors import UserError
from diffusion.common.files import digest_of
from diffusion.common.fingerprint import resolve_precision
from diffusion.common.rules import ABILITIES, names_without_effect
from diffusion.data.manifest import Manifest
from diffusion.families import family_of
from diffusion.families.config import FamilyConfig
from diffusion.training.config import KEEPS_WEIGHTS, TrainingConfig
from diffusion.training.warm_start import start_digest


def identity_fields(config: TrainingConfig, model: FamilyConfig) -> dict[str, Any]:
    """Return the resolved configuration without fields that cannot change the weights of ``model``."""
    harmless = {name for name, info in TrainingConfig.model_fields.items() if KEEPS_WEIGHTS in info.metadata}
    harmless.update(name for name in ("window", "guide") if getattr(config, name) is None)
    harmless.update(names_without_effect("training", (ABILITIES, "training.adapter"), model=model, training=config))
    return config.model_dump(mode="json", exclude=harmless) | {
        "precision": resolve_precision(config.precision, resolve_device(config.device))
    }


def data_digest(manifest: Manifest, config: TrainingConfig) -> str:
    """Compute the digest of the data that determine the weights: content, and layout if shards decide the order."""
    if config.weights is not None:
        # They name images as the records do, and names are not part of the content.
        return digest_of([manifest.content_digest, [part.records.sha256 for part in manifest.parts]])
    if config.window is None:
        return manifest.content_digest
    return digest_of([manifest.content_digest, manifest.layout_digest])


def train_key(data_digest: str, model: FamilyConfig, config: TrainingConfig) -> str:
    """Compute the digest of everything that determines the weights, except the fingerprint, by digests of files."""
    fields = {"content_digest": data_digest, "model": model.identity(), "training": identity_fields(config, model)}
    if (encoder := family_of(model).text_encoder(model)) is not None:
        fields["encoder"] = encoder.digest
    return digest_of(fields)


def with_digests(model: FamilyConfig, training: TrainingConfig) -> tuple[FamilyConfig, TrainingConfig]:
    """Replace the paths of autoencoder and initial weights by their digests; raises UserError for a missing file."""
    if model.autoencoder is not None:
        model = model.model_copy(update={"autoencoder": autoencoder_digest(model.autoencoder)})
    if training.init_from is not None:
        digest_of_file = start_digest if training.warm_start else weights_digest
        digest = digest_of_file(local_file("training.init_from", training.init_from))
        training = training.model_copy(update={"init_from": digest})
    return model, training


def autoencoder_digest(path: str) -> str:
    """Compute the ``weights_digest`` of the autoencoder in the file ``path``, alone or of a latent diffusion model."""
    file = local_file("model.autoencoder", path)
    space = read_model_header(file).latents
    return weights_digest(file) if space is None else f"sha256:{space.digest}"


def local_file(option: str, path: str) -> Path:
    """Return the ``path`` of a model's file; raises UserError if the ``option`` names a registered model."""
    if path == "champion" or path.startswith("models:/"):
        raise UserError(
            f"{option} = {path} names a registered model, which is not fetched here: give the path of its "
            "final.safetensors, or run `darkroom train`"
        )
    return Path(path)
