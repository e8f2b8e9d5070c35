"""Extensions: what other installed packages add under the entry points of a group."""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from diffusion.common.errors import UserError

T = TypeVar("T")


def with_extensions(group: str, built_in: Mapping[str, T]) -> dict[str, T]:
    """Return ``built_in`` together with the extensions of ``group``, by the names of their entry points.

    Packages are found once per process and imported by this call alone.

    Raises:
        UserError: An extension has the name of another one, or cannot be imported.
    """
    found: dict[str, T] = dict(built_in)
    for entry in _entries(group):
        origin = f"the package {entry.dist.name}" if entry.dist else entry.value
        if entry.name in found:
            raise UserError(f"{origin} adds {entry.name} to {group}, which exists already: uninstall it")
        try:
            found[entry.name] = entry.load()
        except Exception as error:  # whatever an import raises
            raise UserError(
                f"{origin} adds {entry.name} to {group} and cannot be imported ({error}): update or uninstall it"
            ) from error
    return found


@cache
def _entries(group: str) -> tuple[EntryPoint, ...]:
    return tuple(sorted(entry_points(group=group), key=lambda entry: entry.name))


def extension_versions(group: str) -> dict[str, str]:
    """Return the package and version of each extension of ``group``, by name: what results depend on."""
    return {entry.name: f"{entry.dist.name} {entry.dist.version}" for entry in _entries(group) if entry.dist}
