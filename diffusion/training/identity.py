"""What decides the weights of a run, and so which run it is."""

from typing import Any

from diffusion.data.manifest import Manifest
from diffusion.device import resolve_device
from diffusion.files import digest_of
from diffusion.fingerprint import resolve_precision
from diffusion.models.config import FamilyConfig
from diffusion.text import ENCODER
from diffusion.training.config import TrainingConfig


def identity_fields(config: TrainingConfig, model: FamilyConfig) -> dict[str, Any]:
    """The resolved configuration, without what cannot change the weights of ``model``."""
    harmless = {
        "recompute",
        "device",
        "compile",
        "shard",
        "most_skipped",
        "output",
        "keep",
        "keep_best",
        "keep_every",
        "checkpoints",
        "workers",
        "prefetch",
        "cache_bytes",
        "stream_bytes",
    }
    if config.window is None:
        harmless.add("window")
    harmless.update(model.passes_over.get("training", ()))
    return config.model_dump(mode="json", exclude=harmless) | {
        "precision": resolve_precision(config.precision, resolve_device(config.device))
    }


def data_digest(manifest: Manifest, config: TrainingConfig) -> str:
    """Digest of what the data set does to the weights: its content, and how it lies if that decides the order."""
    if config.window is None:
        return manifest.content_digest
    return digest_of([manifest.content_digest, manifest.layout_digest])


def train_key(data_digest: str, model: FamilyConfig, config: TrainingConfig) -> str:
    """Digest of all that decides the weights, but for the fingerprint; ``model`` is ``identified``."""
    return digest_of(
        {
            "content_digest": data_digest,
            "model": model.model_dump(mode="json"),
            "training": identity_fields(config, model),
        }
        | ({"encoder": ENCODER.digest} if model.text else {})
    )
