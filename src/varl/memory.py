"""How the C library keeps memory between large tensors."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed", "mallopt"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Parameters of ``mallopt``."""


def mallopt(**values: int) -> bool:
    """Set parameters of glibc's malloc, such as ``M_MMAP_MAX=0``; False if the C library has none, or refuses."""
    function = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    return function is not None and all(bool(function(globals()[name], value)) for name, value in values.items())


def keep_freed() -> bool:
    """Have malloc hand freed memory out again instead of giving it back to the kernel; returns whether it will.

    By default glibc maps every block above 32 MB anew, and the kernel clears each of its pages: decoding spends about
    half of its time on that. What a process has once taken, it now keeps.
    """
    return mallopt(M_MMAP_MAX=0, M_TRIM_THRESHOLD=2**31 - 1)
