"""Seconds of the stages of an update, on the device's own clock: nobody waits for a GPU in order to time it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["Clock"]


class Clock:
    """Times stages by name; stages inside another count for themselves.

    On a GPU a stage lasts from where the GPU comes to its beginning to where it comes to its end, so that work which
    was only begun counts where it was asked for.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device if device.type == "cuda" else None
        self._marks: list[tuple[str, float | torch.cuda.Event]] = [("", self._now())]
        self._open = [""]

    def _now(self) -> float | torch.cuda.Event:
        if self._gpu is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._gpu))
        return event

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is inside."""
        self._open.append(name)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def _mark(self) -> None:
        self._marks.append((self._open[-1], self._now()))

    def seconds(self) -> dict[str, float]:
        """Of every stage since the last call, when the device has come to the end of all of them."""
        marks, self._marks = self._marks, [(self._open[-1], self._now())]
        if self._gpu is not None:
            torch.cuda.synchronize(self._gpu)
        found: dict[str, float] = {}
        for (name, start), (_, end) in zip(marks, [*marks[1:], self._marks[0]], strict=True):
            found[name] = found.get(name, 0.0) + _between(start, end)
        del found[""]
        return found


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
