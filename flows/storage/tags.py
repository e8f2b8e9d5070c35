"""Model URIs, and Darkroom's tags in MLflow, validated: any account can change them, and they become names of files."""

import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, Json, StringConstraints, ValidationError

from diffusion.common.config import MAX_NAME_LENGTH, PlainName, plain_name
from diffusion.common.errors import UserError
from diffusion.data.manifest import Sha256

PREFIX = "darkroom."  # prefix of the names of Darkroom's tags
MAX_VERSION_NUMBER = 2**31 - 1  # largest number of a model version that MLflow's database can hold
SHOWN = 60  # maximum characters of a bad value in an error message

RunId = Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z_-]{1,64}$")]
VersionNumber = Annotated[int, Field(ge=1, le=MAX_VERSION_NUMBER)]
ModelUri = Annotated[str, StringConstraints(pattern=r"^models:/[^/@]{1,200}/[1-9][0-9]{0,9}$")]
"""Exact version of a registered model."""
DvcDigest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}(\.dir)?$")]
"""Name that DVC gives a file or, with ``.dir``, a folder: the MD5 of its bytes or of its listing."""


MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[\w.-]{1,100})|/(?P<number>[1-9][0-9]{0,9}))")


class Tags(BaseModel):
    """Darkroom's tags of a model version or a run; None for missing tags. Other tags are ignored."""

    model_config = ConfigDict(
        extra="ignore", frozen=True, use_attribute_docstrings=True, alias_generator=lambda name: f"{PREFIX}{name}"
    )

    weights_sha256: Sha256 | None = None
    code_sha256: Sha256 | None = None
    state_sha256: Sha256 | None = None
    """Training state beside its weights."""
    content_digest: Sha256 | None = None
    dvc_digest: DvcDigest | None = None
    dataset: PlainName | None = None
    autoencoder: ModelUri | None = None
    """Version whose latents the model works in."""
    bases: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}(,[0-9a-f]{64})*$")] | None = None
    """SHA-256 of the models whose weights it needs besides its own, the nearest first, separated by commas."""
    start: ModelUri | None = None
    """Version whose weights training began with."""
    ancestors: Json[list[tuple[Sha256, PlainName]]] | None = None
    """Content digests and names of the data sets that its autoencoder, initial weights and their ancestors learned
    from; these may be deleted since."""
    warm_start: Annotated[int, Field(ge=1)] | None = None
    """Number of warm starts in its chain, from the one that followed a training from nothing to its own."""
    takedown: Annotated[str, StringConstraints(pattern=r"^[0-9a-z]+(,[0-9a-z]+)*$")] | None = None
    """Names of takedowns of images that it was trained on, separated by commas."""
    origin: Annotated[str, StringConstraints(min_length=1, max_length=2000)] | None = None
    """Source of an imported version, with its revision."""
    licence: Annotated[str, StringConstraints(min_length=1, max_length=2000)] | None = None
    """Licence of an imported version."""

    @property
    def base_digests(self) -> list[str]:
        """The digests in ``bases``."""
        return self.bases.split(",") if self.bases else []

    @property
    def contents(self) -> set[tuple[Sha256, str]]:
        """Content digests and names of all data sets that it and its ancestors learned from, as these tags say."""
        own = {(self.content_digest, self.dataset)} if self.content_digest and self.dataset else set()
        return own.union(self.ancestors or ())


def parse_tags(tags: Mapping[str, str], owner: str) -> Tags:
    """Parse the tags of ``owner``, a model version or a run; raises UserError that names it and the first bad tag."""
    try:
        return Tags.model_validate(dict(tags))
    except ValidationError as error:
        detail = error.errors()[0]
        value = str(detail["input"])
        text = ascii(value[:SHOWN]) + (" …" if len(value) > SHOWN else "")
        raise UserError(
            f"{owner} has the tag {detail['loc'][0]} = {text}, which is not what Darkroom writes there: correct it in "
            "MLflow, or delete it"
        ) from error


def parse_model_uri(uri: str) -> tuple[str, str]:
    """Parse ``models:/NAME@ALIAS`` or ``models:/NAME/NUMBER`` into (NAME, "@ALIAS" or NUMBER)."""
    match = MODEL_URI.fullmatch(uri)
    try:
        if match is None or int(match["number"] or 1) > MAX_VERSION_NUMBER:
            raise ValueError(uri)
        return plain_name(match["name"]), match["number"] or f"@{match['alias']}"
    except ValueError as error:
        text = uri if len(uri) <= MAX_NAME_LENGTH else f"{uri[:MAX_NAME_LENGTH]}…"
        raise UserError(
            f"{text} names no model version: write models:/NAME@champion, models:/NAME/1, or a path that ends in "
            ".safetensors"
        ) from error
