"""The one error that users are meant to read without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["InputError", "checking"]


class InputError(Exception):
    """Something given by the user cannot be used; the message says what, and what would be right."""


@contextmanager
def checking() -> Iterator[None]:
    """Around what happens before work starts: whatever is wrong there is wrong with the input."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, OSError, ImportError, RuntimeError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise InputError(str(message)) from error
