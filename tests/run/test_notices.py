"""What the log says of updates that have nothing to teach, and of masks without regions."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from varl import updates
from varl.algorithm import Advantages
from varl.config import MaskConfig, MethodConfig
from varl.rewards import RewardOutput
from varl.run.notices import Notices


def advantages(values: list[list[float]], valid: list[list[bool]]) -> Advantages:
    return updates.advantages(torch.tensor(values), torch.tensor(valid), MethodConfig())


FLAT = advantages([[1.0, 1.0]], [[True, True]])
TELLING = advantages([[1.0, 2.0], [1.0, 1.0]], [[True, True]] * 2)
FAILED = advantages([[1.0, 2.0]], [[True, False]])
NONE, SOME = torch.zeros(1, dtype=torch.bool), torch.ones(1, dtype=torch.bool)


def test_a_warning_is_for_the_first_of_several_in_a_row(caplog: pytest.LogCaptureFixture) -> None:
    notices, said = Notices(), []
    for number, found in enumerate((FAILED, FLAT, FLAT, TELLING, FLAT, FAILED, FLAT), 1):
        caplog.clear()
        notices.no_variance(number, found, NONE, False)
        said.append(len(caplog.messages))
    assert said == [0, 1, 0, 0, 1, 0, 1]
    assert caplog.messages == ["update 7: the returns of every group are equal; it takes no step"]


@pytest.mark.parametrize(
    ("found", "learnt", "cancelled", "said"),
    [
        (FLAT, SOME, False, "the returns of every group are equal; its step follows the KL alone"),
        (TELLING, SOME, True, "the sequences of every group are equal; it takes no step"),
    ],
)
def test_what_is_equal_and_what_follows(
    caplog: pytest.LogCaptureFixture, found: Advantages, learnt: torch.Tensor, cancelled: bool, said: str
) -> None:
    Notices().no_variance(3, found, learnt, cancelled)
    assert caplog.messages == [f"update 3: {said}"]


def output(regions: Any, failed: bool = False) -> RewardOutput:
    return RewardOutput(torch.zeros(2), torch.full((2,), failed), regions)


@pytest.mark.parametrize(
    ("mask", "level"), [(MaskConfig(), logging.INFO), (MaskConfig(dilation=9.0, shape="box"), logging.WARNING)]
)
def test_masks_without_regions_are_named_once(caplog: pytest.LogCaptureFixture, mask: MaskConfig, level: int) -> None:
    notices = Notices()
    with caplog.at_level(logging.INFO):
        notices.no_regions(output(None, failed=True), mask)  # nobody knows what it would have given
        notices.no_regions(output([[], []]), mask)
        notices.no_regions(output(None), MaskConfig(enabled=False))
        assert not caplog.messages
        for _ in range(2):
            notices.no_regions(output(None), mask)
    assert [record.levelno for record in caplog.records] == [level]
    assert "gives no regions, so every token is trained: method.mask has no effect" in caplog.messages[0]
