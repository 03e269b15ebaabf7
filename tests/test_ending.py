"""Processes whose launcher is killed end by themselves; how others of a run end is in test_distributed.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

CHILD = "import time; from varl.ending import end_with_launcher; end_with_launcher(); print('up', flush=True)"
LAUNCHER = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1] + "; time.sleep(60)"], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


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
    last = time.monotonic() + 10
    while alive(child) and time.monotonic() < last:
        time.sleep(0.1)
    gone = not alive(child)
    if not gone:
        os.kill(child, signal.SIGKILL)
    assert gone
