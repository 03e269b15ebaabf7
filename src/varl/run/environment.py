"""What a run was made with: versions, hardware, and the state of the code."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import varl

__all__ = ["changed_versions", "environment"]

PACKAGES = ("numpy", "safetensors", "onnxruntime", "rapidocr", "opencv-python-headless", "transformers", "peft")


def environment() -> dict[str, Any]:
    """Versions, hardware and git state, as JSON holds them."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {
            "varl": varl.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
            **{name: _version(name) for name in PACKAGES},
        },
        "hardware": {
            "platform": platform.platform(),
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": gpus,
        },
        "git": {"varl": _git(Path(varl.__file__).parent, "__init__.py"), "working_directory": _git(Path.cwd(), ".")},
    }


def changed_versions(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs in the versions of two environments, each as "name was ..., is ..."."""
    before, after = earlier.get("versions", {}), now["versions"]
    return [f"{name} was {before.get(name)}, is {after[name]}" for name in after if before.get(name) != after[name]]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


@lru_cache
def _git(folder: Path, tracked: str) -> dict[str, Any] | None:
    """Commit of the repository a folder belongs to, and whether files differ from it; None if git tracks it not."""

    def ask(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        ask("ls-files", "--error-unmatch", tracked)
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
