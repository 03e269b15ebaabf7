"""``varl train`` in several processes by ``torchrun``, to be killed: one, ``torchrun`` alone, or all at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

__all__ = ["VICTIMS", "Group"]

ROOT = Path(__file__).parents[1]
VICTIMS = ("worker", "launcher", "all")
"""Who is killed: one of the processes; ``torchrun``, which cannot tell the others; or it and all of them."""
END_S = 1200.0
"""Once one of a group is dead, it hangs if it has not ended after so long."""


class Group:
    """The command as a process of its own, with the methods of ``multiprocessing``'s.

    Args:
        recipe: beside it, ``log`` receives what the processes say.
        size: number of processes.
    """

    def __init__(self, recipe: Path, size: int) -> None:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        self.log = recipe.with_name("log")
        with self.log.open("a") as log:
            command = [sys.executable, *launch, "-m", "varl", "train", str(recipe)]
            path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            self._launcher = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stdout=log, stderr=log)

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end, at most ``timeout`` seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._launcher.wait(timeout)

    @property
    def exitcode(self) -> int | None:
        return self._launcher.poll()

    def kill(self, victim: str, number: int = 0) -> str:
        """Kill -9 a victim; where there are no workers yet, it is the launcher.

        Args:
            number: which worker, where it is one of them.

        Returns:
            Whom it hit.

        Raises:
            RuntimeError: if the launcher goes on waiting without one of its workers.
        """
        workers = self._workers()
        if not workers:
            victim = "launcher"
        if victim != "worker":
            self._launcher.kill()
        chosen = {"worker": workers[number % len(workers) :][:1] if workers else [], "launcher": [], "all": workers}
        for worker in chosen[victim]:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        self.join(END_S)
        if self.exitcode is None:
            self._launcher.kill()
            raise RuntimeError(f"{END_S:.0f} s after one process was killed the others still run; see {self.log}")
        return victim

    def _workers(self) -> list[int]:
        """The launcher's child processes, by the order they were started in."""
        children: list[int] = []
        with suppress(FileNotFoundError, ProcessLookupError):
            for task in Path(f"/proc/{self._launcher.pid}/task").iterdir():
                children += map(int, (task / "children").read_text().split())
        return sorted(children)
