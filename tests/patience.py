"""How long tests wait. Limits are there to end what hangs; how fast a machine is, and how busy, fails no test."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["PATIENCE", "alive", "wait_for"]

PATIENCE = 1200.0
"""Seconds until something counts as hanging: the one limit of all tests. What is to outlast it takes twice as long."""


def wait_for(condition: Callable[[], bool]) -> None:
    """Return once the condition holds.

    Raises:
        AssertionError: if that takes longer than ``PATIENCE``.
    """
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE:.0f} s in vain"
        time.sleep(0.005)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
