"""Named points of a run at which a test can kill it or make something fail; nothing happens at them otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["armed", "point"]

_hook: Callable[[str], None] | None = None


def point(name: str) -> None:
    """Pass a point; whatever the armed hook raises is raised here."""
    if _hook is not None:
        _hook(name)


@contextmanager
def armed(hook: Callable[[str], None]) -> Iterator[None]:
    """Call ``hook`` with the name of every point passed, in whichever thread."""
    global _hook
    earlier, _hook = _hook, hook
    try:
        yield
    finally:
        _hook = earlier
