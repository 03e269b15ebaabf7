"""Processes whose launcher is killed end by themselves; how others of a run end is in test_distributed.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from patience import PATIENCE, alive, wait_for

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
