"""Every setting of the method, of the optimizer and of sampling changes what a whole run leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from settings import CHANGES, fill, matters

OWN = [name for name in CHANGES if name.startswith(("method.", "optimizer.", "sampling."))]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("settings"))


@pytest.mark.parametrize("name", OWN)
def test_a_setting_changes_what_a_run_leaves_behind(room: Path, tmp_path: Path, name: str) -> None:
    assert matters(room, tmp_path, name)
