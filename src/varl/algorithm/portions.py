"""Work in portions, so that its memory is bounded whatever the input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["few_at_a_time"]

MOST = 2**22
"""Numbers in an array at a time: 32 MB of float64."""


def few_at_a_time(sizes: Sequence[int], most: int) -> Iterator[range]:
    """Consecutive items, at most ``most``, whose sizes add up to at most ``MOST``; or a single larger one."""
    first, total = 0, 0
    for i, size in enumerate(sizes):
        if i > first and (i - first == most or total + size > MOST):
            yield range(first, i)
            first, total = i, 0
        total += size
    if len(sizes) > first:
        yield range(first, len(sizes))
