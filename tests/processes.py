"""Several processes on this machine, as ``torchrun`` would start them, each running one function of a test module."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from patience import PATIENCE

__all__ = ["free_port", "launch", "run"]

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(size: int, *words: str) -> list[subprocess.CompletedProcess[str]]:
    """Run ``python WORDS`` in ``size`` processes of one group; they are killed if they hang."""
    path = os.pathsep.join([str(HERE), str(HERE.parent / "src"), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    group = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    base = os.environ | group | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, *words],
            env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    ended = []
    try:
        for process in started:
            out, err = process.communicate(timeout=PATIENCE)
            ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    finally:
        for process in started:
            process.kill()
    return ended


def run(size: int, function: str, folder: Path) -> list[dict]:
    """What ``module.function(folder)`` returns in each of ``size`` processes.

    Raises:
        AssertionError: if one of them fails, with what it said.
    """
    ended = launch(size, "-m", "processes", function, str(folder))
    assert not any(process.returncode for process in ended), "\n".join(process.stderr[-4000:] for process in ended)
    return [torch.load(folder / f"{function}-{rank}.pt", weights_only=True) for rank in range(size)]


if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    module, function = name.rsplit(".", 1)
    found = getattr(importlib.import_module(module), function)(folder)
    torch.save(found, folder / f"{name}-{os.environ['RANK']}.pt")
