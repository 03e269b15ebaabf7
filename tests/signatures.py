"""What the public functions and classes of a module take by default."""

from __future__ import annotations

import inspect
from dataclasses import MISSING
from types import ModuleType
from typing import Any

__all__ = ["defaults"]


def defaults(module: ModuleType) -> dict[str, dict[str, Any]]:
    """By the names of ``__all__``: the parameters that have a default, with it; not those that are made anew."""
    found = {}
    for name in module.__all__:
        value = getattr(module, name)
        if not callable(value) or getattr(value, "__module__", None) != module.__name__:
            continue
        if isinstance(value, type) and issubclass(value, BaseException):
            continue
        parameters = inspect.signature(value).parameters.values()
        given = {p.name: p.default for p in parameters if p.default is not p.empty}
        plain = {k: v for k, v in given.items() if not callable(v) and v is not MISSING and "factory" not in repr(v)}
        if plain:
            found[name] = plain
    return found
