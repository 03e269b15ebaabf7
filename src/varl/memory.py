"""How the C library keeps memory between large tensors."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed"]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's ``mallopt``."""


def keep_freed() -> bool:
    """Have malloc hand freed memory out again instead of giving it back to the kernel; returns whether it will.

    By default glibc maps every block above 32 MB anew, and the kernel clears each of its pages: decoding spends about
    half of its time on that. What a process has once taken, it now keeps.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
