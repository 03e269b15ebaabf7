"""Modes and settings of the process that a reward's call leaves changed are put back, one by one."""

from __future__ import annotations

import faulthandler
import io
import logging
import os
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as modules
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import BaseTorchDispatchMode

from patience import PATIENCE
from varl.rewards.guard import undisturbed

HELD: list[Any] = []
"""What was entered: it would be left when it is gone."""


def enter(context: AbstractContextManager[Any]) -> None:
    HELD.append(context)
    context.__enter__()


class Strict(BaseTorchFunctionMode):
    """Fails whatever torch is called for."""

    def __torch_function__(self, *given: Any) -> Any:
        raise TypeError("a mode was left")


def doubled(x: Any) -> Any:
    return x * 2


def outcome() -> Any:
    """What a small step of training gives."""
    weight, layer = torch.full((2,), 3.0, requires_grad=True), torch.nn.Linear(2, 1)
    torch.nn.init.ones_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    loss = (layer(weight) * weight).sum()
    loss.backward()
    optimizer.step()
    return loss.device, loss.tolist(), weight.tolist()


LEFT: dict[str, Callable[[], Any]] = {
    "forward hook": lambda: modules.register_module_forward_hook(lambda module, given, out: out * 0),
    "forward pre-hook": lambda: modules.register_module_forward_pre_hook(lambda module, given: doubled(given[0])),
    "optimizer hook": lambda: register_optimizer_step_pre_hook(lambda own, *_: own.param_groups[0].update(lr=5.0)),
    "saved tensors": lambda: enter(saved_tensors_hooks(doubled, doubled)),
    "two of saved tensors": lambda: [enter(saved_tensors_hooks(doubled, doubled)) for _ in range(2)],
    "device": lambda: enter(torch.device("meta")),
    "device in device": lambda: [enter(torch.device("meta")), enter(torch.device("cpu"))],
    "default device": lambda: torch.set_default_device("meta"),
    "function mode": lambda: enter(Strict()),
    "function mode in device": lambda: [enter(torch.device("meta")), enter(Strict())],
    "dispatch mode": lambda: [enter(BaseTorchDispatchMode()), enter(BaseTorchDispatchMode())],
    "transform": lambda: torch._C._functorch._vmap_increment_nesting(2, "error"),
}


def stacks() -> Any:
    return (
        torch.get_default_device(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._functorch.get_dynamic_layer_stack_depth(),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )


@pytest.mark.parametrize("name", LEFT)
def test_a_mode_of_torch_that_is_left_on_changes_no_step(name: str) -> None:
    before = outcome(), stacks()
    with undisturbed():
        LEFT[name]()
    assert (outcome(), stacks()) == before


def test_modes_of_the_caller_are_there_again() -> None:
    with saved_tensors_hooks(lambda x: x, doubled), torch.device("meta"), BaseTorchDispatchMode(), undisturbed():
        before = stacks()
        with undisturbed():
            for name in LEFT:
                if not name.startswith("function mode"):  # nothing else can be done within it
                    LEFT[name]()
        assert stacks() == before


def changed_umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def tracer(*_: Any) -> None:
    pass


SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "kernels": (lambda: torch.backends.mkldnn.enabled, lambda: setattr(torch.backends.mkldnn, "enabled", False)),
    "precision": (lambda: torch.backends.fp32_precision, lambda: setattr(torch.backends, "fp32_precision", "tf32")),
    "precision of convolutions": (
        lambda: torch.backends.mkldnn.conv.fp32_precision,
        lambda: setattr(torch.backends.mkldnn.conv, "fp32_precision", "bf16"),
    ),
    "attention": (torch.backends.cuda.math_sdp_enabled, lambda: torch.backends.cuda.enable_math_sdp(False)),
    "warnings": (lambda: list(warnings.filters), lambda: warnings.simplefilter("error")),
    "logging": (lambda: logging.getLogger("varl").isEnabledFor(50), lambda: logging.disable(50)),
    "umask": (changed_umask, lambda: os.umask(0o777)),
    "virtual": (
        lambda: signal.getitimer(signal.ITIMER_VIRTUAL), lambda: signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE),
    ),
    "profiling": (
        lambda: signal.getitimer(signal.ITIMER_PROF), lambda: signal.setitimer(signal.ITIMER_PROF, PATIENCE),
    ),
    "recursion": (sys.getrecursionlimit, lambda: sys.setrecursionlimit(500)),
    "trace": (sys.gettrace, lambda: sys.settrace(tracer)),
    "trace of threads": (threading.gettrace, lambda: threading.settrace(tracer)),
    "profile": (sys.getprofile, lambda: sys.setprofile(tracer)),
    "profile of threads": (threading.getprofile, lambda: threading.setprofile(tracer)),
    "last words": (lambda: sys.excepthook, lambda: setattr(sys, "excepthook", tracer)),
    "last words of threads": (lambda: threading.excepthook, lambda: setattr(threading, "excepthook", tracer)),
    "no output": (lambda: sys.stdout, lambda: setattr(sys, "stdout", None)),
    "errors elsewhere": (lambda: sys.stderr, lambda: setattr(sys, "stderr", io.StringIO())),
    "handler": (lambda: signal.getsignal(signal.SIGPROF), lambda: signal.signal(signal.SIGPROF, tracer)),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_of_the_process_is_put_back(name: str) -> None:
    get, change = SETTINGS[name]
    before = get()
    with undisturbed():
        change()
        inside = get()
    assert inside != before
    assert get() == before


@pytest.mark.parametrize("limit", [resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_AS])
def test_a_limit_is_put_back(limit: int) -> None:
    before = resource.getrlimit(limit)
    other = 2**45 if before[1] == resource.RLIM_INFINITY else before[1] - 1
    with undisturbed():
        resource.setrlimit(limit, (other, before[1]))
        assert resource.getrlimit(limit) != before
    assert resource.getrlimit(limit) == before


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("how", ["closed", "led elsewhere", "closed in Python"])
def test_a_standard_stream_goes_where_it_went(how: str, number: int, tmp_path: Path) -> None:
    stream = (sys.__stdin__, sys.__stdout__, sys.__stderr__)[number]
    assert stream is not None
    before = os.fstat(number)
    with undisturbed():
        if how == "closed":
            os.close(number)
        elif how == "led elsewhere":
            with (tmp_path / "elsewhere").open("w") as file:
                os.dup2(file.fileno(), number)
        else:
            stream.close()
    assert os.path.samestat(os.fstat(number), before)
    assert not stream.closed
    stream.write("")
    stream.flush()


@pytest.mark.parametrize("asked", [False, True])
def test_only_an_end_of_the_process_that_was_asked_for_inside_is_cancelled(
    asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``faulthandler`` has one, which may be the caller's."""
    calls, cancel, own = [], faulthandler.cancel_dump_traceback_later, faulthandler.dump_traceback_later
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: calls.append(cancel()))
    with undisturbed():
        if asked:
            faulthandler.dump_traceback_later(2 * PATIENCE, exit=True, file=sys.__stderr__)
    assert len(calls) == asked
    assert faulthandler.dump_traceback_later is own


def test_what_user_code_silences_stays_silent() -> None:
    """Many a module of a reward does so when it is imported, and means it."""
    with warnings.catch_warnings():
        warnings.resetwarnings()
        with undisturbed():
            warnings.filterwarnings("ignore", message="noise")
            warnings.filterwarnings("error", message="else")
        assert [one[0] for one in warnings.filters] == ["ignore"]
