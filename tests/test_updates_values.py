"""Plans, draws and returns of an update at their edges: early values, portions, failures, and who is asked what."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from small import counting, make_inkling
from varl import Prompt, Sampling, log_probs, updates
from varl.config import MethodConfig
from varl.models.inkling import Inkling
from varl.policy import Condition
from varl.rewards import RewardOutput
from varl.rollout import Rollout

EARLY = MethodConfig(middle=2, group=2, continuations=2, value_at="grid:6")
UNCONTINUED = MethodConfig(middle=3, group=2, continuations=1, value_at="grid:3")


def test_an_estimator_that_weighs_the_suffix_needs_one(inkling: Inkling) -> None:
    for value in ("soft-reference", "policy"):
        method = MethodConfig(middle=3, continuations=1, value_at="grid:3")
        object.__setattr__(method, "value", value)
        with pytest.raises(ValueError, match=f"method.value {value} has no suffix to weigh; leave it out"):
            updates.plan("prefix", method, inkling.default_schedule)
        object.__setattr__(method, "value_at", "grid:6")
        assert updates.plan("prefix", method, inkling.default_schedule).until == 4


def test_a_prefix_is_continued_to_where_it_is_valued(inkling: Inkling, prompts: list[Prompt]) -> None:
    """And no further; valued where it ends, it is not continued at all."""
    condition = inkling.condition(prompts[:2])
    plan = updates.plan("prefix", EARLY, inkling.default_schedule)
    with counting(inkling.transformer.blocks[0]) as tokens:
        early = updates.draw(inkling, condition, plan, Sampling(), (0,))
    assert sum(tokens) == 4 * 5 + 8 * 45
    assert (early.whole.steps, early.trained.steps) == (4, 2)
    assert (early.whole.actions.shape, early.trained.actions.shape) == ((8, 50), (4, 5))
    plan = updates.plan("prefix", UNCONTINUED, inkling.default_schedule)
    for at_once in (0, 3):
        with counting(inkling.transformer.blocks[0]) as tokens:
            alone = updates.draw(inkling, condition, plan, Sampling(), (0,), at_once=at_once)
        assert sum(tokens) == 4 * 14
        assert alone.trained is alone.whole
        assert alone.whole.steps == 3


def test_only_prefixes_are_continued_by_another_policy(inkling: Inkling, prompts: list[Prompt]) -> None:
    method = MethodConfig(middle=3, group=2)
    plan, condition = updates.plan("suffix", method, inkling.default_schedule), inkling.condition(prompts[:1])
    own, same = (updates.draw(inkling, condition, plan, Sampling(), (0,), other) for other in (None, make_inkling(1)))
    assert torch.equal(own.whole.actions, same.whole.actions)


def test_all_rows_together_are_not_copied(
    inkling: Inkling, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = updates.plan("full", MethodConfig(middle=3, group=2), inkling.default_schedule)
    condition, selected = inkling.condition(prompts[:2]), list[Any]()
    select = Condition.select
    monkeypatch.setattr(Condition, "select", lambda self, rows: selected.append(rows) or select(self, rows))
    updates.draw(inkling, condition, plan, Sampling(), (0,))
    assert selected == []
    updates.draw(inkling, condition, plan, Sampling(), (0,), at_once=3)
    assert selected == [range(3), range(3, 4)]


@pytest.mark.parametrize("at_once", [0, 1, 2, 4])
def test_what_is_joined_keeps_its_guidance_and_its_null(inkling: Inkling, prompts: list[Prompt], at_once: int) -> None:
    """Rows whose unconditional twins are their own keep them."""
    condition = inkling.condition(prompts[:2])
    null = {name: value.expand(2, *value.shape[1:]).clone() for name, value in condition.null.items()}
    null["cells"][1] = condition.features["cells"][1]
    condition = Condition(condition.schedule, condition.features, null)
    plan = updates.plan("prefix", EARLY, inkling.default_schedule)
    made = updates.draw(inkling, condition, plan, Sampling(guidance=1.5), (0,), at_once=at_once)
    for found, each in ((made.whole, 4), (made.trained, 2)):
        assert found.guidance == 1.5
        assert found.condition.schedule is condition.schedule
        assert found.state is None
        for kind in ("features", "null"):
            cells = getattr(condition, kind)["cells"].repeat_interleave(each, 0)
            assert torch.equal(getattr(found.condition, kind)["cells"], cells)


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_one_head_is_continued_by_as_many_as_are_asked_for(
    inkling: Inkling, prompts: list[Prompt], at_once: int
) -> None:
    method = MethodConfig(middle=3, group=5)
    plan, condition = updates.plan("suffix", method, inkling.default_schedule), inkling.condition(prompts[:2])
    seen: list[int] = []
    updates.draw(inkling, condition, plan, Sampling(), (0,), at_once=at_once, each=lambda part: seen.append(len(part)))
    assert seen == {1: [1] * 10, 2: [2, 2, 1] * 2, 5: [5, 5]}[at_once]


def test_a_failed_picture_counts_as_nothing(inkling: Inkling) -> None:
    method = MethodConfig(middle=3, group=2, continuations=2)
    for kind, expected in (("full", [0.0, 2.0, 3.0, 4.0]), ("prefix", [None, None])):
        plan = updates.plan(kind, method, inkling.default_schedule)  # type: ignore[arg-type]
        output = RewardOutput.from_scores([math.nan, 2.0, 3.0, 4.0], 4)
        value, valid = updates.returns(output, None, plan, method, inkling, None, 4)  # type: ignore[arg-type]
        if kind == "full":
            assert value.tolist() == expected
            assert valid.tolist() == [False, True, True, True]
        else:
            assert value.tolist() == pytest.approx(
                [math.log((1 + math.exp(2)) / 2), math.log((math.exp(3) + math.exp(4)) / 2)]
            )
            assert valid.tolist() == [False, True]


@pytest.mark.parametrize("sampling", [None, Sampling(), Sampling(top_p=0.9)])
def test_what_a_value_asks_of_the_policies(
    inkling: Inkling, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch, sampling: Sampling | None
) -> None:
    """A few rows at a time, of the suffix alone, under the distribution that they were drawn from."""
    method = MethodConfig(middle=2, group=2, continuations=2, value="policy", eta=0.5, value_at="grid:6")
    plan, reference = updates.plan("prefix", method, inkling.default_schedule), make_inkling(1)
    made = updates.draw(inkling, inkling.condition(prompts[:2]), plan, Sampling(), (0,))
    seen: list[tuple[Any, ...]] = []
    inner = updates.log_probs

    def spy(policy: Inkling, condition: Condition, actions: Tensor, steps: range, **options: Any) -> Any:
        seen.append((policy, len(actions), steps, options))
        assert not torch.is_grad_enabled()
        return inner(policy, condition, actions, steps, **options)

    monkeypatch.setattr(updates, "log_probs", spy)
    output = RewardOutput.from_scores(torch.zeros(8), 8)
    updates.returns(output, made, plan, method, inkling, reference, 3, sampling)
    guidance = sampling if sampling is not None and sampling.top_p < 1 else None
    rows = [(size, range(2, 4), {"guidance": guidance}) for size in (3, 3, 2)]
    assert seen == [(model, *each) for model in (inkling, reference) for each in rows]


def test_joining_one_part_is_that_part(inkling: Inkling, prompts: list[Prompt]) -> None:
    part = Rollout(inkling.condition(prompts[:1]), torch.zeros(1, 5, dtype=torch.long), 2)
    assert updates._joined([part], part.condition, range(len(part))) is part
    both = updates._joined([part, part], inkling.condition(prompts[:2]), range(2))
    assert (len(both), both.steps, both.guidance) == (2, 2, 0.0)


def test_a_cycle_of_updates() -> None:
    method = MethodConfig(prefix_updates=2, suffix_updates=3)
    assert [updates.kind_of_update(method, u)[0] for u in range(7)] == list("ppssspp")


@pytest.mark.parametrize("kind", ["prefix", "suffix", "full"])
@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_sequences_drawn_in_parts_are_scored_under_guidance(
    inkling: Inkling, prompts: list[Prompt], kind: updates.Kind, at_once: int
) -> None:
    """The unconditional twin that all rows share is there once, however many parts were joined."""
    method = MethodConfig(middle=3, group=4, continuations=2)
    plan, condition = updates.plan(kind, method, inkling.default_schedule), inkling.condition(prompts[:3])
    guided = Sampling(guidance=1.0)
    whole, parts = (updates.draw(inkling, condition, plan, guided, (0,), at_once=few) for few in (0, at_once))
    for found, expected in ((parts.whole, whole.whole), (parts.trained, whole.trained)):
        assert torch.equal(found.actions, expected.actions)
        assert {name: len(value) for name, value in found.condition.null.items()} == {"cells": 1}
        rows, steps = torch.arange(3), range(found.steps)
        scored = [
            log_probs(inkling, of.condition.select(rows), of.actions[rows], steps, guidance=guided).logp
            for of in (found, expected)
        ]
        torch.testing.assert_close(*scored)
