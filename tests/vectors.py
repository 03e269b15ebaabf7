"""Reference vectors: the small ones that come with the tests, and the full set where it lies beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
PARITY = Path(os.environ.get("VARL_PARITY", Path(__file__).parents[2] / "shared" / "parity"))


def cases(family: str, pattern: str) -> list[object]:
    """Parameters of a test: folders of vectors, the small copies first, then those of ``PARITY``.

    Where ``PARITY`` has none, the last parameter is one that skips.
    """
    found = [pytest.param(path.parent, id=f"golden-{path.parent.name}") for path in _manifests(GOLDEN / family, "*")]
    full = [pytest.param(path.parent, id=path.parent.name) for path in _manifests(PARITY, pattern)]
    if not full:
        reason = f"no reference vectors {pattern} in {PARITY} (VARL_PARITY names another place)"
        full = [pytest.param(None, id="parity", marks=pytest.mark.skip(reason=reason))]
    return [*found, *full]


def _manifests(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(f"{pattern}/manifest.json"))


def table(name: str) -> Path:
    """A table of ``PARITY``; the test is skipped where it is missing."""
    path = PARITY / name
    if not path.is_file():
        pytest.skip(f"no {name} in {PARITY} (VARL_PARITY names another place)")
    return path
