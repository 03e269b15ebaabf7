"""What a reward has once given, every result of an update holds: those of failed pictures too."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from small import make_inkling, make_prompts
from varl.evaluation.held_out import evaluate
from varl.policy import Prompt
from varl.rewards import RewardOutput
from varl.rewards.base import FailureLog
from varl.rewards.checks import MOST_CHARACTERS, MOST_POINTS, checked
from varl.rewards.python import PythonReward
from varl.rewards.scoring import Scoring
from varl.sampling import Sampling

SQUARE = np.array([[0, 0], [4, 0], [4, 4], [0, 4]], np.float32)


class Full:
    """Gives every field; the calls in ``raises`` raise."""

    def __init__(self, raises: Sequence[int] = ()) -> None:
        self.raises, self.calls = raises, 0

    def __call__(self, images: Tensor, prompts: list[Prompt]) -> RewardOutput:
        self.calls += 1
        if self.calls - 1 in self.raises:
            raise RuntimeError("the engine is gone")
        batch = len(images)
        return RewardOutput(
            torch.arange(1.0, batch + 1),
            regions=[[SQUARE]] * batch,
            parts={"a": torch.ones(batch)},
            texts=["TEA"] * batch,
        )


@pytest.mark.parametrize("raises", [(0,), (1,), (2,), (0, 1)])
def test_parts_of_an_update_that_fail_keep_the_fields_of_the_others(raises: tuple[int, ...]) -> None:
    reward = PythonReward(Full(raises))
    with ThreadPoolExecutor(1) as pool:
        scoring = Scoring(reward, [Prompt()] * 6, pool)
        for part in torch.zeros(6, 3, 4, 4).split(2):
            scoring.add(part)
        _, output = scoring.result()
    failed = [i // 2 in raises for i in range(6)]
    assert output.failed.tolist() == failed
    assert output.score.nan_to_num(0).tolist() == [0.0 if bad else float(i % 2 + 1) for i, bad in enumerate(failed)]
    assert output.parts["a"].nan_to_num(0).tolist() == [0.0 if bad else 1.0 for bad in failed]
    assert output.texts == ["" if bad else "TEA" for bad in failed]
    assert output.regions is not None
    assert [len(own) for own in output.regions] == [0 if bad else 1 for bad in failed]


def test_a_batch_that_fails_later_holds_what_was_given_before() -> None:
    reward = PythonReward(Full(raises=[0, 2]))
    first, _, third = (reward(torch.zeros(2, 3, 4, 4), [Prompt()] * 2) for _ in range(3))
    assert (first.regions, first.parts, first.texts) == (None, {}, None)
    assert (third.regions, third.texts) == ([[], []], ["", ""])
    assert third.parts["a"].isnan().tolist() == [True, True]
    assert third.failed.all()


def test_joined_knows_no_fields_that_nobody_gave() -> None:
    joined = RewardOutput.joined([RewardOutput(torch.ones(2)), RewardOutput.failed_like(1)])
    assert (joined.regions, joined.parts, joined.texts) == (None, {}, None)
    assert joined.failed.tolist() == [False, False, True]
    with pytest.raises(ValueError, match="no output"):
        RewardOutput.joined([])


def test_failed_like() -> None:
    like = RewardOutput(
        torch.ones(5), regions=[[]] * 5, parts={"a": torch.ones(5), "b": torch.ones(5)}, texts=["x"] * 5
    )
    failed = RewardOutput.failed_like(2, like)
    assert failed.failed.tolist() == [True, True]
    assert failed.score.isnan().all()
    assert (failed.regions, failed.texts, list(failed.parts)) == ([[], []], ["", ""], ["a", "b"])
    assert all(part.shape == (2,) and part.isnan().all() for part in failed.parts.values())


def test_scores_that_are_not_finite_are_failed_unless_it_is_said() -> None:
    score = torch.tensor([1.0, torch.nan, torch.inf])
    assert RewardOutput(score).failed.tolist() == [False, True, True]
    assert RewardOutput(score=score, regions=[[], [], []]).failed.tolist() == [False, True, True]
    assert RewardOutput(score, torch.tensor([True, False, False])).failed.tolist() == [True, False, False]


def outcome(**fields: Any) -> tuple[RewardOutput, FailureLog]:
    log = FailureLog("test")
    return checked(RewardOutput(torch.ones(3), **fields), 3, log), log


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"regions": [[], [np.zeros((200_000, 2))], [SQUARE]]}, "may have 5,000 points together"),
        ({"regions": [[], [SQUARE] * (MOST_POINTS // 4 + 1), [SQUARE]]}, "may have 5,000 points together"),
        ({"regions": [[], [np.zeros((4, 3))], [SQUARE]]}, "regions hold polygons"),
        ({"regions": [[], ["no polygon"], [SQUARE]]}, "ValueError"),
        ({"regions": [[], 3, [SQUARE]]}, "TypeError"),
        ({"texts": ["a", "b" * 100_000, "c"]}, "5,000 characters, this one has 100,000"),
        ({"texts": ["a", 3, "c"]}, "texts hold texts"),
    ],
)
def test_a_picture_with_what_cannot_be_used_fails_alone(fields: dict[str, Any], reason: str) -> None:
    output, log = outcome(**fields)
    assert output.failed.tolist() == [False, True, False]
    assert output.score.isnan().tolist() == [False, True, False]
    assert log.total == 1
    assert reason in next(iter(log.reasons))
    if output.regions is not None:
        assert [len(own) for own in output.regions] == [0, 0, 1]


def test_the_most_that_a_picture_may_have() -> None:
    output, log = outcome(regions=[[SQUARE] * (MOST_POINTS // 4)] * 3, texts=["b" * MOST_CHARACTERS] * 3)
    assert not output.failed.any()
    assert log.total == 0


def test_failed_pictures_have_no_region() -> None:
    output, _ = outcome(failed=torch.tensor([True, False, False]), regions=[[SQUARE]] * 3)
    assert output.regions is not None
    assert [len(own) for own in output.regions] == [0, 1, 1]


@pytest.mark.parametrize("name", ["score", "", 3])
def test_parts_have_names_of_their_own(name: Any) -> None:
    reward = PythonReward(lambda images, prompts: RewardOutput(torch.ones(3), parts={name: torch.ones(3)}))
    assert reward(torch.zeros(3, 3, 4, 4), [Prompt()] * 3).failed.all()


@pytest.mark.parametrize("raises", [(0,), (1,)])
def test_an_evaluation_reads_on_after_a_batch_that_failed(raises: tuple[int, ...]) -> None:
    prompts = [Prompt(p.text, ("TEA",), p.boxes[:1]) for p in make_prompts(4)]
    found = evaluate(make_inkling(), prompts, Sampling(), PythonReward(Full(raises)), seed=0, batch=2)
    scored = [i // 2 not in raises for i in range(4)]
    assert found.texts == ["TEA" if good else "" for good in scored]
    assert found.hits is not None
    assert np.nan_to_num(found.hits).tolist() == [float(good) for good in scored]
    assert found.failed == 2
