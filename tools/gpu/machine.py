"""Part 1: what the machine has, and the two ceilings that all else is measured against.

python -m tools.gpu.machine --device cuda --out 1-machine.json
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.gpu.needs import MODULES, ROOT, unimportable

if TYPE_CHECKING:
    import torch

__all__ = ["ceilings", "main", "median_seconds", "wrong"]

COPY = {"cuda": 2 * 2**30, "cpu": 16 * 2**20}
"""Bytes of the tensor that is copied, unless the memory that is free is less than four times as much."""
SIDE = {"cuda": 8192, "cpu": 256}
"""Side of the two matrices that are multiplied."""
REPEATS = 20


def main(words: list[str] | None = None) -> int:
    """Write what was found, and print it; 0 unless an import fails, the device is not there, or a ceiling is none."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.machine", description=__doc__)
    parser.add_argument("--device", required=True, choices=("cuda", "cpu"))
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.json")
    a = parser.parse_args(words)
    found: dict[str, Any] = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    found["device"] = a.device
    problems = unimportable()
    if not any(problem.startswith("torch ") for problem in problems):
        import torch

        if a.device == "cuda" and not torch.cuda.is_available():
            problems.append(f"torch {torch.__version__} sees no GPU; --device cpu, or day.sh --rehearse, needs none")
        else:
            found["card"] = _card(a.device)
            found["ceilings"] = ceilings(a.device, COPY[a.device], SIDE[a.device])
            problems += wrong(found["ceilings"])
    found["versions"] = _versions()
    found["problems"] = problems
    a.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    for problem in problems:
        print(f"problem: {problem}")
    return int(bool(problems))


def wrong(measured: dict[str, float]) -> list[str]:
    """Which ceilings are not positive numbers."""
    return [
        f"the ceiling {name} must be a positive number, got {value}"
        for name, value in measured.items()
        if not (math.isfinite(value) and value > 0)
    ]


def ceilings(device: str, size: int, side: int) -> dict[str, float]:
    """The fastest that the device copies and multiplies, each the median of several.

    Args:
        size: bytes of the copied tensor.
        side: of the square matrices that are multiplied.

    Returns:
        ``copy_gb_per_s`` (bytes read and bytes written, together), and TFLOP/s of products: ``bf16_tflops``,
        ``fp32_tflops``, and on a GPU ``tf32_tflops``.
    """
    import torch

    if device == "cuda":
        size = min(size, torch.cuda.mem_get_info()[0] // 4)
    found = {"copy_gb_per_s": _copy(device, size), "bf16_tflops": _product(device, side, torch.bfloat16)}
    found["fp32_tflops"] = _product(device, side, torch.float32)
    if device == "cuda":
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        found["tf32_tflops"] = _product(device, side, torch.float32)
        torch.backends.cuda.matmul.fp32_precision = before
    return found


def _copy(device: str, size: int) -> float:
    """GB/s of a copy on the device, reading and writing."""
    import torch

    source = torch.ones(size, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: copy.copy_(source), device) / 1e9


def _product(device: str, side: int, dtype: torch.dtype) -> float:
    """TFLOP/s of the product of two random square matrices."""
    import torch

    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / median_seconds(lambda: torch.mm(a, b, out=out), device) / 1e12


def median_seconds(work: Callable[[], object], device: str, repeats: int = REPEATS) -> float:
    """Seconds of some work, by the device's own clock, after it ran three times to warm up."""
    import torch

    for _ in range(3):
        work()
    if device == "cpu":
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return statistics.median(times)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events))


def _card(device: str) -> dict[str, Any]:
    """What computes: its name, its memory in GiB, and how many units it has."""
    import torch

    if device == "cpu":
        total, free = (os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
        return {"name": _cpu(), "memory_gib": total / 2**30, "free_gib": free / 2**30, "cores": os.cpu_count()}
    card = torch.cuda.get_device_properties(0)
    return {
        "name": card.name,
        "memory_gib": card.total_memory / 2**30,
        "free_gib": torch.cuda.mem_get_info()[0] / 2**30,
        "multiprocessors": card.multi_processor_count,
        "capability": f"{card.major}.{card.minor}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return named[1] if named else platform.machine()


def _versions() -> dict[str, str | None]:
    """Of the driver, of what torch was built with, and of every package that varl needs; None for what is not there."""
    found = {"varl": _own_version(), "python": platform.python_version(), "driver": _driver()}
    if "torch" in sys.modules:
        import torch

        nccl = torch.cuda.nccl.version() if torch.cuda.is_available() else None
        found |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version() or "") or None}
        found["nccl"] = ".".join(map(str, nccl)) if nccl else None
    for name in MODULES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _own_version() -> str | None:
    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return stated[1] if stated else None


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


if __name__ == "__main__":
    sys.exit(main())
