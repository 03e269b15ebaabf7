"""Calling code that is not the library's: it cannot end the process, nor leave it changed."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from varl.rewards.modes import settings, torch_settings
from varl.run.signals import noted_by_the_run

__all__ = ["Told", "ending_forks", "no_exit", "said", "told", "undisturbed", "where"]

_EXIT = os._exit
_LIBRARY = Path(__file__).parents[1]
_lock = threading.Lock()
_calls, _process = 0, 0
"""How many calls are under way, and in which process: what they fork may end itself."""


class _Exit(SystemExit):
    """What ``os._exit`` does inside a guarded call."""


def _exit(status: int = 0) -> NoReturn:
    if _calls and os.getpid() == _process:
        raise _Exit(f"os._exit({status})")
    _EXIT(status)


_exit.really = _EXIT  # type: ignore[attr-defined]


@contextmanager
def undisturbed() -> Iterator[None]:
    """Around a call of someone else's code: what it changes in the process as a whole is put back, whatever it raises.

    These are torch's modes (gradients, inference, autocast, default type and device, threads, determinism, anomalies,
    precision of products, kernels, modes of functions, dispatch and transforms, hooks of all modules and of saved
    tensors), numpy's handling of errors, filters of warnings, the working directory, the umask, the locale, the
    standard streams, signal handlers and masks, timers, limits of time and size, tracing and the garbage collector. Not
    the random generators: rewards may draw from them.
    ``os._exit`` raises a ``SystemExit`` inside, for there is no other way to survive it; under a name that was bound
    before (``from os import _exit``) it does end the process. A child that the code forks ends where it would leave the
    call.
    A ``KeyboardInterrupt`` passes as such only where Ctrl-C raises one: not while a run notes the signal instead.
    """
    noted = noted_by_the_run(signal.SIGINT)
    with ExitStack() as stack:
        stack.enter_context(no_exit())
        # Its end also takes back an inference mode that was entered inside and never left.
        grad = torch.is_grad_enabled()
        stack.enter_context(torch.inference_mode(torch.is_inference_mode_enabled()))
        torch.set_grad_enabled(grad)
        for setting in (*torch_settings(), *settings()):
            stack.callback(setting)
        try:
            with ending_forks():
                yield
        except KeyboardInterrupt as error:
            if not noted:
                raise
            raise Told(told(error), where(error)) from error


@contextmanager
def ending_forks() -> Iterator[None]:
    """Around code that may fork: a child that returns or raises ends there, or it would go on as a second run."""
    process = os.getpid()
    try:
        yield
    except BaseException as error:
        if os.getpid() == process:
            raise
        _end_fork(error)
    if os.getpid() != process:
        _end_fork(SystemExit(0))


def _end_fork(error: BaseException) -> NoReturn:
    """End a child as Python would, but for what its parent has registered for the exit."""
    try:
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
    finally:
        code = getattr(error, "code", 1)
        _EXIT(0 if code is None else code & 255 if isinstance(code, int) else 1)


@contextmanager
def no_exit() -> Iterator[None]:
    """Within it ``os._exit`` raises a ``SystemExit``: in another thread, that ends the thread alone."""
    global _calls, _process
    with _lock:
        _calls, _process, os._exit = _calls + 1, os.getpid(), _exit
    try:
        yield
    finally:
        with _lock:
            _calls -= 1
            if not _calls:
                os._exit = _EXIT


class Told(Exception):
    """An error of another process, which says of what type it is.

    Attributes:
        place: where it arose, if that is known.
    """

    def __init__(self, what: str, place: str = "") -> None:
        super().__init__(what)
        self.place = place


def said(error: BaseException) -> str:
    """What an error says; nothing if its own ``__str__`` fails."""
    try:
        with no_exit():
            return str(error)
    except BaseException:
        return ""


def told(error: BaseException) -> str:
    """An error as one reads it: its type, and what it says."""
    text = said(error)
    if isinstance(error, Told):
        return text
    kind = "SystemExit" if isinstance(error, _Exit) else type(error).__name__
    return f"{kind}: {text}" if text else kind


def where(error: BaseException, file: str | None = None) -> str:
    """Where an error arose, as "reward.py, line 3": the last line of that file that was met, else the last line that is
    not the library's, else the last of all."""
    if isinstance(error, Told):
        return error.place
    if isinstance(error, SyntaxError) and isinstance(error.filename, str):
        return f"{Path(error.filename).name}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not Path(frame.filename).is_relative_to(_LIBRARY)]
    own = [frame for frame in frames if frame.filename == file] or theirs or frames[-1:]
    return f"{Path(own[-1].filename).name}, line {own[-1].lineno}" if own else "nowhere"
