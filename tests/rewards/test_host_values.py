"""What passes between a host and its process, and between the OCR worker and its seats, to the letter.

Most of it with connections and processes that only write down what is asked of them: real ones are slow to start.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from patience import PATIENCE, wait_for
from varl.rewards import host, worker
from varl.rewards.engine import OcrConfig, OcrEngine, Unread
from varl.rewards.guard import Told
from varl.rewards.host import Host, NotStarted, _Fault, _serve
from varl.rewards.worker import OcrWorker

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


def pictures(*moods: float) -> torch.Tensor:
    return torch.tensor(moods)[:, None, None, None].expand(-1, 3, 2, 2) / 255


class Seat:
    """Reads a picture's first pixel, after it has done something."""

    def __init__(self, do: Callable[[int], Any] = lambda mood: None) -> None:
        self.do, self.asked, self.started = do, [], True  # type: ignore[var-annotated]
        self.crashes, self.timeouts, self.process = 2, 3, None

    def read(self, picture: np.ndarray) -> Any:
        mood = int(picture[0, 0, 0])
        self.asked.append(mood)
        self.do(mood)
        return [mood]

    def close(self) -> None:
        self.asked.append("closed")


def seated(*seats: Seat) -> OcrWorker:
    reader = OcrWorker(OcrConfig(threads=len(seats)))
    assert len(reader._seats) == len(seats)
    reader._seats[:] = seats  # type: ignore[assignment]
    return reader


def test_pictures_are_read_in_order_and_bad_ones_by_nobody() -> None:
    seat = Seat()
    reader = seated(seat)
    given = pictures(5, 6, 7)
    given[1, 0, 0, 0] = torch.nan
    assert reader.read(given) == [[5], Unread("the picture has a value that is not finite"), [7]]
    assert seat.asked == [5, 7]
    assert reader.read(pictures()) == []
    with pytest.raises(ValueError, match="must be"):
        reader.read(torch.zeros(3, 4, 4))


def test_every_seat_reads_at_once_and_all_are_waited_for() -> None:
    together = threading.Barrier(3)

    def met(mood: int) -> None:
        together.wait(PATIENCE)
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.02)

    seats = Seat(met), Seat(met), Seat(met)
    reader = seated(*seats)
    assert reader.read(pictures(5, 6, 7)) == [[5], [6], [7]]
    assert [len(seat.asked) for seat in seats] == [1, 1, 1]
    assert (reader.crashes, reader.timeouts) == (6, 9)
    reader.close()
    assert [seat.asked[1:] for seat in seats] == [["closed"]] * 3


def raising(error: Exception) -> Callable[[int], Any]:
    def do(mood: int) -> None:
        raise error

    return do


def test_a_seat_that_never_started_ends_the_reading() -> None:
    """And no other seat goes on."""
    gate, before = threading.Event(), set(threading.enumerate())

    def outlast(mood: int) -> None:
        gate.set()
        wait_for(lambda: set(threading.enumerate()) <= before)

    def fail(mood: int) -> None:
        gate.wait(PATIENCE)
        raise NotStarted("no room")

    first, second = Seat(outlast), Seat(fail)
    second.started = False
    with pytest.raises(NotStarted, match="no room"):
        seated(first, second).read(pictures(*range(1, 30)))
    assert len(first.asked) == 1
    for error in (ZeroDivisionError("zero"), NotStarted("none")):
        seat = Seat(raising(error))
        seat.started = False
        with pytest.raises(type(error), match=str(error)):
            seated(seat).read(pictures(1, 2))


def test_a_seat_that_did_start_costs_what_is_left_over() -> None:
    def third(mood: int) -> None:
        if mood == 7:
            raise NotStarted("again")

    lost = Unread("no OCR worker could be started again")
    assert seated(Seat(third)).read(pictures(5, 6, 7, 8)) == [[5], [6], lost, lost]


@pytest.mark.parametrize("given", [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (1.0, -1.0)])
def test_limits_that_are_none(given: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="positive") as raised:
        OcrWorker(timeout_s=given[0], start_timeout_s=given[1])
    assert str(raised.value) == f"time limits must be positive, got {given[0]} and {given[1]}"


def test_a_worker_is_made_as_it_was_asked() -> None:
    config = OcrConfig(threads=3, box_thresh=0.4)
    reader = OcrWorker(config, timeout_s=0.5, start_timeout_s=0.75)
    assert (reader.timeout_s, reader.start_timeout_s, reader.crashes, reader.timeouts) == (0.5, 0.75, 0, 0)
    assert [(one.timeout_s, one.start_timeout_s, one.name, one.over) for one in reader._seats] == [
        (0.5, 0.75, "OCR worker", "a picture")
    ] * 3
    made = reader._make_reader()
    assert isinstance(made, OcrEngine)
    assert made.config == reader.config == config
    assert reader.pids == []
    assert reader.describe() == {**OcrEngine(config).describe(), "worker": "time limit 0.5 s a picture"}
    assert OcrWorker().config == OcrConfig()
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        OcrWorker(OcrConfig(det_model="/nowhere/det.onnx"))
    own = OcrWorker(config, make_reader=Moody)
    assert own._make_reader is Moody
    assert (own.alphabet(), own.config) == (None, config)


def test_processes_have_ids_once_they_are_started() -> None:
    seats = Seat(), Seat(), Seat()
    seats[1].process, seats[2].process = SimpleNamespace(pid=None), SimpleNamespace(pid=41)  # type: ignore[assignment]
    assert seated(*seats).pids == [41]


def test_seats_are_closed_on_leaving_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[Any] = []
    monkeypatch.setattr(worker, "Finalize", lambda *given, **named: noted.append((given, named)))
    seat = Seat()
    with seated(seat) as reader:
        assert seat.asked == []
    assert seat.asked == ["closed"]
    (((of, close, given), named),) = noted
    assert of is reader
    assert named["exitpriority"] >= 0  # others come after multiprocessing has ended its own
    close(*given)
    assert seat.asked == ["closed", "closed"]


def test_a_seat_reads_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    processes, _ = started(monkeypatch, Wire("ready", [1], _Fault("ValueError: no", "a.py, line 1")))
    (seat,) = OcrWorker(make_reader=Moody)._seats
    blank = np.zeros((2, 2, 3), np.uint8)
    assert seat.read(blank) == [1]
    assert seat.read(blank) == Unread("ValueError: no")
    made = processes[0].given["args"][0]
    assert isinstance(made, partial)
    (line,) = made()(blank + 9)
    assert (line.text, line.confidence) == ("9", 1.0)
