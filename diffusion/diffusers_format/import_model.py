"""Import of a model that was not trained here, from any source, as one model file."""

import shutil
from pathlib import Path

from diffusion.checkpoints import link_bases, read_model_header, verify_weights
from diffusion.common.config import Config
from diffusion.common.errors import UserError
from diffusion.common.files import sha256_file, write_atomically
from diffusion.common.hub import Repository, parse_hub_uri
from diffusion.common.progress import Progress, ignore_progress
from diffusion.diffusers_format.hub import download_pipeline
from diffusion.diffusers_format.import_pipeline import import_pipeline
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


def import_file(
    source: str, path: Path, licence: str | None, downloads: Path, progress: Progress = ignore_progress
) -> ImportedFile:
    """Write the model that ``source`` names to the file ``path``, whole or not at all.

    Args:
        source: Folder that diffusers' ``save_pretrained`` wrote, hf://OWNER/NAME@REVISION, or a model file.
        path: Where the file is written, with those that it is based on beside it.
        licence: Its licence, in the place of the one that its card names, if any.
        downloads: Folder of what comes from the Hub, which the caller deletes: a repeated call goes on from there.
        progress: Shows the download.

    Raises:
        UserError: The source is none of these, is not supported, is damaged, has weights that are not finite, or has no
            licence.
    """
    place, own_origin = Path(source), None
    if source.startswith("hf://"):
        name, revision = parse_hub_uri(source, "model")
        # Of this commit alone, in case that the branch moves before the call is repeated.
        repository = Repository.resolve("model", name, revision)
        folder = downloads / repository.commit
        download = download_pipeline(repository.uri, folder, progress)
        pinned_origin = Origin(source=download.source, revision=download.revision, licence=licence or download.licence)
        import_pipeline(folder, path, pinned_origin)
    elif place.is_dir():
        import_pipeline(place, path, Origin(source=place.resolve().name, licence=licence))
    else:
        own_origin = read_model_header(place).origin or Origin(
            source=place.name, files={place.name: sha256_file(place)}
        )
        if (licence := licence or own_origin.licence) is None:
            raise UserError(
                f"{source} names no licence: find out under which it was published, and give it with --licence"
            )
        link_bases(place, path.parent)
        write_atomically(path, lambda partial: shutil.copyfile(place, partial))
    verify_weights(path)
    header = read_model_header(path)
    # The bytes of a model file, and so its header, stay as they are.
    origin = own_origin.model_copy(update={"licence": licence}) if own_origin is not None else header.origin
    assert origin is not None, "an imported pipeline has one"
    return ImportedFile(file=path, sha256=sha256_file(path), family=header.model.family, origin=origin)
