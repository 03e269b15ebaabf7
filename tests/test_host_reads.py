"""How often the host waits for the device: so many times an update, however many grids and micro-batches there are.

Seen on a device apart (``apart.py``), which also refuses tensors of two devices in one operation, as a GPU does. It is
made in a process of its own, since torch knows a device for as long as the process lives.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this torch makes no device of Python alone",
    ),
]
KINDS = ("suffix", "reused", "exact KL, twice", "truncated")


def found(case: str, folder: Path) -> Any:
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, str(HERE / "host_reads.py"), case, str(folder)]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    ended = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=folder, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


def waits(reads: dict[str, int]) -> dict[str, int]:
    """Without pictures, which come to the host while the device goes on."""
    return {what: count for what, count in reads.items() if "_brought" not in what}


def test_drawing_and_scoring_read_nothing(tmp_path: Path) -> None:
    reads = found("drawing", tmp_path)
    assert set(reads) == {"var", "infinity", "switti", "switti-nonar", "tokenflow"}
    assert {name: lines for name, lines in reads.items() if lines} == {}


def test_tensors_of_two_devices_are_refused(tmp_path: Path) -> None:
    assert "tensors on two devices, apart and cpu" in found("mixed", tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_reads_alike_for_any_number_of_grids_and_micro_batches(kind: str, tmp_path: Path) -> None:
    ways = found(kind, tmp_path)
    few, many, small = (waits(ways[name]["reads"]) for name in ("few", "many", "small"))
    assert few == many == small
    assert 0 < sum(few.values()) <= 8, few
    assert ways["few"]["norm"] == pytest.approx(ways["cpu"]["norm"], rel=0.02)  # a draw may flip
