"""The OCR engine in a process of its own, so that its crash or hang costs the pictures at hand and not the
run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import Protocol

import numpy as np
from torch import Tensor

from varl.rewards.engine import Line, OcrConfig, OcrEngine, Reading, Unread, to_pixels
from varl.rewards.guard import Told
from varl.rewards.host import LONGEST_S, Host, NotStarted

__all__ = ["OcrWorker", "PictureReader"]

logger = logging.getLogger(__name__)


class PictureReader(Protocol):
    """What runs in the worker: reads one picture, uint8 [H, W, 3] RGB."""

    def read_picture(self, picture: np.ndarray) -> list[Line]: ...


def _reading(make_reader: Callable[[], PictureReader]) -> Callable[[np.ndarray], list[Line]]:
    return make_reader().read_picture


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
        if not all(0 < limit <= LONGEST_S for limit in (timeout_s, start_timeout_s)):
            limits = f"{timeout_s} and {start_timeout_s}"
            raise ValueError(f"time limits must be positive, and at most {LONGEST_S:g} seconds, got {limits}")
        self.config = config or OcrConfig()
        self.timeout_s, self.start_timeout_s = timeout_s, start_timeout_s
        self.crashes = self.timeouts = 0
        self._own_reader = make_reader is not None
        self._make_reader = make_reader or partial(OcrEngine, OcrEngine(self.config).config)
        self._lock = threading.Lock()
        self._seats = [_Seat(self._make_reader, timeout_s, start_timeout_s) for _ in range(self.config.threads)]
        # Before multiprocessing ends its daemons at exit: it would ask them by the SIGTERM that they ignore, and wait.
        Finalize(self, _close_all, (self._seats,), exitpriority=10)

    def describe(self) -> dict[str, str]:
        """As ``OcrEngine.describe``, and that it runs in a worker."""
        return {**OcrEngine(self.config).describe(), "worker": f"time limit {self.timeout_s:g} s a picture"}

    def alphabet(self) -> list[str] | None:
        """The characters that the engine can read; None for a reader of one's own, which does not say."""
        return None if self._own_reader else OcrEngine(self.config).alphabet()

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
            except NotStarted as error:
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


class _Seat(Host):
    """One place for a process that reads pictures."""

    def __init__(self, make_reader: Callable[[], PictureReader], timeout_s: float, start_timeout_s: float) -> None:
        super().__init__(partial(_reading, make_reader), "OCR worker", "a picture", timeout_s, start_timeout_s)
        self.make_reader = make_reader

    def start(self) -> Connection:
        self.make = partial(_reading, self.make_reader)
        return super().start()

    def read(self, picture: np.ndarray) -> Reading:
        try:
            reading: Reading = self.ask(picture)
            return reading
        except Told as error:
            return Unread(str(error))
