"""The errors that users are meant to read without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["InputError", "Interrupted", "RunError", "checking"]


class InputError(Exception):
    """Something given by the user cannot be used; the message says what, and what would be right."""


class RunError(RuntimeError):
    """A run that was under way cannot go on; the message says why. What it has reached is on the disk."""


class Interrupted(Exception):
    """A run was asked to stop by a signal, and has: its checkpoint is written.

    Attributes:
        signal: the signal's number.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


@contextmanager
def checking() -> Iterator[None]:
    """Around what happens before work starts: whatever is wrong there is wrong with the input."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, OSError, ImportError, RuntimeError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise InputError(str(message)) from error
