"""Trying a break: the library broken in a copy, and the module's tests run on it.

Starting Python and importing torch takes longer than most tests. So a ``Bench`` lives in a process that has imported
what the tests need, apart from the library, and forks for every try; the fork runs pytest and ends.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.mutation.breaks import Break

__all__ = ["Bench", "Verdict", "attempt", "open_bench", "whole"]

NOT_COPIED = ("runs", "dist", "__pycache__")
"""And what is hidden, such as ``.git`` and ``.venv``."""
PATIENCE = 4
"""Seconds of the clock per second of the limit, which is of processor time: other work must not look like a hang."""
OWN = ("varl", "tests", "benchmarks", "conftest")
_EXIT = os._exit
"""As it is before a broken guard of rewards (``varl.rewards.guard``) leaves another in its place."""
ENDED_AT_LIMIT = -1


@dataclass(frozen=True)
class Verdict:
    """What became of a try.

    Attributes:
        verdict: ``killed`` (a test failed), ``timed out`` (noticed too: unbroken, these tests end within the limit), or
            ``survived``.
        test: the test that failed or hung, if one did.
        seconds: of processor time that the try took.
    """

    verdict: str
    test: str | None
    seconds: float


class Bench:
    """A copy of the repository in which modules are broken, one at a time. To be made in a process without threads.

    Args:
        root: the repository.
        limit: processor seconds for one try.
    """

    def __init__(self, root: Path, limit: float) -> None:
        self.limit, self._asker = limit, os.getppid()
        self._folder = tempfile.TemporaryDirectory(prefix="mutants-")
        self.root = Path(self._folder.name)
        for path in root.iterdir():
            if path.name.startswith(".") or path.name in NOT_COPIED:
                continue
            if path.is_dir():
                shutil.copytree(path, self.root / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, self.root)

    def whole(self, tests: Sequence[str]) -> tuple[Verdict, list[str]]:
        """Run tests on the library as it is.

        Returns:
            The verdict, and the modules of others that were imported on the way: for ``prepare``.
        """
        found = self._run(tests)
        return self._verdict(found), found.get("imported", [])

    def prepare(self, imported: Iterable[str]) -> None:
        """Import modules once for all tries."""
        for name in imported:
            if name not in sys.modules:
                with suppress(Exception):
                    importlib.import_module(name)

    def attempt(self, one: Break, tests: Sequence[str]) -> Verdict:
        """Break a module, run tests, and mend it again."""
        path = self.root / "src" / "varl" / one.module
        source = path.read_text()
        path.write_text(one.applied(source))
        # Compiled files are told apart by second and size, which one break may share with another.
        compiled = Path(importlib.util.cache_from_source(str(path)))
        compiled.unlink(missing_ok=True)
        try:
            return self._verdict(self._run(tests, write=False))
        finally:
            path.write_text(source)

    def _verdict(self, found: dict[str, Any]) -> Verdict:
        failed = found["code"] != 0
        verdict = "timed out" if found["code"] == ENDED_AT_LIMIT else "killed" if failed else "survived"
        return Verdict(verdict, found.get("test") if failed else None, round(found["seconds"], 1))

    def _run(self, tests: Sequence[str], write: bool = True) -> dict[str, Any]:
        """Fork, run pytest, and return its exit code, processor seconds, and what it noted of itself."""
        shutil.rmtree(self.root / ".hypothesis", ignore_errors=True)
        notes = self.root / "notes.json"
        notes.write_text("{}")
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                self._in_child(tests, notes, write)
            _EXIT(70)  # only if what should have ended the process did not
        hung = not self._ends(child)
        with suppress(ProcessLookupError):  # also what the tests started and left behind
            os.killpg(child, signal.SIGKILL)
        _, status, used = os.wait4(child, 0)
        code = os.waitstatus_to_exitcode(status)
        noted = json.loads(notes.read_text() or "{}")
        return {
            **noted,
            "code": ENDED_AT_LIMIT if hung or code == -signal.SIGXCPU else code,
            "seconds": used.ru_utime + used.ru_stime,
        }

    def _ends(self, child: int) -> bool:
        """Whether it ends by itself; it is left for ``wait4`` in any case."""
        stop = time.perf_counter() + PATIENCE * self.limit
        while time.perf_counter() < stop:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return True
            if os.getppid() != self._asker:  # the command was killed: nobody waits for this any more
                with suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
                self._folder.cleanup()
                os._exit(1)
            time.sleep(0.02)
        return False

    def _in_child(self, tests: Sequence[str], notes: Path, write: bool) -> None:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(self.limit), math.ceil(self.limit) + 5))
        log = os.open(self.root / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(self.root)
        os.environ["PYTHONPATH"] = str(self.root / "src")
        sys.path[:] = [str(self.root / "src"), *(path for path in sys.path if not _is_of_repository(path))]
        for name in [name for name in sys.modules if name.split(".")[0] in OWN]:
            del sys.modules[name]
        if not write:
            sys.dont_write_bytecode = True
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        recorder = _Recorder(notes, str(self.root))
        options = ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "not slow", "--tb=short"]
        code = int(pytest.main([*options, *tests], plugins=[recorder]))
        recorder.note(imported=recorder.imported())
        _EXIT(code)


_bench: Bench | None = None


def open_bench(root: Path, limit: float) -> None:
    """Give this process a bench of its own; for the start of a pool's process."""
    global _bench
    _bench = Bench(root, limit)


def whole(tests: Sequence[str]) -> tuple[Verdict, list[str]]:
    """``Bench.whole`` on this process's bench."""
    assert _bench is not None
    return _bench.whole(tests)


def attempt(one: Break, tests: Sequence[str], imported: Sequence[str]) -> Verdict:
    """``Bench.attempt`` on this process's bench, prepared."""
    assert _bench is not None
    _bench.prepare(imported)
    return _bench.attempt(one, tests)


def _is_of_repository(path: str) -> bool:
    return path == "" or (Path(path) / "varl").exists() or (Path(path) / "benchmarks" / "mutation").exists()


class _Recorder:
    """A plugin that keeps on disk which test runs, and then which was the first to fail."""

    def __init__(self, notes: Path, root: str) -> None:
        self.notes, self.root, self.noted, self.failed = notes, root, dict[str, Any](), False

    def note(self, **values: Any) -> None:
        self.noted |= values
        self.notes.write_text(json.dumps(self.noted))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if not self.failed:
            self.note(test=nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.failed |= report.failed

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = True
            self.note(test=report.nodeid)

    def imported(self) -> list[str]:
        """Modules of others; and that the library was the copy's."""
        library = getattr(sys.modules.get("varl"), "__file__", None)
        if library is not None and not library.startswith(self.root):
            raise RuntimeError(f"the tests imported {library} rather than the copy")
        found = []
        for name, module in list(sys.modules.items()):
            path = getattr(module, "__file__", None) or ""
            if path and not path.startswith(self.root) and name.split(".")[0] not in OWN and name != "__main__":
                found.append(name)
        return found
