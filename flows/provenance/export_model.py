"""Export of a model to diffusers or as an adapter: signed, and pushed to the Hub."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffusion.api.generator import ImageGenerator
from diffusion.checkpoints import find_base, load_model, read_model_header
from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.files import digest_of
from diffusion.common.hub_push import PushResult, check_push
from diffusion.common.image_grids import encode_png_with_metadata
from diffusion.data.manifest import Manifest, versions
from diffusion.diffusers_format.adapter import AdapterDetails, export_adapter
from diffusion.diffusers_format.export import ExportResult, export_to_diffusers, readme
from diffusion.diffusers_format.hub import SAMPLES, hub_card, push_to_hub
from diffusion.families.adapters.base import AdapterFormat
from diffusion.families.diffusion_model import DiffusionModel
from flows.config import Params

# A file is exported without the libraries of the registry, and without keys.
if TYPE_CHECKING:
    from flows.signing.keys import SigningKey

SAMPLE_COUNT = 8
"""Number of sample images of a push."""
ExportFormat = Literal["diffusers", "adapter"]


@dataclass(frozen=True)
class ExportedModel:
    """A model to export, and what is known of it here."""

    weights: Path
    uri: str | None = None
    """Registered version; None: it is a file."""
    run_id: str | None = None
    data: Manifest | None = None
    """Manifest of the data set it was trained on; None: unknown here."""
    metrics: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def registered(cls, uri: str) -> "ExportedModel":
        """Fetch a registered version."""
        from mlflow.client import MlflowClient

        from flows.registry import model_versions
        from flows.registry.model_card import load_manifest_and_metrics
        from flows.registry.takedown_marks import warn_of_takedown

        version = model_versions.resolve(MlflowClient(), uri)
        warn_of_takedown(version)
        weights = model_versions.cached_weights(version)
        return cls(weights, version.uri, version.run_id, *load_manifest_and_metrics(version))

    @property
    def origin(self) -> tuple[str, ...]:
        """Version and run that the exported files name."""
        return () if self.uri is None or self.run_id is None else (self.uri, self.run_id)


class Push(Config):
    """A push to the Hugging Face Hub."""

    uri: str
    """``hf://OWNER/NAME``."""
    prompts: tuple[str, ...] = ()
    """Prompts of the sample images, used in turn."""
    public: bool = False
    """Whether a new repository is public."""


class ModelExport(Config):
    """An exported model and what lies beside it."""

    export: ExportResult
    usage: str
    """How to use it, in words."""
    signature: Path | None = None
    pushed: PushResult | None = None


def export_model(
    config: Params,
    model: ExportedModel,
    to: ExportFormat,
    folder: Path,
    licence: str | None = None,
    signer: "SigningKey | None" = None,
    push: Push | None = None,
    adapter_format: AdapterFormat | None = None,
    details: AdapterDetails | None = None,
) -> ModelExport:
    """Export ``model`` into ``folder``, sign it and push the pipeline.

    Args:
        config: Section sampling, and the data set whose manifest is searched for the card of a pushed file.
        model: See ``ExportedModel``.
        to: A pipeline of diffusers, or the adapter of a fine-tuned one.
        folder: New folder.
        licence: Licence of the weights; None: that of an imported pipeline; on the Hub, that of the data set.
        signer: Key to sign with; None: nothing is signed.
        push: Where to push it; None: nowhere.
        adapter_format: Whose names the tensors of an adapter have; None: the first of its kind's.
        details: What the metadata of an adapter says for people.

    Raises:
        UserError: The model cannot be exported so, or prompts are given for one without captions.
    """
    weights, header = model.weights, read_model_header(model.weights)
    if to == "adapter":
        details = (details or AdapterDetails()).model_copy(update={"licence": licence})
        version, run_id = model.origin or (None, None)
        export = export_adapter(weights, folder, version, run_id, adapter_format, details)
    else:
        export = export_to_diffusers(weights, folder, config.sampling, *model.origin)
    usage = f"how to use it: {export.folder / 'README.md'}"
    if to == "diffusers" and header.model.family == "diffusers":
        # What was imported has its own card, or none.
        usage = f'how to use it: diffusers.{export.pipeline}.from_pretrained("{export.folder}")'
    signature = None
    if signer is not None:
        from flows.signing.keys import signature_path

        signature = signature_path(export.folder)
        signer.sign(export.folder, signature)
    return ModelExport(
        export=export,
        usage=usage,
        signature=signature,
        pushed=None if push is None else _push(push, config, export, model, licence),
    )


def _find_manifest(config: Params, content_digest: str) -> Manifest | None:
    """Manifest of the version of the data set here that has this content, if any."""
    if (config.dataset_folder / "manifest.json").is_file():
        with suppress(UserError):  # of a damaged folder: it may be another data set's
            return next((m for m in versions(config.dataset_folder) if m.content_digest == content_digest), None)
    return None


def _push(push: Push, config: Params, export: ExportResult, exported: ExportedModel, licence: str | None) -> PushResult:
    """Push an export with card and samples."""
    name, model = check_push(push.uri), load_model(exported.weights)
    assert isinstance(model, DiffusionModel), "others are not exported"
    header, base, file = model.header, model.header, exported.weights
    data = exported.data or _find_manifest(config, header.content_digest)
    while base.base is not None:
        file = find_base(file, base.base)
        base = read_model_header(file)
    origin, has_captions = base.origin, model.config.text
    if push.prompts and not has_captions:
        raise UserError("--prompt is for models of captions, and this is none: leave it out")
    samples: dict[str, bytes] = {}
    generator = ImageGenerator(model, config.sampling)
    for index in range(0 if has_captions and not push.prompts else SAMPLE_COUNT):
        condition: dict[str, Any] = {"prompt": push.prompts[index % len(push.prompts)]} if push.prompts else {}
        metadata = {"model": export.version or export.weights_sha256, "seed": "0", "index": str(index)} | condition
        [image] = generator.generate(seed=0, index=index, **condition)
        # The name stands for the request, as the bits depend on the machine.
        request = digest_of([export.weights_sha256, config.sampling.model_dump(mode="json"), metadata])
        samples[f"{SAMPLES}{index}-{request[:12]}.png"] = encode_png_with_metadata(image, metadata)
    card = hub_card(
        readme(model, config.sampling, export, name),
        name,
        header.dataset,
        licence or (origin.licence if origin is not None else None) or (data.licence if data is not None else None),
        data.sources if data is not None else [],
        origin,
        exported.metrics,
        list(samples),
        has_captions,
    )
    message = f"Export {export.version or export.weights_sha256[:16]} from Darkroom"
    return push_to_hub(push.uri, export.folder, card, samples, message, push.public)
