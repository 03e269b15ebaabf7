"""What is put back around a reward's call, setting by setting, and how errors are told."""

from __future__ import annotations

import itertools
import locale
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import varl
from varl.rewards import guard, modes
from varl.rewards.base import FailureLog
from varl.rewards.checks import checked_text
from varl.rewards.guard import Told, told, undisturbed, where
from varl.rewards.python import PythonReward

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGCHLD", "SIGPIPE", "SIGUSR1", "SIGUSR2")


@pytest.mark.parametrize("name", SIGNALS)
def test_each_signal_keeps_its_handler(name: str) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    try:
        with undisturbed():
            signal.signal(number, lambda *_: None)
        assert signal.getsignal(number) == before
    finally:
        signal.signal(number, before)


def test_only_handlers_that_were_changed_are_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that Python has not set, None, it cannot set again."""
    calls: list[Any] = []
    held = {signal.SIGUSR1: "other", signal.SIGUSR2: "same", signal.SIGTERM: "strange"}
    monkeypatch.setattr(signal, "getsignal", held.get)
    monkeypatch.setattr(signal, "signal", lambda *given: calls.append(given))
    modes._set_handlers({signal.SIGUSR1: "mine", signal.SIGUSR2: "same", signal.SIGTERM: None})
    assert calls == [(signal.SIGUSR1, "mine")]


def test_an_alarm_of_the_caller_goes_on() -> None:
    """One that strikes once, so its interval is 0."""
    signal.setitimer(signal.ITIMER_REAL, 5000.0)
    try:
        with undisturbed():
            pass
        left, interval = signal.getitimer(signal.ITIMER_REAL)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert left > 1000
    assert interval == 0


def test_an_inference_mode_that_was_never_left_ends() -> None:
    entered = torch.inference_mode()
    with undisturbed():
        entered.__enter__()
        assert torch.is_inference_mode_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    with torch.no_grad():
        with undisturbed():
            torch.set_grad_enabled(True)
        assert not torch.is_grad_enabled()


def test_signals_that_were_held_back_are_not() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with undisturbed():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    after = signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert after == before
    with undisturbed():
        signal.setitimer(signal.ITIMER_REAL, 5000.0, 3.0)
    assert signal.setitimer(signal.ITIMER_REAL, 0) == (0, 0)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A working directory that may be removed."""
    before, own = Path.cwd(), tmp_path / "own"
    own.mkdir()
    os.chdir(own)
    yield own
    os.chdir(before)


def test_the_folder_is_gone_back_to(folder: Path) -> None:
    with undisturbed():
        os.chdir(folder.parent)
    assert Path.cwd() == folder


def test_a_folder_that_is_gone_is_not_gone_back_to(folder: Path) -> None:
    with undisturbed():
        os.chdir(folder.parent)
        folder.rmdir()
    assert Path.cwd() == folder.parent


def test_a_folder_that_was_gone_before_is_no_fault(folder: Path) -> None:
    folder.rmdir()
    with undisturbed():
        pass
    with pytest.raises(FileNotFoundError):
        Path.cwd()


def nesting() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def test_autocast_that_was_left_inside_is_entered_again() -> None:
    assert nesting() == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert nesting() == 1
        with undisturbed():
            torch.autocast_decrement_nesting()
            assert nesting() == 0
        assert nesting() == 1
        with undisturbed():
            torch.autocast_increment_nesting()
            torch.autocast_increment_nesting()
            assert nesting() == 3
        assert nesting() == 1
    assert nesting() == 0


