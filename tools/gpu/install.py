"""Install the carried wheels into a folder of the tree, without a network and without touching the environment."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from tools.gpu.needs import ROOT, absent

__all__ = ["SITE", "WHEELS", "install"]

WHEELS = ROOT / "tools" / "gpu" / "wheels"
SITE = ROOT / "tools" / "gpu" / ".site"
"""Where they are installed; ``day.sh`` puts it before all else on the path."""
STAMP = "wheels.sha256"
"""In that folder: what it was made from. It is written last."""


def install(wheels: Path = WHEELS, site: Path = SITE) -> bool:
    """Bring a folder to hold what the wheels hold, and say what was done.

    Nothing is done if it does already, or where varl itself is installed: pip has then seen to its requirements.

    Returns:
        Whether that went well. What is still missing afterwards is for the check of imports to say.
    """
    found = sorted(wheels.glob("*.whl"))
    stamp = _stamp(found)
    if (site / STAMP).is_file() and (site / STAMP).read_text() == stamp:
        return _say(f"the wheels are installed already, in {site}")
    shutil.rmtree(site, ignore_errors=True)
    if _varl_is_installed():
        return _say("varl is installed with what it requires: no wheels are needed")
    if not found:
        if lacking := absent():
            lines = (f"missing: {', '.join(lacking)}", f"no wheels in {wheels}; make them with tools/gpu/wheels.sh")
            return not _say("\n".join(lines))
        return _say("nothing is missing: no wheels are needed")
    if not (_by_pip(found, site) if _pip_is_here() else _by_unpacking(found, site)):
        shutil.rmtree(site, ignore_errors=True)
        return False
    (site / STAMP).write_text(stamp)
    importlib.invalidate_caches()
    return _say(f"{len(found)} wheels were installed in {site}")


def _stamp(wheels: Sequence[Path]) -> str:
    """The interpreter, and the content of every wheel."""
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in wheels]
    return "\n".join([str(sys.implementation.cache_tag), *lines, ""])


def _varl_is_installed() -> bool:
    try:
        importlib.metadata.version("varl")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _pip_is_here() -> bool:
    """Asked of another process: where setuptools is, even looking for pip takes this one's ``distutils`` away."""
    return subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode == 0


def _by_pip(wheels: Sequence[Path], site: Path) -> bool:
    """As pip installs them, which checks that each is for this machine and whole."""
    options = ["--no-index", "--no-deps", "--no-compile", "--quiet", "--root-user-action", "ignore"]
    command = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "install", *options]
    return subprocess.run([*command, "--target", str(site), *map(str, wheels)]).returncode == 0


def _by_unpacking(wheels: Sequence[Path], site: Path) -> bool:
    """Where there is no pip: a wheel is an archive of what is installed, but for what lies in a ``.data`` folder."""
    for path in wheels:
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(site)
        except (zipfile.BadZipFile, OSError) as error:
            return not _say(f"{path.name} cannot be unpacked: {error}")
    for moved in (*site.glob("*.data/purelib"), *site.glob("*.data/platlib")):
        shutil.copytree(moved, site, dirs_exist_ok=True)
    return True


def _say(text: str) -> bool:
    print(text, flush=True)
    return True
