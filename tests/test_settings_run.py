"""Every other setting of a recipe changes what a whole run leaves behind, or is shown to change no number.

The settings are enumerated from ``TrainConfig``: a new one without a case in ``settings`` fails.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from settings import CHANGES, ELSEWHERE, SAME, base, fill, leaves, left_behind, made, matters
from varl.config import TrainConfig

OWN = [name for name in CHANGES if not name.startswith(("method.", "optimizer.", "sampling."))]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("settings"))


def test_every_setting_has_a_case() -> None:
    known = list(leaves(TrainConfig))
    assert len(known) > 80
    named = [*CHANGES, *SAME, *ELSEWHERE]
    assert len(named) == len(set(named))
    assert set(known) == set(named)
    for file in ELSEWHERE.values():
        assert (Path(__file__).parents[1] / file).is_file(), file


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_a_setting_changes_what_a_run_leaves_behind(room: Path, tmp_path: Path, name: str) -> None:
    assert matters(room, tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_a_setting_changes_no_number(room: Path, tmp_path: Path, name: str) -> None:
    case = SAME[name]
    before = base(room, case.beside, tmp_path / "before")["lines"]
    after = left_behind(made(room, case.beside | {name: case.value}, tmp_path / "after"))["lines"]
    for one, other in zip(before, after, strict=True):
        assert one["reward"] == pytest.approx(other["reward"], rel=1e-4)
        for key in ("loss", "gradient_norm", "log_ratio_max", "return"):
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key
