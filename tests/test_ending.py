"""Processes whose launcher is killed, or whose work is done, end; how others of a run end is in test_distributed.py."""

from __future__ import annotations

import multiprocessing
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


@pytest.mark.parametrize("daemon", [False, True])
def test_what_still_runs_is_named(
    daemon: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(ending, "exit_at_once", codes.append)
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name="theirs", daemon=daemon)
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(2 * PATIENCE,), name="other")
    for one in (thread, process) if not daemon else (thread,):
        one.start()
    try:
        ending._end_after(0.0, 7)
        said = capfd.readouterr().err
        assert codes == [7]
        assert ("thread theirs" in said) is not daemon
        assert ("process other" in said) is not daemon
        if not daemon:
            process.join(PATIENCE)
            assert process.exitcode == -signal.SIGKILL  # or it would hold the terminal
    finally:
        done.set()
        thread.join()


LEFT = """
import atexit, concurrent.futures, multiprocessing, os, sys, threading, time
from varl.ending import end_soon

def thread(): threading.Thread(target=time.sleep, args=(LONG,)).start()
def pool(): concurrent.futures.ThreadPoolExecutor(1).submit(time.sleep, LONG)
def process(): multiprocessing.get_context("fork").Process(target=time.sleep, args=(LONG,)).start()
def registered(): atexit.register(time.sleep, LONG)

children = []
for leave in (thread, pool, process, registered):
    if not (child := os.fork()):
        leave()
        end_soon(5, 0.1)
        sys.exit(5)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
""".replace("LONG", str(2 * PATIENCE))


@pytest.mark.slow
def test_a_program_ends_though_something_was_left_running() -> None:
    ended = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, timeout=PATIENCE)
    assert ended.stdout.splitlines()[-1] == "[5, 5, 5, 5]", ended.stderr
    assert ended.stderr.count("ended without waiting") == 4


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
