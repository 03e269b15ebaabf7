"""Interpreters that are at hand."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

__all__ = ["python312"]


def python312() -> Path | None:
    """Python 3.12 with pip: what PYTHON312 names, or one on the path, or one that pyenv made; None if there is none."""
    named = os.environ.get("PYTHON312") or shutil.which("python3.12")
    made = sorted(Path.home().glob(".pyenv/versions/3.12*/bin/python"))
    return next((path for path in [*([Path(named)] if named else []), *made] if _fits(path)), None)


def _fits(python: Path) -> bool:
    code = "import sys, pip; sys.exit(sys.version_info[:2] != (3, 12))"
    try:
        return subprocess.run([python, "-c", code], capture_output=True).returncode == 0
    except OSError:
        return False
