"""Families' settings: frozen dataclasses filled from plain mappings, with one clear error."""

from __future__ import annotations

import reprlib
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from varl.recipes import parse_yaml

__all__ = ["MOST_GRIDS", "MOST_SIDE", "bounded", "choose", "fill", "grid_sides", "read"]

MOST_GRIDS, MOST_SIDE = 64, 512
"""Grids of a schedule, and tokens of a side; the largest published have 14 and 64."""

T = TypeVar("T")


def choose(table: Mapping[str, Any] | Sequence[str], name: Any, family: str) -> str:
    """A family's size by its name.

    Raises:
        ValueError: if there is none of that name.
    """
    if not isinstance(name, str | int) or str(name) not in table:
        there = "there are" if len(table) > 1 else "there is"
        raise ValueError(f"{family} has no size {reprlib.repr(name)}; {there} {', '.join(table)}")
    return str(name)


def bounded(config: Any, family: str, **most: int) -> None:
    """That fields are whole numbers from 1 to a bound, or a few such numbers: nothing is built that no memory holds.

    Raises:
        ValueError: naming the field.
    """
    for name, bound in most.items():
        value = getattr(config, name)
        several = isinstance(value, tuple)
        good = all(isinstance(v, int) and 1 <= v <= bound for v in (value if several else [value]))
        if not good or (several and not 1 <= len(value) <= MOST_GRIDS):
            what = f"1 to {MOST_GRIDS} whole numbers" if several else "a whole number"
            raise ValueError(f"{family}'s {name} must be {what} from 1 to {bound}, got {reprlib.repr(value)}")


def grid_sides(config: Any, family: str, name: str) -> None:
    """That a field is a few sides of grids.

    Raises:
        ValueError: naming the field.
    """
    bounded(config, family, **{name: MOST_SIDE})


def fill(kind: type[T], given: Mapping[str, Any] | T | None, what: str) -> T:
    """A dataclass from a mapping of its fields; one that is filled already is returned as it is.

    Args:
        given: values of the fields' types; numbers may be written as text, as a command line gives them.
        what: how errors name it, for example ``VAR's tokenizer``.

    Raises:
        ValueError: if there are unknown fields, or values that cannot be used.
    """
    if isinstance(given, kind):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"the settings of {what} must be a mapping, not {reprlib.repr(given)}")
    values = dict(given or {})
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(values.keys() - set(known), key=str)
    if unknown:
        names = ", ".join(map(reprlib.repr, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
        raise ValueError(f"{what} has no {names}; it has {', '.join(known)}")
    hints = get_type_hints(kind)
    for name, value in values.items():
        try:
            values[name] = read(hints[name], value)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            right = getattr(hints[name], "__name__", "") if isinstance(hints[name], type) else str(hints[name])
            raise ValueError(f"{what}: {name} must be {right}, got {reprlib.repr(value)}") from error
    try:
        return kind(**values)
    except (TypeError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"the settings of {what} cannot be used: {error}") from error


def read(hint: Any, value: Any) -> Any:
    """The value as a type hint wants it, which may be text that spells it.

    Raises:
        TypeError, ValueError: if it is none.
    """
    options, origin = get_args(hint), get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        for option in sorted(options, key=lambda option: option is str):
            try:
                return read(option, value)
            except (TypeError, ValueError):
                continue
        raise TypeError
    if isinstance(value, str) and hint is not str:
        value = float(value) if hint is float else parse_yaml(value)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError
        each = options[:1] * len(value) if options[-1] is ... else options
        return tuple(read(one, item) for one, item in zip(each, value, strict=True))
    if hint is bool and value in (0, 1):
        return bool(value)
    if (hint is int and isinstance(value, Integral)) or (hint is float and isinstance(value, Real)):
        return cast(Any, hint)(value)
    if not isinstance(value, hint):
        raise TypeError
    return value
