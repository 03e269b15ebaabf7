"""Passes and figures of several processes that learn together, and rows that share a prefix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bits import Bits
from learning import assert_close, batch, gradients, learner, stage
from varl.config import MethodConfig
from varl.distributed import Distributed

PLAIN = MethodConfig(beta=0)


class Two(Distributed):
    """Another process that makes two passes more, logged the same, and has no masks."""

    def __init__(self) -> None:
        super().__init__()
        self.summed = 0

    def gather_values(self, value: Any) -> list[Any]:
        if isinstance(value, int):
            return [value, value + 2]
        if value is None or (value and isinstance(value[0], float)):
            return [None, value, [0.0] * 3]
        return [value, value]

    def add_up(self, parameters: Any) -> None:
        self.summed += 1


@pytest.mark.parametrize("diagnose", [False, True])
def test_a_process_makes_as_many_passes_as_any(diagnose: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The idle ones carry no term and are not logged; what both log is summed up."""
    policy = Bits().double()
    made = batch(policy)
    log = learner(policy, PLAIN, micro_batch=4).learn(made, stage, diagnose)
    expected = gradients(policy)
    policy = Bits().double()
    own = learner(policy, PLAIN, micro_batch=4)
    own.distributed = two = Two()
    passes: list[Tensor] = []
    inputs = own._inputs
    monkeypatch.setattr(own, "_inputs", lambda whose, rows, old: passes.append(rows) or inputs(whose, rows, old))
    found = own.learn(made, stage, diagnose)
    assert_close(gradients(policy), expected)
    assert [rows.tolist() for rows in passes[:4]] == [[0, 1, 4, 5], [6, 7], [0], [0]]
    assert len(passes) == 4 * (1 + 3 * diagnose)
    assert two.summed == 1 + 3 * diagnose
    assert found["loss"] == pytest.approx(2 * log["loss"])
    assert found["gradient_norm"] == pytest.approx(log["gradient_norm"])
    shares = made.mask_BL.split([1, 2, 6], 1)  # type: ignore[union-attr]
    assert found["masked_share_by_step"] == pytest.approx([float(share.mean()) / 2 for share in shares])
    assert two.gather_values(None)[0] is None


@pytest.mark.parametrize(
    ("micro_batch", "expected"),
    [
        (8, [[0, 1, 2, 3, 6, 7]]),
        (5, [[0, 1, 2, 3], [6, 7]]),
        (3, [[0, 1], [2, 3], [6, 7]]),
        (1, [[0], [1], [2], [3], [6], [7]]),
    ],
)
def test_rows_that_share_a_prefix_are_taken_together_as_far_as_they_fit(
    micro_batch: int, expected: list[list[int]]
) -> None:
    wanted = torch.tensor([True, True, False, True, False, False, True, False])
    own = learner(Bits(), PLAIN, micro_batch=micro_batch)
    assert [rows.tolist() for rows in own._groups(wanted, 2)] == expected
    assert own._groups(torch.zeros(8, dtype=torch.bool), 2) == []


def test_idle_rows_are_of_one_group() -> None:
    policy = Bits()
    own = learner(policy, PLAIN, micro_batch=3)
    own.distributed = Two()
    made = batch(policy)
    made.shared = 4
    assert [rows.tolist() for rows in own._idle(made, 1)] == [[3], [0, 1, 2]]
    assert own._masked_share(replace(made, mask_BL=None)) == {"masked_share_by_step": [0.0] * 3}
    own.distributed = Distributed()
    assert own._idle(made, 1) == []
    assert own._masked_share(replace(made, mask_BL=None)) == {}
