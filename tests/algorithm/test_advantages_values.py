"""Advantages at their edges: what is equal but for rounding, the number that is added to a deviation, and types."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from varl.algorithm import group_advantages

EPS = 2.0**-23


@pytest.mark.parametrize("sign", [1, -1])
def test_eight_units_of_the_last_place_are_equal_and_nine_are_not(sign: int) -> None:
    for units, equal in ((8, True), (8.5, False)):
        rewards = torch.tensor([[1.0, 1.0 - units * EPS, 1.0]]) * sign
        out = group_advantages(rewards)
        assert out.zero_variance_P.tolist() == [equal]
        assert (out.group_std_P.item() == 0) is equal
        assert bool(out.advantage_PG.any()) is not equal


@pytest.mark.parametrize("kind", ["std", "batch_std"])
def test_a_millionth_is_added_to_the_deviation(kind: Any) -> None:
    rewards = torch.tensor([[0.0, 2e-6]], dtype=torch.float64)
    assert group_advantages(rewards, kind=kind).advantage_PG.tolist()[0] == pytest.approx([-0.5, 0.5])
    assert group_advantages(rewards, kind=kind, eps=3e-6).advantage_PG.tolist()[0] == pytest.approx([-0.25, 0.25])


def test_the_default_divides_by_the_deviation() -> None:
    rewards = torch.tensor([[0.0, 4.0], [0.0, 8.0]])
    torch.testing.assert_close(group_advantages(rewards).advantage_PG, torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.int64, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_numbers_are_in_full_precision(given: torch.dtype, expected: torch.dtype) -> None:
    out = group_advantages(torch.tensor([[1, 2, 6], [3, 3, 3]], dtype=given))
    assert {out.advantage_PG.dtype, out.group_mean_P.dtype, out.group_std_P.dtype} == {expected}
    assert out.group_mean_P.tolist() == [3, 3]
    assert out.group_std_P.tolist() == pytest.approx([(14 / 3) ** 0.5, 0])
    assert out.zero_variance_P.tolist() == [False, True]


def test_what_is_said_of_a_dropped_group() -> None:
    rewards = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    out = group_advantages(rewards, torch.tensor([[True, True], [True, False]]), kind="batch_std", eps=0.0)
    assert out.advantage_PG.tolist() == [[-1, 1], [0, 0]]
    assert out.dropped_P.tolist() == [False, True]
    assert out.zero_variance_P.tolist() == [False, False]
    assert out.group_mean_P[1].isnan()
    assert out.group_std_P[1].isnan()
    assert (out.group_mean_P[0], out.group_std_P[0]) == (1.5, 0.5)
