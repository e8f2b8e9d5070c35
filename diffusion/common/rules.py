"""What the fields of a configuration apply to: rules as metadata on the fields, from which all such errors follow.

A rule names another field and the values of it with which a value other than the default has an effect, or is allowed:

    min_snr_gamma: Annotated[float | None, only("training.weighting", "min_snr")] = None

Paths begin with the name of a section. Rules whose section is not among those that are checked are left for later. This
module loads without torch.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from diffusion.common.config import Config

ABILITIES = "model.abilities"


@dataclass(frozen=True)
class FieldRule:
    """Condition on the field at ``path`` for any value but the default of the field that has this metadata."""

    path: str
    allows: Callable[[Any], bool]
    """Whether the value of the other field lets this one have an effect."""
    because: str = ""
    """Why two values contradict each other, and what to do; empty: this one has no effect."""
    hint: str = "leave it out"
    """What to do about a value without effect."""
    values: tuple[object, ...] = ()
    """The values that the rule is about; empty: all but the default."""
    harmless: tuple[object, ...] = ()
    """Other values that are as the default."""
    waits_for: str = ""
    """Section without which the rule is not checked yet; empty: none but the section of ``path``."""


def is_set(value: object) -> bool:
    """Whether an optional value is there."""
    return value is not None and value is not False


def needs(ability: str, value: object = None, because: str = "") -> FieldRule:
    """Make the rule that a family of models has this ``ability``, for any value or for a single one."""
    return FieldRule(ABILITIES, lambda abilities: ability in abilities, because, values=_only_value(value))


def only(path: str, *values: object, because: str = "") -> FieldRule:
    """Make the rule that the field at ``path`` has one of these ``values``."""
    return FieldRule(
        path, lambda value: value in values, because, f"use {' or '.join(map(str, values))}, or leave it out"
    )


def unless(path: str, *values: object, because: str = "", value: object = None) -> FieldRule:
    """Make the rule that the field at ``path`` has none of these ``values``; without any: that it is not set."""
    return FieldRule(
        path, lambda other: other not in values if values else not is_set(other), because, values=_only_value(value)
    )


def given(path: str, because: str = "") -> FieldRule:
    """Make the rule that the field at ``path`` is set."""
    return FieldRule(path, is_set, because)


def find_conflict(**sections: Config) -> str | None:
    """Describe the first field of ``sections`` without effect, or in contradiction to another; None if all is well."""
    for name, value, info, rule in _broken_rules(sections):
        if info.get_default(call_default_factory=True) == value or value in rule.harmless:
            continue
        if rule.values and value not in rule.values:
            continue
        if rule.because:
            return rule.because
        if rule.path == ABILITIES:
            return f"{name} means nothing to model.family = {_value(sections, 'model.family')}: {rule.hint}"
        other = _value(sections, rule.path)
        other_text = str(other).lower() if isinstance(other, bool) else "null" if other is None else str(other)
        text = rule.path if isinstance(other, Config | tuple) else f"{rule.path} = {other_text}"
        return f"{name} means nothing to {text}: {rule.hint}"
    return None


def names_without_effect(section: str, paths: Collection[str], **sections: Config) -> set[str]:
    """Name the fields of ``section`` whose values have no effect, by the rules about ``paths``."""
    return {
        name.partition(".")[2]
        for name, value, _, rule in _broken_rules(sections)
        if rule.path in paths and name.startswith(f"{section}.") and not rule.because
        if not rule.values or value in rule.values
    }


def _only_value(value: object) -> tuple[object, ...]:
    return () if value is None else (value,)


def _broken_rules(sections: Mapping[str, Config]) -> Iterator[tuple[str, object, FieldInfo, FieldRule]]:
    """List the rules that do not hold, with name, value and definition of their fields."""
    for section, config in sections.items():
        for name, value, info in _fields(section, config):
            for rule in info.metadata:
                if not isinstance(rule, FieldRule) or not {rule.path.partition(".")[0], rule.waits_for} <= {
                    *sections,
                    "",
                }:
                    continue
                if not rule.allows(_value(sections, rule.path)):
                    yield name, value, info, rule


def _fields(path: str, config: Config) -> Iterator[tuple[str, object, FieldInfo]]:
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        yield f"{path}.{name}", value, info
        if isinstance(value, Config):
            yield from _fields(f"{path}.{name}", value)


def _value(sections: Mapping[str, Config], path: str) -> Any:
    section, *names = path.split(".")
    value: Any = sections[section]
    for name in names:
        value = getattr(value, name)
    return value
