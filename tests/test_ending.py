"""Processes end when their launcher is killed, and whatever hangs; the end of a run is in test_distributed.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from patience import PATIENCE, alive, wait_for
from varl import cli, ending

CHILD = "import time; from varl.ending import end_with_launcher; end_with_launcher(); print('up', flush=True)"
CHILD += f"; time.sleep({2 * PATIENCE})"
LAUNCHER = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.slow
def test_a_process_ends_when_its_launcher_is_killed() -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, CHILD],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TORCHELASTIC_RUN_ID": "one"},
    )
    assert launcher.stdout is not None
    child = int(launcher.stdout.readline())
    time.sleep(2.0)
    assert alive(child)  # as long as the launcher is there
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()
    try:
        wait_for(lambda: not alive(child))
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


HANGS = {
    "thread": ("threading.Thread(target=wait, name='slow').start()", "thread 'slow'", 0),
    "pool": ("ThreadPoolExecutor(1, 'pool').submit(wait)", "thread 'pool_0'", 3),
    "process": ("multiprocessing.get_context('fork').Process(target=wait, name='kid').start()", "process 'kid' (", 0),
    "function": ("atexit.register(wait)", "wait ('<string>', line 3)", 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HANGS)
def test_a_process_ends_with_its_code_whatever_hangs(name: str) -> None:
    """Its output is whole, and nobody is left who holds it open."""
    hang, named, status = HANGS[name]
    code = "import atexit, multiprocessing, sys, threading, time; from concurrent.futures import ThreadPoolExecutor\n"
    code += f"from varl import ending; ending.LEFT_S = 0.3\ndef wait(): time.sleep({2 * PATIENCE})\n"
    code += f"{hang}; print('a' * 200_000); ending.end({status})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stdout) == (status, "a" * 200_000 + "\n")
    assert ended.stderr.startswith(f"still running 0.3 s after the end, and not waited for any longer: {named}")


@pytest.mark.slow
def test_a_process_without_what_hangs_ends_as_ever() -> None:
    code = "import atexit; from varl.ending import end; atexit.register(print, 'last'); print('first'); end('bad')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "first\nlast\n", "bad\n")


def test_what_keeps_a_process_from_its_end_is_named() -> None:
    gate = threading.Event()
    threads = [threading.Thread(target=gate.wait, name=f"slow {d}\n", daemon=d) for d in (False, True)]
    for thread in threads:
        thread.start()
    try:
        assert r"thread 'slow False\n'" in ending._left()
        assert not any("slow True" in left for left in ending._left())
    finally:
        gate.set()


def carried_out(run: Callable[[Any], int | None], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command."""
    monkeypatch.setitem(cli.COMMANDS, "doctor", replace(cli.COMMANDS["doctor"], run=run))
    return cli.main(["doctor"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_does_not_end_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)

    def run(config: Any) -> None:
        thread = threading.Thread(target=lambda: os._exit(0))
        thread.start()
        thread.join()

    assert carried_out(run, monkeypatch) == 0
    assert ended == []


@pytest.mark.parametrize("code", [None, 0, 143])
def test_a_command_that_exits_is_not_taken_for_finished(
    code: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if code:  # of another process of the run, which has said why
        with pytest.raises(SystemExit, match=f"^{code}$"):
            carried_out(lambda _: sys.exit(code), monkeypatch)
    else:
        assert carried_out(lambda _: sys.exit(code), monkeypatch) == 1
        assert "stopped: SystemExit" in capsys.readouterr().err
