"""Calling code that is not the library's: it cannot end the process, nor leave it changed."""

from __future__ import annotations

import gc
import locale
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from varl.run.signals import noted_by_the_run

__all__ = ["Told", "ending_forks", "no_exit", "said", "told", "undisturbed", "where"]

_EXIT = os._exit
_LIBRARY = Path(__file__).parents[1]
_lock = threading.Lock()
_calls, _process = 0, 0
"""How many calls are under way, and in which process: what they fork may end itself."""
_CUDNN = ("enabled", "benchmark", "deterministic", "allow_tf32")
_DEVICES = ("cpu", "cuda")
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGCHLD", "SIGPIPE", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]


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
    precision of products), numpy's handling of errors, the working directory, the locale, signal handlers and masks,
    alarms and the garbage collector. Not the random generators: rewards may draw from them.
    ``os._exit`` raises a ``SystemExit`` inside, for there is no other way to survive it; under a name that was bound
    before (``from os import _exit``) it does end the process. A child that it forks and that would leave it ends there.
    A ``KeyboardInterrupt`` passes as such only where Ctrl-C raises one: not while a run notes the signal instead.
    """
    noted = noted_by_the_run(signal.SIGINT)
    with ExitStack() as stack:
        stack.enter_context(no_exit())
        # Its end also takes back an inference mode that was entered inside and never left.
        grad = torch.is_grad_enabled()
        stack.enter_context(torch.inference_mode(torch.is_inference_mode_enabled()))
        torch.set_grad_enabled(grad)
        for setting in (*_torch_settings(), *_settings()):
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


def _putting_back(get: Callable[[], Any], put: Callable[[Any], object]) -> Callable[[], None]:
    """What sets a value again as it is now, if it has changed by then. What cannot be read or set stays as it is."""
    try:
        before = get()
    except (RuntimeError, OSError):
        return lambda: None

    def back() -> None:
        with suppress(RuntimeError):  # torch refuses to say its precision once it was set in two ways
            if get() == before:
                return
        with suppress(RuntimeError, OSError):
            put(before)

    return back


def _torch_settings() -> Iterator[Callable[[], None]]:
    yield _putting_back(torch.is_grad_enabled, torch.set_grad_enabled)
    yield _putting_back(torch.get_default_dtype, torch.set_default_dtype)
    # The CPU is what there is without a default; as a default it would slow every call down.
    cpu = torch.device("cpu")
    yield _putting_back(
        torch.get_default_device, lambda device: torch.set_default_device(None if device == cpu else device)
    )
    yield _putting_back(torch.get_num_threads, torch.set_num_threads)
    yield _putting_back(torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode)
    yield _putting_back(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)
    yield _putting_back(
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda modes: torch.autograd.set_detect_anomaly(*modes),
    )
    for device in _DEVICES:
        yield _putting_back(partial(torch.is_autocast_enabled, device), partial(torch.set_autocast_enabled, device))
        yield _putting_back(partial(torch.get_autocast_dtype, device), partial(torch.set_autocast_dtype, device))
    yield _putting_back(torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled)
    yield _putting_back(_autocast_nesting, _set_autocast_nesting)
    for name in _CUDNN:
        yield _putting_back(partial(getattr, torch.backends.cudnn, name), partial(setattr, torch.backends.cudnn, name))


def _autocast_nesting() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _set_autocast_nesting(depth: int) -> None:
    """Autocast keeps rounded weights until it is left altogether: weights of an earlier update, if it never is."""
    while _autocast_nesting() > depth:
        torch.autocast_decrement_nesting()
    while _autocast_nesting() < depth:
        torch.autocast_increment_nesting()
    torch.clear_autocast_cache()


def _settings() -> Iterator[Callable[[], None]]:
    yield _putting_back(np.geterr, lambda ways: np.seterr(**ways))
    yield _putting_back(_folder, _go_to)
    yield _putting_back(lambda: locale.setlocale(locale.LC_ALL), lambda name: locale.setlocale(locale.LC_ALL, name))
    yield _putting_back(gc.isenabled, lambda on: gc.enable() if on else gc.disable())
    if threading.current_thread() is threading.main_thread():
        yield _putting_back(_handlers, _set_handlers)
    if hasattr(signal, "setitimer"):
        yield _putting_back(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()), _set_mask)
        yield _no_alarm_left()


def _no_alarm_left() -> Callable[[], None]:
    """An alarm that was set inside would end the process later, without the handler that was meant for it."""
    before = signal.getitimer(signal.ITIMER_REAL)[0]
    return lambda: None if before else signal.setitimer(signal.ITIMER_REAL, 0) and None


def _folder() -> str | None:
    with suppress(OSError):  # it was removed
        return os.getcwd()
    return None


def _go_to(folder: str | None) -> None:
    if folder is not None:
        os.chdir(folder)


def _handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in _SIGNALS}


def _set_handlers(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        # None: it was not set by Python, which cannot set it again.
        if handler is not None and signal.getsignal(number) != handler:
            signal.signal(number, handler)


def _set_mask(mask: set[int]) -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


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
