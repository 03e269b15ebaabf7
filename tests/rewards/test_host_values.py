"""What passes between a host and its process, to the letter.

With connections and processes that only write down what is asked of them: real ones are slow to start.
"""

from __future__ import annotations

import multiprocessing
from types import SimpleNamespace
from typing import Any

import pytest

from varl.rewards import host
from varl.rewards.guard import Told
from varl.rewards.host import Host, NotStarted, _Fault, _serve

from .moody import Moody, Unstartable


class Wire:
    """One end of a pipe: what comes is written down before, what is sent after."""

    def __init__(self, *comes: Any, silent: bool = False) -> None:
        self.comes, self.sent, self.polled, self.silent = list(comes), [], [], silent  # type: ignore[var-annotated]
        self.closed = False

    def send(self, value: Any) -> None:
        self.sent.append(value)

    def recv(self) -> Any:
        if not self.comes:
            raise EOFError
        value = self.comes.pop(0)
        if isinstance(value, BaseException):
            raise value
        return value

    def poll(self, timeout: float | None) -> bool:
        self.polled.append(timeout)
        return not self.silent

    def close(self) -> None:
        self.closed = True


class Process:
    """A process that does nothing, and ends when it is killed."""

    pid = 7

    def __init__(self, **given: Any) -> None:
        self.given, self.asked, self.exitcode = given, [], None  # type: ignore[var-annotated]
        self.alive = True

    def start(self) -> None:
        self.asked.append("start")

    def join(self, seconds: float) -> None:
        self.asked.append(seconds)
        self.exitcode = 3 if len(self.asked) > 1 else None

    def kill(self) -> None:
        self.asked.append("kill")

    def is_alive(self) -> bool:
        return self.alive


def started(monkeypatch: pytest.MonkeyPatch, *wires: Wire) -> tuple[list[Process], list[Wire]]:
    """Processes and their ends of the pipes, as hosts come to start them, each with the next wire."""
    processes: list[Process] = []
    theirs: list[Wire] = []
    left = list(wires)

    def pipe() -> tuple[Wire, Wire]:
        theirs.append(Wire())
        return left.pop(0), theirs[-1]

    def process(**given: Any) -> Process:
        processes.append(Process(**given))
        return processes[-1]

    monkeypatch.setattr(host, "_context", lambda: SimpleNamespace(Pipe=pipe, Process=process))
    return processes, theirs


def test_a_process_says_that_it_is_ready_and_answers_until_the_pipe_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(host, "leave_to_the_run", lambda: left.append(1))

    def answer(request: int) -> float:
        return 6 / request

    wire = Wire(2, 0, 3)
    _serve(lambda: answer, wire)  # type: ignore[arg-type]
    ready, three, fault, two = wire.sent
    assert (ready, three, two) == ("ready", 3.0, 2.0)
    assert fault == _Fault("ZeroDivisionError: division by zero", fault.place)
    assert fault.place.startswith("test_host_values.py, line ")
    assert left == [1]

    def leave(request: Any) -> Any:
        raise KeyboardInterrupt

    wire = Wire(1)
    _serve(lambda: leave, wire)  # type: ignore[arg-type]
    assert [wire.sent[0], wire.sent[1].what] == ["ready", "KeyboardInterrupt"]


def test_a_process_that_cannot_be_made_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "leave_to_the_run", lambda: None)
    wire = Wire(1)
    _serve(Unstartable, wire)  # type: ignore[arg-type]
    (fault,) = wire.sent
    assert fault.what == "RuntimeError: no models here"
    assert fault.place.startswith("moody.py, line ")
    assert wire.comes == [1]


def test_where_there_is_no_fork_server_processes_are_spawned(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    server = SimpleNamespace(set_forkserver_preload=loaded.append)
    monkeypatch.setattr(multiprocessing, "get_context", {"forkserver": server, "spawn": "spawned"}.__getitem__)
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert host._context() == "spawned"  # type: ignore[comparison-overlap]
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["fork", "spawn", "forkserver"])
    assert host._context() is server  # type: ignore[comparison-overlap]
    assert loaded == [["varl.rewards.worker"]]


def test_a_process_is_started_once_and_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    processes, theirs = started(monkeypatch, Wire("ready", "one", "two"))
    one = Host(Moody, "reader", "a picture", 5.0, 9.0)
    assert (one.started, one.process, one.connection) == (False, None, None)
    assert one.ask("first") == "one"
    assert one.ask("second") == "two"
    (process,) = processes
    assert process.given == {"target": _serve, "args": (Moody, theirs[0]), "name": "varl-host", "daemon": False}
    assert process.asked == ["start"]
    assert theirs[0].closed
    wire = one.connection
    assert isinstance(wire, Wire)
    assert (wire.sent, wire.polled, wire.closed) == (["first", "second"], [9.0, 5.0, 5.0], False)
    assert (one.started, one.crashes, one.timeouts) == (True, 0, 0)
    one.close()
    assert process.asked == ["start", 0.0, "kill", 5.0]
    assert wire.closed
    assert (one.process, one.connection) == (None, None)
    one.close()  # again, of nothing


