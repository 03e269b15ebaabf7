"""What code may leave changed in a process, and how it is put back."""

from __future__ import annotations

import faulthandler
import gc
import io
import locale
import logging
import os
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.modules.module as torch_module
import torch.optim.optimizer as torch_optimizer
import torch.utils._device as torch_device
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["settings", "torch_settings"]

_DEVICES = ("cpu", "cuda")
_SIGNALS = [number for number in signal.valid_signals() if isinstance(number, signal.Signals)]
_TIMERS = [getattr(signal, name) for name in ("ITIMER_REAL", "ITIMER_VIRTUAL", "ITIMER_PROF") if hasattr(signal, name)]
_LIMITS = (resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_AS)
_DUMP_LATER = faulthandler.dump_traceback_later
_PRECISIONS = [
    torch.backends,
    *(backend for name in ("conv", "rnn", "matmul") if (backend := getattr(torch.backends.mkldnn, name, None))),
    *(backend for name in ("conv", "rnn") if (backend := getattr(torch.backends.cudnn, name, None))),
]
_TORCH_FLAGS = {
    torch.backends.cudnn: ("enabled", "benchmark", "deterministic", "allow_tf32"),
    torch.backends.mkldnn: ("enabled", "deterministic"),
    **dict.fromkeys(_PRECISIONS, ("fp32_precision",)),
    torch_module: ("_global_is_full_backward_hook",),
    torch_device: ("CURRENT_DEVICE",),
}
_FLAGS = {sys: ("stdin", "stdout", "stderr", "excepthook"), threading: ("excepthook",)}
_HOOKS = [
    hooks
    for module in (torch_module, torch_optimizer)
    for name, hooks in vars(module).items()
    if name.startswith("_global_") and isinstance(hooks, dict)
]
"""The hooks of all modules and of all optimizers."""


def _putting_back(get: Callable[[], Any], put: Callable[[Any], object]) -> Callable[[], None]:
    """What sets a value again as it is now, if it has changed by then. What cannot be read or set stays as it is."""
    try:
        before = get()
    except (RuntimeError, OSError, AttributeError):  # another version of torch, or another system, may not have it
        return lambda: None

    def back() -> None:
        with suppress(RuntimeError):  # torch refuses to say its precision once it was set in two ways
            if get() == before:
                return
        with suppress(RuntimeError, OSError, ValueError):
            put(before)

    return back


def _putting_back_flags(flags: Mapping[Any, Sequence[str]]) -> Iterator[Callable[[], None]]:
    for owner, names in flags.items():
        for name in names:
            yield _putting_back(partial(getattr, owner, name), partial(setattr, owner, name))


def torch_settings() -> Iterator[Callable[[], None]]:
    """What sets each of torch's modes again as it is now.

    The last ones are to be called first: modes of the kind that may stand in the way of asking for the others.
    """
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
    for kind in ("flash", "mem_efficient", "math", "cudnn"):  # of attention; those of the CPU heed them too
        cuda = torch.backends.cuda
        yield _putting_back(getattr(cuda, f"{kind}_sdp_enabled"), getattr(cuda, f"enable_{kind}_sdp"))
    yield from _putting_back_flags(_TORCH_FLAGS)
    for hooks in _HOOKS:
        yield _putting_back(partial(dict, hooks), partial(_refill, hooks))
    yield _putting_back(_saved_tensors_hooks, _set_saved_tensors_hooks)
    yield _putting_back(
        lambda: torch._C._functorch.get_dynamic_layer_stack_depth(),
        lambda depth: torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth),
    )
    yield _putting_back(lambda: torch._C._len_torch_dispatch_stack(), _leave_dispatch_modes)
    yield _putting_back(_function_modes, _set_function_modes)


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


def _refill(hooks: dict[Any, Any], before: Mapping[Any, Any]) -> None:
    hooks.clear()
    hooks.update(before)


def _saved_tensors_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _set_saved_tensors_hooks(before: Any) -> None:
    while (top := _saved_tensors_hooks()) is not None and top != before:
        torch._C._autograd._pop_saved_tensors_default_hooks()


def _leave_dispatch_modes(depth: int) -> None:
    while (size := torch._C._len_torch_dispatch_stack()) > depth:
        # Not the mode's own end, which may do anything.
        TorchDispatchMode.__exit__(torch._C._get_dispatch_stack_at(size - 1), None, None, None)