CUDNN = torch.backends.cudnn
VALUES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], list[Any]]] = {
    "locale": (
        lambda: locale.setlocale(locale.LC_ALL), lambda name: locale.setlocale(locale.LC_ALL, name), ["C", "C.UTF-8"],
    ),
    "autocast on the CPU": (
        lambda: torch.is_autocast_enabled("cpu"), lambda on: torch.set_autocast_enabled("cpu", on), [False, True],
    ),
    "autocast on cuda": (
        lambda: torch.is_autocast_enabled("cuda"), lambda on: torch.set_autocast_enabled("cuda", on), [False, True],
    ),
    "autocast type on cuda": (
        lambda: torch.get_autocast_dtype("cuda"), lambda kind: torch.set_autocast_dtype("cuda", kind),
        [torch.float16, torch.bfloat16],
    ),
    "autocast cache": (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled, [True, False]),
    "anomalies": (
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda both: torch.autograd.set_detect_anomaly(*both),
        [(False, True), (True, True), (True, False), (False, False)],
    ),
    "default device": (
        lambda: str(torch.get_default_device()),
        lambda name: torch.set_default_device(None if name == "cpu" else name),
        ["cpu", "meta"],
    ),
    **{
        f"cudnn {name}": (
            lambda name=name: getattr(CUDNN, name), lambda on, name=name: setattr(CUDNN, name, on), [True, False],
        )
        for name in ("enabled", "benchmark", "deterministic", "allow_tf32")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_each_setting_is_put_back_from_each_value_to_each(name: str) -> None:
    get, put, values = VALUES[name]
    before = get()
    try:
        for old, new in itertools.permutations(values, 2):
            put(old)
            with undisturbed():
                put(new)
                assert get() == new
            assert get() == old
    finally:
        put(before)


def test_no_default_device_is_none_again() -> None:
    """A CPU that is set as one slows every call down."""
    before = torch._C._len_torch_function_stack()
    with undisturbed():
        torch.set_default_device("meta")
    assert torch._C._len_torch_function_stack() == before


def test_an_exit_ends_calls_only_while_one_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os._exit
    with undisturbed():
        inner = os._exit
        with undisturbed():
            assert os._exit is inner
        assert os._exit is inner  # the outer call goes on
        with pytest.raises(SystemExit, match=r"^os\._exit\(3\)$"):
            os._exit(3)
        with pytest.raises(SystemExit, match=r"^os\._exit\(0\)$"):
            inner()  # type: ignore[call-arg]
    assert os._exit is real
    assert inner.really is real  # type: ignore[attr-defined]
    ended: list[int] = []
    monkeypatch.setattr(guard, "_EXIT", ended.append)
    inner(5)  # kept beyond the call, it is what it was
    assert ended == [5]


def caught(do: Callable[[], Any]) -> BaseException:
    try:
        do()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def test_errors_are_told_by_type_and_message() -> None:
    assert told(ValueError()) == "ValueError"
    assert told(ValueError("bad")) == "ValueError: bad"
    assert told(SystemExit(3)) == "SystemExit: 3"
    assert told(guard._Exit("os._exit(3)")) == "SystemExit: os._exit(3)"
    assert told(Told("KeyError: 'a'", "a.py, line 2")) == "KeyError: 'a'"
    assert Told("a").place == ""


class Mute(ValueError):
    def __str__(self) -> str:
        return self.args[0]()  # type: ignore[no-any-return]


@pytest.mark.parametrize("says", [lambda: 5, lambda: 1 / 0, lambda: os._exit(0), lambda: sys.exit()])
def test_errors_that_cannot_be_told_are_told_by_type(says: Callable[[], Any]) -> None:
    def fn(images: Any, prompts: Any) -> Any:
        raise Mute(says)

    fn.check = partial(fn, None)  # type: ignore[attr-defined]
    reward = PythonReward(fn, "mine")
    with undisturbed():
        assert told(Mute(says)) == "Mute"
    assert reward(torch.zeros(2, 3, 4, 4), [varl.Prompt()] * 2).failed.all()
    assert reward.failures.reasons == {"Mute": 2}
    with pytest.raises(ValueError, match=r"^reward 'mine': Mute$"):
        reward.check([])


def running(code: str, file: Path) -> Callable[[], Any]:
    """What runs code that says it is of a file."""
    return lambda: exec(compile(code, str(file), "exec"), {"checked_text": checked_text})


LIBRARY = Path(varl.__file__).parent


def test_where_errors_arise() -> None:
    assert where(ValueError("never raised")) == "nowhere"
    assert where(Told("a", "a.py, line 2")) == "a.py, line 2"
    assert where(SyntaxError("bad", ("/a/b.py", 7, 1, "x"))) == "b.py, line 7"
    # Some errors that are not of syntax name a file, and some of syntax none.
    assert where(SyntaxError("bad", (5, 7, 1, "x"))) == "nowhere"  # type: ignore[arg-type]
    missing = caught(running("\nopen('/there/is/none')", Path("/theirs/a.py")))
    assert where(missing) == "a.py, line 2"
    assert where(caught(running("\n\nraise SyntaxError('x')", Path("/theirs/a.py")))) == "a.py, line 3"


def test_a_line_of_ones_own_comes_before_those_of_others() -> None:
    code = "\ndef inner():\n    json.loads('x')\nimport json\ninner()\n"
    error = caught(running(code, Path("/theirs/a.py")))
    assert where(error, "/theirs/a.py") == "a.py, line 3"  # the last of that file
    assert where(error, "/theirs/other.py").startswith("decoder.py, line ")
    assert where(error).startswith("decoder.py, line ")


def test_a_line_that_is_not_the_librarys_comes_before_those_that_are() -> None:
    for file in (Path("/theirs/a.py"), LIBRARY.parent / "beside.py"):
        error = caught(running("\n\nchecked_text(3)", file))
        assert where(error) == f"{file.name}, line 3"
    # Where all are the library's, it is the last.
    error = caught(running("\n\n\nchecked_text(3)", LIBRARY / "a.py"))
    tb = error.__traceback__
    while tb is not None and Path(tb.tb_frame.f_code.co_filename) != LIBRARY / "a.py":
        tb = tb.tb_next
    assert tb is not None
    assert where(error.with_traceback(tb)).startswith("checks.py, line ")
    assert where(error.with_traceback(tb.tb_next)).startswith("checks.py, line ")


def test_failures_are_warned_of_with_their_place(caplog: pytest.LogCaptureFixture) -> None:
    scope: dict[str, Any] = {}
    exec(compile("\ndef fn(images, prompts):\n    raise KeyError('a')", "/theirs/a.py", "exec"), scope)
    reward = PythonReward(scope["fn"], "mine")
    with caplog.at_level(logging.WARNING):
        assert reward(torch.zeros(2, 3, 4, 4), [varl.Prompt()] * 2).failed.all()
    words = "reward mine: pictures failed and are left out, not scored 0: KeyError: 'a' (a.py, line 3)"
    assert [record.message for record in caplog.records] == [words]
    assert reward.failures.reasons == {"KeyError: 'a'": 2}


def test_long_reasons_are_cut() -> None:
    log = FailureLog("x")
    log.add("a" * 500)
    log.add("b" * 501)
    assert log.reasons == {"a" * 500: 1, "b" * 497 + "...": 1}
