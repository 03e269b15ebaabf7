"""JSON that a user wrote: no key twice, of which Python's reader silently takes the last."""

from __future__ import annotations

import json
import reprlib
from typing import Any

__all__ = ["RepeatedKey", "parse_json"]


class RepeatedKey(ValueError):
    """JSON that gives one key of an object twice; the message says which, and both values."""


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        RepeatedKey: if an object in it gives a key twice.
        ValueError: if it is no JSON (``json.JSONDecodeError``), or has a number of too many digits.
        RecursionError: if it nests too deeply.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            name, first, again = map(reprlib.repr, (key, found[key], value))
            raise RepeatedKey(f"gives {name} again, {again} after {first}")
        found[key] = value
    return found
