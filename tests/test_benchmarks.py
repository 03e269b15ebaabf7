"""The arithmetic of the results report."""

import json
from pathlib import Path

import numpy as np
import pytest
from benchmarks.results import METHODS, interval, reaching, read_curve


def test_budgets_are_equal_in_pictures():
    for method in METHODS.values():
        assert method.updates_for(4 * 7 * 32) * method.pictures / method.updates == 4 * 7 * 32


def test_interval_is_students_t():
    mean, half = interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert mean == 3.0
    assert half == pytest.approx(2.776 * 1.5811 / 5**0.5, rel=2e-3)


@pytest.mark.parametrize(
    ("level", "expected"), [(0.4, 0.0), (0.5, 10.0), (0.55, 15.0), (0.65, 25.0), (0.9, float("inf"))]
)
def test_reaching_interpolates_the_first_crossing(level: float, expected: float):
    assert reaching(np.array([0.0, 10, 20, 30]), np.array([0.4, 0.5, 0.6, 0.7]), level) == pytest.approx(expected)


def test_curve_counts_training_seconds_only(tmp_path: Path):
    lines = [{"update": u, "seconds": {"rollout": 1.0, "reward": 0.5 * u}} for u in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "evaluations").mkdir()
    for update, accuracy in ((0, 0.3), (2, 0.5), (3, 0.6)):
        record = {
            "update": update,
            "training_pictures": 32 * update,
            "metrics": {"word_accuracy": {"value": accuracy}},
        }
        (tmp_path / "evaluations" / f"update-{update:06d}.json").write_text(json.dumps(record))
    curve = read_curve(tmp_path)
    assert curve.pictures.tolist() == [0, 64, 96]
    assert curve.seconds.tolist() == [0.0, 3.5, 6.0]
    assert curve.accuracy.tolist() == [0.3, 0.5, 0.6]
