"""Base class and shared types of the configuration models, which live beside the code they configure."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from diffusion.common.errors import UserError


class Config(BaseModel):
    """Base class of all configuration models: frozen, with unknown keys rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


Kind = TypeVar("Kind", bound=Config)
Base = TypeVar("Base")


def classes_in(namespace: Mapping[str, object], base: type[Base]) -> tuple[type[Base], ...]:
    """List the classes below ``base`` that a module imports, given its ``globals()``: its imports are the table."""
    return tuple(
        kind for kind in namespace.values() if isinstance(kind, type) and issubclass(kind, base) and kind is not base
    )


@dataclass(frozen=True)
class OneOf(Generic[Kind]):
    """Annotation of a base class: values are of one of ``kinds``, chosen by the field ``key``.

    The default of that field is the name of a kind, and ``default`` is chosen where it is left out.
    """

    key: str
    kinds: tuple[type[Kind], ...]
    default: str

    @property
    def by_name(self) -> dict[str, type[Kind]]:
        """The kinds by their names."""
        return {str(kind.model_fields[self.key].default): kind for kind in self.kinds}

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        names = [f"{name} (default)" if name == self.default else name for name in self.by_name]
        return core_schema.tagged_union_schema(
            {name: handler.generate_schema(kind) for name, kind in self.by_name.items()},
            self._name_of,
            custom_error_type=f"unknown_{self.key}",
            custom_error_message=f"{self.key} is {', '.join(names[:-1])} or {names[-1]}",
        )

    def _name_of(self, fields: Any) -> str:
        if isinstance(fields, BaseModel):
            return str(getattr(fields, self.key, ""))
        return str(fields.get(self.key, self.default)) if isinstance(fields, dict) else self.default


MAX_EMA_STD = 0.28
"""Relative standard deviation of a moving average with equal weights over all of training."""
MAX_SIZE = 1024
"""Largest height and width of a square image, in pixels."""
MAX_SIDE = 2 * MAX_SIZE
"""Largest height and width of any image, in pixels."""
MAX_NAME_LENGTH = 200
"""Most characters of a name: file systems allow 255 bytes, including prefixes and suffixes."""


def plain_name(name: str) -> str:
    """Return ``name`` if it is valid as a path component, in an S3 key and as an MLflow name; else raise ValueError."""
    # MLflow allows no slash or colon in names, and no quote in search filters.
    is_too_long, separators = not 0 < len(name) <= MAX_NAME_LENGTH, set(name) & set("/\\:'\"`")
    if is_too_long or separators or name.startswith(".") or not name.isprintable():
        raise ValueError("must be a plain name: letters, digits, dashes, no slash, colon or quote")
    return name


PlainName = Annotated[str, AfterValidator(plain_name)]
"""Name of a data set or of a registered model, safe as a path component."""


def dataset_folder(name: str) -> Path:
    """Folder of the data set ``name``; raises UserError for a name that is not a plain folder name."""
    try:
        return Path("data") / plain_name(name)
    except ValueError as error:
        raise UserError(f"data set name {name[:MAX_NAME_LENGTH]!r} {error}") from error


DeviceName = Literal["auto", "cpu", "cuda"]
"""Device for computation; auto: a GPU if there is one."""


def is_unset(value: object) -> bool:
    """Whether an optional field has its default, and is not written: older configurations keep their digests."""
    return value is None or value is False or value == "auto"
