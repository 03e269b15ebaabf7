"""A process of its own for code that may crash or hang: a request in, an answer or the reason of its failure out."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Any

from varl.errors import RunError
from varl.rewards.guard import Told, ending_forks, told, where
from varl.run.signals import leave_to_the_run

__all__ = ["Host", "NotStarted"]

logger = logging.getLogger(__name__)

Answer = Callable[[Any], Any]
LONGEST_S = 2e6
"""Of a time limit: waiting on a pipe counts milliseconds, in 31 bits."""


@dataclass(frozen=True)
class _Fault:
    """An error of the other process: what it says, and where it arose."""

    what: str
    place: str


class NotStarted(RunError):
    """A process did not start; the message says why, as far as it is known."""


def _serve(make: Callable[[], Answer], connection: Connection) -> None:
    """The process's loop."""
    # Terminals and schedulers send them to every process; the run finishes its update first, and needs its answers.
    leave_to_the_run()
    if hasattr(os, "register_at_fork"):  # what is forked here and outlives this process would hide that it is gone
        os.register_at_fork(after_in_child=connection.close)
    try:
        with ending_forks():
            answer = make()
    except BaseException as error:
        connection.send(_Fault(told(error), where(error)))
        return
    connection.send("ready")
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        try:
            with ending_forks():
                reply = answer(request)
        except BaseException as error:
            reply = _Fault(told(error), where(error))
        connection.send(reply)


def _context() -> SpawnContext | ForkServerContext:
    """Where there is a fork server, one process imports torch once and every start forks from it."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["varl.rewards.worker"])
    return context


class Host:
    """One place for a process, refilled when the process is lost.

    Args:
        make: makes, inside the process, what answers a request; must be picklable.
        name: of what it is, for messages.
        over: what a request is, for messages: "a picture".
        timeout_s: time limit for a request, in seconds; None: no limit.
        start_timeout_s: time limit for the start, in seconds.

    Attributes:
        crashes, timeouts: how many requests were lost to each so far.
        started: whether a process has started once.
    """

    def __init__(
        self, make: Callable[[], Answer], name: str, over: str, timeout_s: float | None, start_timeout_s: float = 120.0
    ) -> None:
        self.make, self.name, self.over = make, name, over
        self.timeout_s, self.start_timeout_s = timeout_s, start_timeout_s
        self.crashes = self.timeouts = 0
        self.started = False
        self.process: multiprocessing.process.BaseProcess | None = None
        self.connection: Connection | None = None

    def ask(self, request: Any) -> Any:
        """The answer to a request.

        Raises:
            Told: if answering it raised, took too long, or ended the process, which is then replaced by the next.
            NotStarted: if the process cannot be started.
        """
        connection = self.start()
        try:
            connection.send(request)
            if connection.poll(self.timeout_s):
                answer = connection.recv()
                if isinstance(answer, _Fault):
                    raise Told(answer.what, answer.place)
                return answer
            self.timeouts += 1
            reason = f"the {self.name} took longer than {self.timeout_s:g} s over {self.over}"
        except Told:
            raise
        except (EOFError, OSError):
            self.crashes += 1
            reason = f"the {self.name} crashed (exit code {self._exit_code()})"
        except BaseException:
            self.close()  # or the answer would be taken for that of the next request
            raise
        logger.warning("%s; it is started again", reason)
        self.close()
        raise Told(reason)

    def start(self) -> Connection:
        """The connection to the process, which is started if none is running.

        Raises:
            NotStarted: if it does not come up.
        """
        if self.process is not None and self.connection is not None and self.process.is_alive():
            return self.connection
        self.close()
        context = _context()
        self.connection, theirs = context.Pipe()
        # Not a daemon: those may have no processes of their own. It ends when its pipe is closed, whatever closes it.
        self.process = context.Process(target=_serve, args=(self.make, theirs), name="varl-host", daemon=False)
        self.process.start()
        theirs.close()
        begin, said = time.monotonic(), None
        try:
            if self.connection.poll(self.start_timeout_s):
                said = self.connection.recv()
        except (EOFError, OSError):
            pass
        if said != "ready":
            code, waited = self._exit_code(), time.monotonic() - begin
            self.close()
            why = (
                f": {said.what} ({said.place})"
                if isinstance(said, _Fault)
                else f" (exit code {code}, after {waited:.0f} s)"
            )
            raise NotStarted(f"the {self.name} did not start{why}")
        self.started = True
        return self.connection

    def _exit_code(self) -> int | None:
        if self.process is None:
            return None
        self.process.join(1.0)
        return self.process.exitcode

    def close(self, patience: float = 0.0) -> None:
        """End the process, which has ``patience`` seconds to end its own; a later request starts it again."""
        if self.connection is not None:
            self.connection.close()
        if self.process is not None:
            self.process.join(patience)
            self.process.kill()
            self.process.join(5.0)
        self.process = self.connection = None
