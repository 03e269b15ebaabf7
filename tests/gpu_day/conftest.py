"""What tests of a day on a GPU share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where pip reaches no registry of packages."""
    folder: Path = tmp_path_factory.mktemp("probe")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--retries", "0"]
    ended = subprocess.run([*command, "--dest", str(folder), "colorlog"], capture_output=True, text=True)
    if ended.returncode:
        pytest.skip(f"pip reaches no registry: {ended.stderr.strip().splitlines()[-1]}")