def _function_modes() -> tuple[list[Any], Any]:
    """The stack of modes, among them that of ``with torch.device``; and which of them the default device is."""
    stack = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
    return stack, getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)


def _set_function_modes(before: tuple[list[Any], Any]) -> None:
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()
    for mode in before[0]:
        torch._C._push_on_torch_function_stack(mode)
    torch._GLOBAL_DEVICE_CONTEXT.device_context = before[1]


def settings() -> Iterator[Callable[[], None]]:
    """What sets everything else of the process again as it is now.

    The last ones are to be called first: what is traced may fail at any line.
    """
    yield _putting_back(np.geterr, lambda ways: np.seterr(**ways))
    yield partial(_no_new_errors, list(warnings.filters))
    yield _putting_back(lambda: logging.root.manager.disable, logging.disable)
    yield _putting_back(_folder, _go_to)
    yield _putting_back(_umask, os.umask)
    yield _putting_back(lambda: locale.setlocale(locale.LC_ALL), lambda name: locale.setlocale(locale.LC_ALL, name))
    yield _putting_back(gc.isenabled, lambda on: gc.enable() if on else gc.disable())
    for number, stream in enumerate((sys.__stdin__, sys.__stdout__, sys.__stderr__)):
        yield partial(_reopen, stream, number)
        yield _descriptor_kept(number)
    yield from _putting_back_flags(_FLAGS)
    if threading.current_thread() is threading.main_thread():
        yield _putting_back(_handlers, _set_handlers)
    if hasattr(signal, "setitimer"):
        yield _putting_back(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()), _set_mask)
    for limit in _LIMITS:
        yield _putting_back(partial(resource.getrlimit, limit), partial(resource.setrlimit, limit))
    for timer in _TIMERS:
        yield _no_alarm_left(timer)
    yield _no_dump_left()
    yield _putting_back(sys.getrecursionlimit, sys.setrecursionlimit)
    for of in (threading, sys):
        yield _putting_back(of.gettrace, of.settrace)
        yield _putting_back(of.getprofile, of.setprofile)


def _no_new_errors(before: Sequence[Any]) -> None:
    """Warnings that were made errors would stop the run; what user code silences stays silent."""
    left = [one for one in warnings.filters if one[0] != "error" or one in before]
    if len(left) < len(warnings.filters):
        warnings.resetwarnings()
        warnings.filters[:] = left  # type: ignore[index]


def _no_alarm_left(timer: int) -> Callable[[], None]:
    """An alarm that was set inside would end the process later, without the handler that was meant for it."""
    before = signal.getitimer(timer)[0]
    return lambda: None if before else signal.setitimer(timer, 0) and None


def _no_dump_left() -> Callable[[], None]:
    """``faulthandler`` does not say whether it is to end the process later: it is cancelled if it was asked inside."""
    asked = []

    def noted(*args: Any, **options: Any) -> None:
        asked.append(True)
        _DUMP_LATER(*args, **options)

    def back() -> None:
        faulthandler.dump_traceback_later = _DUMP_LATER
        if asked:
            faulthandler.cancel_dump_traceback_later()

    faulthandler.dump_traceback_later = noted
    return back


def _umask() -> int:
    """Asking the system would change it for a moment, in which another thread may make a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1], 8) for line in lines if line.startswith("Umask:"))


def _descriptor_kept(number: int) -> Callable[[], None]:
    """What has a standard stream go to the same file again, also where it was closed or led elsewhere."""
    try:
        kept = os.dup(number)
        file = os.fstat(kept)
    except OSError:  # there was none
        return lambda: None

    def back() -> None:
        with suppress(OSError):
            if os.path.samestat(os.fstat(kept), file):  # not one that took its place, if all files were closed
                os.dup2(kept, number)
                os.close(kept)

    return back


def _reopen(stream: Any, number: int) -> None:
    """Open a closed standard stream again, in place: whoever holds it goes on with it."""
    if isinstance(stream, io.TextIOWrapper) and stream.closed:
        with suppress(OSError):
            buffer = open(number, "wb" if number else "rb", closefd=False)  # noqa: SIM115
            stream.__init__(  # type: ignore[misc]
                buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=stream.line_buffering
            )


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
