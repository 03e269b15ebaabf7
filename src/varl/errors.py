"""The errors that users are meant to read without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["InputError", "Interrupted", "RunError", "checking", "naming_memory", "out_of_memory"]


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


ALLOCATORS = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory", "CUDA out of memory")
"""What torch says where memory is missing, in errors that have no type of their own."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on a GPU or not."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATORS)


@contextmanager
def naming_memory(remedy: str) -> Iterator[None]:
    """Around work that may need more memory than there is.

    Args:
        remedy: what to do then, for example ``lower run.micro_batch``.

    Raises:
        RunError: in place of an error that says that there is no memory left; it says what torch said, and the remedy.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RunError) or not out_of_memory(error):
            raise
        said = str(error).strip().splitlines()
        raise RunError(f"out of memory{f' ({said[0]})' if said else ''}; {remedy}") from error


@contextmanager
def checking() -> Iterator[None]:
    """Around what happens before work starts: an error of those kinds that say so is one of the input.

    The library raises ValueError, OSError, ImportError and RunError for what it was given. Everything else is a bug,
    whose traceback is worth more than its message.

    Raises:
        InputError: with the message of the error.
    """
    try:
        with naming_memory("ask for less, or choose a smaller model"):
            yield
    except (ValueError, OSError, ImportError, RunError) as error:
        raise InputError(str(error)) from error
