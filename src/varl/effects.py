"""Settings that have no effect beside the others of their recipe: they are refused, not passed over in silence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from typing import Any

__all__ = ["NoEffect", "Rule", "default_of", "refuse_idle"]

Rule = tuple[bool, str, tuple[str, ...]]
"""Whether it applies; beside what; and the settings that then have no effect."""


class NoEffect(ValueError):
    """Settings differ from their defaults, and change nothing.

    Attributes:
        defaults: their full names, each with the default that they can be set back to.
    """

    def __init__(self, found: dict[str, tuple[Any, Any, str]]) -> None:
        self.defaults = {name: default for name, (_, default, _) in found.items()}
        said = [
            f"{name} {_shown(value)} has no effect {why}; leave it out, or set it to its default, {_shown(default)}"
            for name, (value, default, why) in found.items()
        ]
        super().__init__("; ".join(said))


def refuse_idle(section: str, config: Any, rules: Iterable[Rule]) -> None:
    """Refuse the settings of a configuration that have no effect and are not at their defaults.

    Args:
        section: the name of the configuration in a recipe, for example ``method``.
        config: a dataclass.

    Raises:
        NoEffect: naming all of them.
    """
    known = {field.name: field for field in fields(config)}
    found: dict[str, tuple[Any, Any, str]] = {}
    for applies, why, names in rules:
        for name in names if applies else ():
            value, default = getattr(config, name), default_of(known[name])
            if value != default:
                found.setdefault(f"{section}.{name}", (value, default, why))
    if found:
        raise NoEffect(found)


def default_of(field: Field[Any]) -> Any:
    """The default of a dataclass's field."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def _shown(value: Any) -> str:
    """A value as a recipe has it."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
