"""A machine as a GPU's would be but for the GPU: an environment of what an image holds, and the files that travel."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tools.gpu.needs import ROOT

from gpu_day.pythons import python312

__all__ = ["Machine", "environment", "machine", "rehearse"]

NAMES = "torch transformers safetensors opencv-python-headless onnxruntime tensorboard matplotlib pytest hypothesis"
NAMES += " PyYAML"
"""What an image for GPUs is taken to hold, with what these bring."""


class Machine(NamedTuple):
    """A folder with the repository's files and the wheels, and the interpreter of the machine."""

    tree: Path
    python: Path

    def copy(self, folder: Path) -> Machine:
        """The same before anything was installed there; files are shared, so they are replaced and not written into."""
        ignored = shutil.ignore_patterns(".site", "runs", "__pycache__")
        shutil.copytree(self.tree, folder, copy_function=os.link, ignore=ignored)
        return Machine(folder, self.python)


def environment(folder: Path) -> Path:
    """The interpreter of an environment of ``NAMES``, made in a folder unless it is there already.

    It is Python 3.12 where that is at hand with a CPU build of torch, or is named by PYTHON312; else that of the tests.
    A build of torch for GPUs would do as well, but brings gigabytes.
    """
    python = python312()
    if python is None or not ("PYTHON312" in os.environ or _brings_cpu_torch(python)):
        python = Path(sys.executable)
    constraints = ROOT / "constraints.txt"
    version = subprocess.run([python, "-VV"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256(f"{NAMES}\n{version}\n{constraints.read_text()}".encode()).hexdigest()[:12]
    made = folder / key
    if not (made / "ready").exists():
        shutil.rmtree(made, ignore_errors=True)
        subprocess.run([python, "-m", "venv", made], check=True)
        pip = [made / "bin" / "python", "-m", "pip", "install", "--quiet", "--constraint", constraints]
        subprocess.run([*pip, *NAMES.split()], check=True)
        (made / "ready").touch()
    return made / "bin" / "python"


def _brings_cpu_torch(python: Path) -> bool:
    """Whether pip would install a torch without CUDA's libraries there."""
    options = ["--dry-run", "--no-deps", "--ignore-installed", "--quiet", "--report", "-"]
    command = [python, "-m", "pip", "install", *options, "--constraint", ROOT / "constraints.txt", "torch"]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        return False
    (torch,) = json.loads(ended.stdout)["install"]
    return not any(re.match("nvidia-|cuda-", line) for line in torch["metadata"].get("requires_dist", []))


def machine(folder: Path, python: Path) -> Machine:
    """Copy what travels, and nothing else: the repository's files, and the wheels made for this environment."""
    tree = folder / "a machine"
    ask = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    listed = subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    (folder / "installed.txt").write_text(listed)
    ask = [str(python), "-c", "import platform; print(platform.python_version())"]
    version = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    words = ["--python", version, "--platform", f"manylinux_2_28_{platform.machine()}"]
    words += ["--installed", str(folder / "installed.txt"), "--out", str(tree / "tools" / "gpu" / "wheels")]
    command = [ROOT / "tools" / "gpu" / "wheels.sh", *words]
    subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, check=True)
    return Machine(tree, python)


def rehearse(
    machine: Machine, out: Path, *words: str, path: Path | None = None, pytest_words: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run ``day.sh --rehearse`` with the machine's interpreter, from another folder, without the tests' environment."""
    named = ("PYTHON", "VIRTUAL_ENV", "VARL_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(named)}
    given = {"PYTEST_ADDOPTS": pytest_words} | ({"PYTHONPATH": str(path)} if path else {})
    command = [
        machine.tree / "tools" / "gpu" / "day.sh",
        "--rehearse",
        "--python",
        machine.python,
        "--out",
        out,
        *words,
    ]
    return subprocess.run(command, env=kept | given, cwd=out.parent, capture_output=True, text=True)
