"""SIGTERM and SIGINT while a run is under way."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from varl.errors import Interrupted

__all__ = ["Interrupts", "exit_at_once", "leave_to_the_run", "noted_by_the_run"]

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_DEFAULTS: dict[int, Any] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
_masks = threading.local()


def _forget_in_child() -> None:
    """A child made by fork handles signals as any Python process: whoever made it must be able to end it. What comes
    before the handlers are put back waits until then, or Python would forget it."""
    for number, default in _DEFAULTS.items():
        if noted_by_the_run(number):
            signal.signal(number, default)
    _unblock()


def _block() -> None:
    _masks.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.mask)


def noted_by_the_run(number: int) -> bool:
    """Whether a signal is noted by a run in this process, or left to the run that started it."""
    handler = signal.getsignal(number)
    return handler is _ignore or isinstance(getattr(handler, "__self__", None), Interrupts)


def _ignore(number: int, _: FrameType | None) -> None:
    """Not ``SIG_IGN``, which programs started by this process would inherit."""


def leave_to_the_run() -> None:
    """Ignore SIGTERM and SIGINT in this process, but not in those that it starts.

    Raises:
        ValueError: if this is not the main thread.
    """
    for number in SIGNALS:
        signal.signal(number, _ignore)


def exit_at_once(status: int) -> None:
    """``os._exit``, also while a reward is called and that name stands for something else."""
    getattr(os._exit, "really", os._exit)(status)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_forget_in_child)


class Interrupts:
    """Within it, the first SIGTERM or SIGINT is noted, for the run to stop at its next whole update; the second ends
    the process at once, with the exit code that shells give for that signal (128 + its number). Processes that this one
    forks, such as those of ``multiprocessing.Pool``, handle both as usual.

    Only the main thread can catch signals; in another one this does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        # torchrun passes on to its workers the signal that the terminal or scheduler has sent them already.
        self._echo_s = 1.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        self._when = 0.0
        self._earlier: dict[int, Any] = {}

    @property
    def error(self) -> Interrupted | None:
        """What to stop with, if a signal came."""
        return None if self.received is None else Interrupted(self.received)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received, self._when = number, time.monotonic()
            # Not print or logging: the signal may have come in the middle of one.
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: this update is finished and saved first; a second signal exits at once\n".encode())
        elif time.monotonic() - self._when >= self._echo_s:
            exit_at_once(128 + number)

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
