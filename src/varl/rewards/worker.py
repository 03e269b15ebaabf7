"""The OCR engine in a process of its own, so that its crash or hang costs the pictures at hand and not the
run."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.util import Finalize
from typing import Protocol

import numpy as np
from torch import Tensor

from varl.errors import RunError
from varl.rewards.engine import Line, OcrConfig, OcrEngine, Reading, Unread, to_pixels

__all__ = ["OcrWorker", "PictureReader"]

logger = logging.getLogger(__name__)


class PictureReader(Protocol):
    """What runs in the worker: reads one picture, uint8 [H, W, 3] RGB."""

    def read_picture(self, picture: np.ndarray) -> list[Line]: ...


def _serve(make_reader: Callable[[], PictureReader], connection: Connection) -> None:
    """The worker's loop: a picture in, its lines or the reason of its failure out."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # Terminals and schedulers send them to every process; the run finishes its update first, and needs its reader.
        signal.signal(number, signal.SIG_IGN)
    reader = make_reader()
    connection.send("ready")
    while True:
        try:
            picture = connection.recv()
        except EOFError:
            return
        try:
            answer: Reading = reader.read_picture(picture)
        except Exception as error:
            answer = Unread(f"{type(error).__name__}: {error}")
        connection.send(answer)


class OcrWorker:
    """Reads pictures as ``OcrEngine`` does, in ``config.threads`` processes of one thread each.

    A picture during which its process dies, or that takes longer than ``timeout_s``, is ``Unread``; the
    process is replaced, and the other pictures are read as ever. Processes start at the first reading (the
    first start waits for an import of torch) and end with this object, or at ``close()``. As with all of
    multiprocessing's spawned or fork-served processes, a script must keep its top level under
    ``if __name__ == "__main__":``. Pictures travel over a local pipe, never over a network.

    Args:
        config: settings of the engine.
        timeout_s: time limit for one picture, in seconds.
        start_timeout_s: time limit for the start of a process, in seconds.
        make_reader: builds the reader inside the process; must be picklable. Default: ``OcrEngine(config)``.

    Attributes:
        crashes, timeouts: how many pictures were lost to each so far.
    """

    def __init__(
        self,
        config: OcrConfig | None = None,
        *,
        timeout_s: float = 60.0,
        start_timeout_s: float = 120.0,
        make_reader: Callable[[], PictureReader] | None = None,
    ) -> None:
        if timeout_s <= 0 or start_timeout_s <= 0:
            raise ValueError(f"time limits must be positive, got {timeout_s} and {start_timeout_s}")
        self.config = config or OcrConfig()
        self.timeout_s, self.start_timeout_s = timeout_s, start_timeout_s
        self.crashes = self.timeouts = 0
        self._make_reader = make_reader or partial(OcrEngine, OcrEngine(self.config).config)
        self._lock = threading.Lock()
        self._seats = [_Seat(self._make_reader, timeout_s, start_timeout_s) for _ in range(self.config.threads)]
        # Before multiprocessing ends its daemons at exit: it would ask them by the SIGTERM that they ignore, and wait.
        Finalize(self, _close_all, (self._seats,), exitpriority=10)

    def describe(self) -> dict[str, str]:
        """As ``OcrEngine.describe``, and that it runs in a worker."""
        return {**OcrEngine(self.config).describe(), "worker": f"time limit {self.timeout_s:g} s a picture"}

    def read(self, images: Tensor) -> list[Reading]:
        """Read [B, 3, H, W] pictures in [0, 1]. One call at a time; further ones wait.

        Raises:
            ValueError: if ``images`` has another shape.
            RunError: if a process cannot be started even once; its own output says why.
        """
        pictures = to_pixels(images)
        lost = Unread("no OCR worker could be started again")
        readings: list[Reading] = [p if isinstance(p, Unread) else lost for p in pictures]
        queue = [i for i, p in enumerate(pictures) if not isinstance(p, Unread)][::-1]
        errors: list[Exception] = []

        def work(seat: _Seat) -> None:
            try:
                while not errors and queue:
                    try:
                        i = queue.pop()
                    except IndexError:
                        return
                    picture = pictures[i]
                    assert isinstance(picture, np.ndarray)
                    readings[i] = seat.read(picture)
            except _NotStarted as error:
                if seat.started:  # it did start once: this costs pictures, not the run
                    logger.warning("%s; the pictures left over by all workers are failed", error)
                else:
                    errors.append(error)
            except Exception as error:
                errors.append(error)

        with self._lock:
            helpers = [threading.Thread(target=work, args=(seat,)) for seat in self._seats[1:]]
            for helper in helpers:
                helper.start()
            work(self._seats[0])
            for helper in helpers:
                helper.join()
            self.crashes, self.timeouts = (
                sum(seat.crashes for seat in self._seats), sum(seat.timeouts for seat in self._seats)
            )  # fmt: skip
        if errors:
            raise errors[0]
        return readings

    @property
    def pids(self) -> Sequence[int]:
        """Ids of the processes that are running."""
        return [seat.process.pid for seat in self._seats if seat.process and seat.process.pid]

    def close(self) -> None:
        """End the processes; a later reading starts them again."""
        _close_all(self._seats)

    def __enter__(self) -> OcrWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close_all(seats: Sequence[_Seat]) -> None:
    for seat in seats:
        seat.close()


def _context() -> SpawnContext | ForkServerContext:
    """Where there is a fork server, one process imports torch once and every start forks from it."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class _NotStarted(RunError):
    pass


class _Seat:
    """One place for a process, refilled when the process is lost."""

    def __init__(self, make_reader: Callable[[], PictureReader], timeout_s: float, start_timeout_s: float) -> None:
        self.make_reader, self.timeout_s, self.start_timeout_s = make_reader, timeout_s, start_timeout_s
        self.crashes = self.timeouts = 0
        self.started = False
        self.process: multiprocessing.process.BaseProcess | None = None
        self.connection: Connection | None = None

    def read(self, picture: np.ndarray) -> Reading:
        connection = self._start()
        try:
            connection.send(picture)
            if connection.poll(self.timeout_s):
                reading: Reading = connection.recv()
                return reading
            self.timeouts += 1
            reason = f"the OCR worker took longer than {self.timeout_s:g} s over a picture"
        except (EOFError, OSError):
            self.crashes += 1
            code = self._exit_code()
            reason = f"the OCR worker crashed (exit code {code})"
        except BaseException:
            self.close()  # or the answer would be taken for that of the next picture
            raise
        logger.warning("%s; it is started again", reason)
        self.close()
        return Unread(reason)

    def _start(self) -> Connection:
        if self.process is not None and self.connection is not None and self.process.is_alive():
            return self.connection
        self.close()
        context = _context()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(self.make_reader, theirs), name="varl-ocr", daemon=True)
        self.process.start()
        theirs.close()
        begin = time.monotonic()
        try:
            ready = self.connection.poll(self.start_timeout_s) and self.connection.recv() == "ready"
        except (EOFError, OSError):
            ready = False
        if not ready:
            code, waited = self._exit_code(), time.monotonic() - begin
            self.close()
            raise _NotStarted(f"the OCR worker did not start (exit code {code}, after {waited:.0f} s)")
        self.started = True
        return self.connection

    def _exit_code(self) -> int | None:
        if self.process is None:
            return None
        self.process.join(1.0)
        return self.process.exitcode

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
        if self.process is not None:
            self.process.kill()
            self.process.join(5.0)
        self.process = self.connection = None