def test_a_process_has_time_to_end_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    processes, _ = started(monkeypatch, Wire("ready"))
    one = Host(Moody, "reader", "a picture", None)
    one.start()
    one.close(2.0)
    assert processes[0].asked == ["start", 2.0, "kill", 5.0]
    assert one.start_timeout_s == 120.0


def test_a_dead_process_is_replaced_before_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Wire("ready", "one"), Wire("ready", "two")
    processes, _ = started(monkeypatch, first, second)
    one = Host(Moody, "reader", "a picture", 5.0)
    assert one.ask(1) == "one"
    processes[0].alive = False
    assert one.ask(2) == "two"
    assert (first.closed, second.closed, second.sent) == (True, False, [2])
    assert processes[0].asked == ["start", 0.0, "kill", 5.0]


def test_an_error_of_the_process_costs_the_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    processes, _ = started(monkeypatch, Wire("ready", _Fault("ValueError: no", "a.py, line 3"), "fine"))
    one = Host(Moody, "reader", "a picture", 5.0)
    with pytest.raises(Told) as raised:
        one.ask(1)
    assert (str(raised.value), raised.value.place) == ("ValueError: no", "a.py, line 3")
    assert one.ask(2) == "fine"
    assert len(processes) == 1
    assert (one.crashes, one.timeouts) == (0, 0)


@pytest.mark.parametrize("error", [EOFError(), OSError("torn"), ConnectionResetError()])
def test_a_crash_is_counted_and_said(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    wire = Wire("ready", error)
    processes, _ = started(monkeypatch, wire, Wire("ready", error))
    one = Host(Moody, "reader", "a picture", 5.0)
    for count in (1, 2):
        with pytest.raises(Told) as raised:
            one.ask(1)
        assert str(raised.value) == "the reader crashed (exit code 3)"
        assert (one.crashes, one.timeouts, one.process, wire.closed) == (count, 0, None, True)
    assert processes[0].asked == ["start", 1.0, 0.0, "kill", 5.0]
    assert len(processes) == 2


def test_a_hang_is_counted_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Wire("ready"), Wire("ready")
    processes, _ = started(monkeypatch, first, second)
    one = Host(Moody, "reader", "a picture", 2.5)
    for count, wire in enumerate((first, second)):
        one.start()
        wire.silent = True
        with pytest.raises(Told) as raised:
            one.ask(1)
        assert str(raised.value) == "the reader took longer than 2.5 s over a picture"
        assert (one.crashes, one.timeouts, one.process, wire.closed) == (0, count + 1, None, True)
        assert processes[count].asked == ["start", 0.0, "kill", 5.0]


def test_what_interrupts_a_request_passes_and_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire("ready", KeyboardInterrupt())
    started(monkeypatch, wire)
    one = Host(Moody, "reader", "a picture", 5.0)
    with pytest.raises(KeyboardInterrupt):
        one.ask(1)
    assert (wire.closed, one.process, one.crashes, one.timeouts) == (True, None, 0, 0)


@pytest.mark.parametrize(
    ("wire", "why"),
    [
        (Wire(_Fault("OSError: no disk", "b.py, line 4")), ": OSError: no disk (b.py, line 4)"),
        (Wire(), " (exit code 3, after 4 s)"),
        (Wire(OSError()), " (exit code 3, after 4 s)"),
        (Wire("ready", silent=True), " (exit code 3, after 4 s)"),
        (Wire("something else"), " (exit code 3, after 4 s)"),
    ],
)
def test_a_process_that_does_not_start(monkeypatch: pytest.MonkeyPatch, wire: Wire, why: str) -> None:
    processes, _ = started(monkeypatch, wire)
    times = [100.0, 104.0]
    monkeypatch.setattr(host.time, "monotonic", lambda: times.pop(0))
    one = Host(Moody, "reader", "a picture", 5.0)
    with pytest.raises(NotStarted) as raised:
        one.ask(1)
    assert str(raised.value) == f"the reader did not start{why}"
    assert (one.started, one.process, one.connection, wire.closed) == (False, None, None, True)
    assert processes[0].asked == ["start", 1.0, 0.0, "kill", 5.0]
    assert (one.crashes, one.timeouts) == (0, 0)


def test_no_process_has_no_exit_code() -> None:
    assert Host(Moody, "reader", "a picture", 5.0)._exit_code() is None
