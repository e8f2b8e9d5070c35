"""Import of a model that was not trained here, from any source, as one model file."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from diffusion.checkpoints import link_bases, read_model_header, verify_weights
from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.files import sha256_file, write_atomically
from diffusion.common.hub import Repository, parse_hub_uri
from diffusion.common.progress import Progress, ignore_progress
from diffusion.diffusers_format.hub import download_pipeline
from diffusion.diffusers_format.import_lora import import_lora
from diffusion.diffusers_format.import_pipeline import import_pipeline
from diffusion.diffusers_format.import_single_file import import_single_file
from diffusion.diffusers_format.safetensors_file import SafetensorsFile
from diffusion.families.header import Origin


class ImportedFile(Config):
    """A model file that was imported."""

    file: Path
    sha256: str
    family: str
    origin: Origin

    @property
    def source(self) -> str:
        """Source with its revision."""
        return "@".join(filter(None, (self.origin.source, self.origin.revision)))


@dataclass(frozen=True)
class ImportParts:
    """What the files of other tools need besides themselves."""

    base: Path | None = None
    """Model file of the pipeline that a LoRA belongs to."""
    base_version: str | None = None
    """Its registered version, models:/NAME/NUMBER; None: it is a file."""
    pipeline_config: Path | None = None
    """Folder with the configuration of the pipeline whose weights a single-file checkpoint has."""


def import_file(
    source: str,
    path: Path,
    licence: str | None,
    downloads: Path,
    progress: Progress = ignore_progress,
    parts: ImportParts | None = None,
) -> ImportedFile:
    """Write the model that ``source`` names to the file ``path``, whole or not at all.

    Args:
        source: Folder that diffusers' ``save_pretrained`` wrote, hf://OWNER/NAME@REVISION, a model file of Darkroom, or
            a .safetensors of other tools: a LoRA, or a pipeline as a single-file checkpoint.
        path: Where the file is written, with those that it is based on beside it.
        licence: Its licence, in the place of the one that its card names, if any.
        downloads: Folder of what comes from the Hub, which the caller deletes: a repeated call goes on from there.
        progress: Shows the download.
        parts: What a LoRA or a single-file checkpoint needs besides its own file.

    Raises:
        UserError: The source is none of these, is not supported, is damaged, has weights that are not finite, or has no
            licence; or ``parts`` are not what it needs.
    """
    place, parts, origin = Path(source), parts or ImportParts(), None
    is_file = not source.startswith("hf://") and not place.is_dir()
    file = SafetensorsFile(place) if is_file else None
    _check_parts(source, file, parts)
    if source.startswith("hf://"):
        name, revision = parse_hub_uri(source, "model")
        # Of this commit alone, in case that the branch moves before the call is repeated.
        repository = Repository.resolve("model", name, revision)
        folder = downloads / repository.commit
        download = download_pipeline(repository.uri, folder, progress)
        pinned_origin = Origin(source=download.source, revision=download.revision, licence=licence or download.licence)
        import_pipeline(folder, path, pinned_origin)
    elif file is None:
        import_pipeline(place, path, Origin(source=place.resolve().name, licence=licence))
    elif file.is_model_file:
        origin = read_model_header(place).origin or Origin(source=place.name, files={place.name: sha256_file(place)})
        # The bytes of a model file, and so its header, stay as they are.
        origin = origin.model_copy(update={"licence": licence or _require_licence(source, origin.licence)})
        link_bases(place, path.parent)
        write_atomically(path, lambda partial: shutil.copyfile(place, partial))
    elif parts.base is not None:
        licence = _require_licence(source, licence or file.metadata.get("modelspec.license"))
        import_lora(file, parts.base, path, licence, parts.base_version)
    else:
        assert parts.pipeline_config is not None
        licence = _require_licence(source, licence or file.metadata.get("modelspec.license"))
        import_single_file(file, parts.pipeline_config, path, licence)
    verify_weights(path)
    header = read_model_header(path)
    origin = origin or header.origin
    assert origin is not None, "an imported pipeline has one"
    return ImportedFile(file=path, sha256=sha256_file(path), family=header.model.family, origin=origin)


def _check_parts(source: str, file: SafetensorsFile | None, parts: ImportParts) -> None:
    """Raise UserError unless ``parts`` are what the source needs, which is ``file``, or a folder."""
    kind = "a pipeline or model file"
    if file is not None and not file.is_model_file:
        kind = "a LoRA" if file.is_adapter else "a single-file checkpoint"
    if kind == "a LoRA" and parts.base is None:
        raise UserError(
            f"{source} is a LoRA: give the model that it belongs to as --base, a file or models:/NAME/NUMBER"
        )
    if kind == "a single-file checkpoint" and parts.pipeline_config is None:
        raise UserError(
            f"{source} has weights without the configuration of their pipeline: give that as --config FOLDER, a folder "
            "of save_pretrained with model_index.json, whose own weights may be missing"
        )
    for name, value, of in (
        ("--base", parts.base, "a LoRA"),
        ("--config", parts.pipeline_config, "a single-file checkpoint"),
    ):
        if value is not None and kind != of:
            raise UserError(f"{name} is of {of}, and {source} is {kind}: leave it out")


def _require_licence(source: str, licence: str | None) -> str:
    if licence is None:
        raise UserError(f"{source} names no licence: find out under which it was published, and give it with --licence")
    return licence
