"""Masks of very many points or pictures are made in portions, and are the same bits."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from varl.algorithm import portions, token_masks
from varl.algorithm.portions import few_at_a_time
from varl.schedule import ScaleSchedule


def test_portions_are_consecutive_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portions, "MOST", 10)
    assert list(few_at_a_time([4, 6, 1, 30, 1, 1, 1, 1], 3)) == [
        range(2),
        range(2, 3),
        range(3, 4),
        range(4, 7),
        range(7, 8),
    ]
    assert list(few_at_a_time([10], 3)) == [range(1)]
    assert list(few_at_a_time([], 3)) == []


@pytest.mark.parametrize("most", [1, 3000])
def test_portions_do_not_change_a_mask(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, schedule = np.random.default_rng(0), ScaleSchedule.square([1, 2, 3, 6])
    regions = [
        [rng.uniform(-9, 99, (rng.integers(1, 9), 2)).astype(np.float32) for _ in range(rng.integers(0, 4))]
        for _ in range(60)
    ]
    for options in ({"mode": "soft"}, {"dilation": 3.5, "mode": "soft"}, {"propagation": "direct"}):
        whole = token_masks(regions, (96, 96), schedule, **options)  # type: ignore[arg-type]
        with monkeypatch.context() as patch:
            patch.setattr(portions, "MOST", most)
            parts = token_masks(regions, (96, 96), schedule, **options)  # type: ignore[arg-type]
        np.testing.assert_array_equal(parts, whole)


def test_memory_does_not_grow_with_the_pictures() -> None:
    """Concave outlines, dilated: a piece an edge."""
    turn = np.linspace(0, 2 * np.pi, 300, endpoint=False)
    radius = 300 + 100 * (np.arange(300) % 2)
    star = np.stack([512 + radius * np.cos(turn), 512 + radius * np.sin(turn)], 1).astype(np.float32)
    schedule = ScaleSchedule.square([1, 2, 64])
    tracemalloc.start()
    mask = token_masks([[star]] * 8, (1024, 1024), schedule, dilation=2.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0 < mask.mean() < 1
    assert peak < 300e6  # 8 at once take over 500 MB
