"""What the OCR worker asks of its seats, one a process, and what it makes of their answers."""

from __future__ import annotations

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
from varl.rewards import worker
from varl.rewards.engine import OcrConfig, OcrEngine, Unread
from varl.rewards.host import NotStarted, _Fault
from varl.rewards.worker import OcrWorker

from .moody import Moody
from .test_host_values import Wire, started


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
    before = set(threading.enumerate())

    def here(mood: int) -> None:
        wait_for(lambda: bool(second.asked) or set(threading.enumerate()) <= before)

    def there(mood: int) -> None:
        wait_for(lambda: bool(first.asked))
        time.sleep(0.02)

    first, second = Seat(here), Seat(there)
    reader = seated(first, second)
    assert reader.read(pictures(5, 6)) == [[5], [6]]
    assert [len(first.asked), len(second.asked)] == [1, 1]
    assert (reader.crashes, reader.timeouts) == (4, 6)
    reader.close()
    assert [first.asked[1:], second.asked[1:]] == [["closed"]] * 2


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


@pytest.mark.parametrize(
    "given",
    [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (1.0, -1.0), (float("nan"), 1.0), (1.0, float("inf")), (2.1e6, 1.0)],
)
def test_limits_that_are_none(given: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="positive") as raised:
        OcrWorker(timeout_s=given[0], start_timeout_s=given[1])
    right = "positive, and at most 2e+06 seconds"
    assert str(raised.value) == f"time limits must be {right}, got {given[0]} and {given[1]}"


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
