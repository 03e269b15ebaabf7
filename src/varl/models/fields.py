"""Families' settings: frozen dataclasses filled from plain mappings, with one clear error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

__all__ = ["fill"]

T = TypeVar("T")


def fill(kind: type[T], given: Mapping[str, Any] | T | None, what: str) -> T:
    """A dataclass from a mapping of its fields; one that is filled already is returned as it is.

    Args:
        what: how errors name it, for example ``VAR's tokenizer``.

    Raises:
        ValueError: if there are unknown fields, or values that cannot be used.
    """
    if isinstance(given, kind):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"the settings of {what} must be a mapping, not {given!r}")
    values = dict(given or {})
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(values.keys() - set(known))
    if unknown:
        raise ValueError(f"{what} has no {', '.join(map(repr, unknown))}; it has {', '.join(known)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"the settings of {what} cannot be used: {error}") from error
