"""Choosing rows of states, conditions and caches: negative numbers, booleans, and what are no rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bits import SCHEDULE
from families import Family, actions_of, every, prompts
from small import make_inkling, make_prompts
from varl.policy import Condition, Policy, row_index

BATCH = 4
CHOICES: dict[str, tuple[Any, list[int]]] = {
    "the last": ([-1], [3]),
    "from both ends": ([0, -4, -2, 1], [0, 0, 2, 1]),
    "a tensor of negative numbers": (torch.tensor([-3, 3]), [1, 3]),
    "booleans": ([True, False, False, True], [0, 3]),
    "a tensor of booleans": (torch.tensor([False, True, True, False]), [1, 2]),
    "bytes, which are numbers": (torch.tensor([1, 0], dtype=torch.uint8), [1, 0]),
    "a range": (range(3, 0, -1), [3, 2, 1]),
    "none": ([], []),
    "no true one": ([False] * 4, []),
}
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "behind the end": ([0, 4], IndexError, "there is no row 4 in a batch of 4"),
    "before the beginning": ([-5], IndexError, "there is no row -5 in a batch of 4"),
    "fractions": ([0.0, 1.0], ValueError, "whole numbers"),
    "one number": (2, ValueError, "rows are a list"),
    "a table": ([[0, 1]], ValueError, "rows are a list"),
    "numbers and booleans": ([True, 2], ValueError, "not of both"),
    "too few booleans": ([True, False], ValueError, "2 booleans cannot choose from 4 rows"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_rows_are_counted_as_python_counts(case: str) -> None:
    rows, expected = CHOICES[case]
    found = row_index(rows, BATCH)
    assert (found.dtype, found.tolist()) == (torch.int64, expected)


@pytest.mark.parametrize("case", REFUSED)
def test_what_are_no_rows_is_refused(case: str) -> None:
    rows, error, message = REFUSED[case]
    policy = make_inkling()
    condition = policy.condition(make_prompts(BATCH))
    state = policy.start(condition, 2.0)
    policy.next_logits(state)
    for chosen in (condition, state):
        with pytest.raises(error, match=message):
            chosen.select(rows)
    assert state.cache is not None
    with pytest.raises((IndexError, ValueError)):
        state.cache.select(rows if error is ValueError else [9])  # type: ignore[union-attr]


@pytest.mark.parametrize("k", [0, -1])
def test_no_copies_are_no_batch(k: int) -> None:
    policy = make_inkling()
    condition = policy.condition(make_prompts(BATCH))
    with pytest.raises(ValueError, match=f"1 time or more, not {k}"):
        condition.repeat(k)
    with pytest.raises(ValueError, match=f"1 or more, not {k}"):
        policy.start(condition).fork(k)


@pytest.mark.parametrize("alone", [True, False])
def test_a_condition_of_one_prompt_is_repeated_with_its_one_unconditional_twin(alone: bool) -> None:
    """Repeated, it has one row's twin still, which is all rows'; a batch's own twins are repeated with it."""
    condition = Condition(SCHEDULE, {"x": torch.arange(1 if alone else 2)}, {"x": torch.arange(1 if alone else 2) + 7})
    rows = [0, 0, 0] if alone else [1, 1, 0]
    found = condition.select(rows)
    assert (found.features["x"].tolist(), found.null["x"].tolist()) == (rows, [7] if alone else [8, 8, 7])
    twice = condition.repeat(2)
    assert twice.null["x"].tolist() == ([7] if alone else [7, 7, 8, 8])


def checked(policy: Policy, case: str, asked: list[Any], guidance: float) -> None:
    rows, expected = CHOICES[case]
    condition = policy.condition(asked)
    actions = actions_of(policy, BATCH, condition.schedule.tokens)
    state = policy.start(condition, guidance)
    for step in range(2):
        policy.next_logits(state)
        policy.advance(state, actions[:, condition.schedule.tokens_of(step)])
    chosen = state.select(rows)
    torch.testing.assert_close(policy.next_logits(chosen), policy.next_logits(state)[expected], atol=2e-5, rtol=1e-4)
    features = condition.select(rows).features
    assert all(torch.equal(features[name], value[expected]) for name, value in condition.features.items())


@every
@pytest.mark.parametrize("guidance", [0.0, 2.0])
@pytest.mark.parametrize("case", ["from both ends", "a tensor of booleans"])
def test_chosen_rows_go_on_with_their_own_twins(family: Family, case: str, guidance: float) -> None:
    checked(family.make(), case, prompts(BATCH), guidance)


@pytest.mark.parametrize("guidance", [0.0, 2.0])
@pytest.mark.parametrize("case", ["the last", "from both ends", "booleans", "a range"])
def test_chosen_rows_of_inkling(case: str, guidance: float) -> None:
    checked(make_inkling(), case, make_prompts(BATCH), guidance)
