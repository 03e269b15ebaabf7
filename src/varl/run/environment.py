"""What a run was made with: versions, hardware, and the state of the code."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
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
    """Commit of the repository a folder belongs to, and whether files differ from it; None if git does not track it.

    Git executes what a repository's configuration names (fsmonitor, filters, hooks, helpers of submodules), so only
    the commit is asked of the repository itself, which executes nothing. Its files are compared under an empty
    configuration: one of our own, with the repository's index and objects. ``dirty`` is None where that fails.
    """
    paths = ("index", "objects", "info/exclude")
    try:
        found = _ask(folder, "rev-parse", "HEAD", "--show-toplevel", *(w for p in paths for w in ("--git-path", p)))
        commit, top, *there = found.splitlines()
        index, objects, excluded = ((folder / path).resolve() for path in there)
        with tempfile.TemporaryDirectory() as own:
            _empty_repository(Path(own), commit, index, objects)
            place = {"GIT_DIR": own, "GIT_WORK_TREE": top, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
            if not _ask(folder, "ls-files", "--", tracked, **place):
                return None
            status = ("-c", f"core.excludesFile={excluded}", "status", "--porcelain", "--ignore-submodules=all")
            try:
                dirty = bool(_ask(folder, *status, **place))
            except (OSError, subprocess.SubprocessError):
                return {"commit": commit, "dirty": None}
            return {"commit": commit, "dirty": dirty}
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _empty_repository(own: Path, commit: str, index: Path, objects: Path) -> None:
    """A repository at a commit, with another's index and objects and nothing else of it."""
    (own / "refs").mkdir()
    (own / "objects" / "info").mkdir(parents=True)
    (own / "objects" / "info" / "alternates").write_text(f"{objects}\n")
    (own / "HEAD").write_text(f"{commit}\n")
    kind = "sha256" if len(commit) == 64 else "sha1"
    (own / "config").write_text(f"[core]\nrepositoryformatversion = 1\n[extensions]\nobjectFormat = {kind}\n")
    shutil.copy2(index, own / "index")  # with its time, by which git sees which files changed after it


def _ask(folder: Path, *words: str, **variables: str) -> str:
    """What git says; of the variables that steer it, only those given."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    always = {"GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0"}
    command = ["git", "-C", str(folder), "-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}", *words]
    return subprocess.run(
        command,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=10,
        check=True,
        env=kept | always | variables,
    ).stdout.strip()
