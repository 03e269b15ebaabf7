"""Every option of an update's masks, returns and advantages reaches the algorithm, and changes what comes of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from varl import Prompt, updates
from varl.algorithm import AdvantageKind, group_advantages, middle_return, token_masks
from varl.config import MaskConfig, MethodConfig
from varl.models.inkling import Inkling
from varl.rewards import RewardOutput
from varl.rollout import Rollout, rollout, row_generators
from varl.sampling import Sampling

METHOD = MethodConfig(middle=3, prompts=2, group=2, continuations=2)
# What the masks' other fields are for: the loss, not the mask.
OF_THE_LOSS = {"enabled", "count", "kl"}
CALLED = {"coverage": "mode"}
"""The algorithm's names for options, where they differ."""


def triangle(left: float, top: float, side: float) -> np.ndarray:
    return np.array([[left, top], [left + side, top], [left, top + side]], dtype=np.float32)


def output(scores: list[float], regions: list | None = None) -> RewardOutput:
    made = RewardOutput.from_scores(scores, len(scores))
    made.regions = regions
    return made


# Of one prefix each: regions apart and overlapping; an empty one beside a full one; two empty ones.
REGIONS = [
    [triangle(1, 1, 11)],
    [triangle(3, 3, 8), triangle(31, 29, 9)],
    [],
    [triangle(22, 5, 13)],
    [],
    [],
    [triangle(40, 40, 4)],
    [triangle(40, 40, 4)],
]

OPTIONS: dict[str, Any] = {
    "propagation": "direct",
    "empty": "skip",
    "merge": "mean",
    "coverage": "soft",
    "shape": "box",
    "dilation": 3.0,
}


def test_every_option_of_a_mask_is_tried() -> None:
    assert {field.name for field in dataclasses.fields(MaskConfig)} == set(OPTIONS) | OF_THE_LOSS


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_of_a_mask_reaches_the_mask(inkling: Inkling, name: str) -> None:
    schedule = inkling.default_schedule
    plan = updates.plan("prefix", METHOD, schedule)

    def masks(mask: MaskConfig, size: tuple[int, int] = (48, 48)) -> Tensor:
        return updates.masks(output([0.0] * 8, REGIONS), plan, schedule, mask, size)

    found = masks(MaskConfig(**{name: OPTIONS[name]}))
    options = {CALLED.get(name, name): OPTIONS[name]}
    assert torch.equal(found, token_masks(REGIONS, (48, 48), schedule, continuations=2, **options))
    assert not torch.equal(found, masks(MaskConfig()))
    # Regions are in pixels of the pictures: in larger pictures they are smaller.
    larger = masks(MaskConfig(**{name: OPTIONS[name]}), (96, 96))
    assert torch.equal(larger, token_masks(REGIONS, (96, 96), schedule, continuations=2, **options))
    assert not torch.equal(larger, found)


@pytest.mark.parametrize("kind", get_args(AdvantageKind))
def test_the_kind_of_advantage_reaches_the_advantages(kind: str) -> None:
    value_PG = torch.tensor([[0.0, 1.0, 5.0], [2.0, 2.5, 2.5], [1.0, 1.0, 1.0]])
    valid_PG = torch.ones(3, 3, dtype=torch.bool)
    valid_PG[1, 2] = False
    found = updates.advantages(value_PG, valid_PG, MethodConfig(advantage=kind))
    expected = group_advantages(value_PG, valid_PG, kind=kind)
    assert torch.equal(found.advantage_PG, expected.advantage_PG)
    assert found.dropped_P.tolist() == [False, True, False]
    for other in set(get_args(AdvantageKind)) - {kind}:
        assert not torch.allclose(found.advantage_PG, group_advantages(value_PG, valid_PG, kind=other).advantage_PG)


@pytest.mark.parametrize(
    ("value", "eta"), [("soft", 0.3), ("soft", 1.0), ("soft", math.inf), ("mean", 1.0), ("max", 1.0)]
)
def test_the_estimator_and_its_temperature_reach_the_return(inkling: Inkling, value: str, eta: float) -> None:
    method = dataclasses.replace(METHOD, value=value, eta=eta)
    plan = updates.plan("prefix", method, inkling.default_schedule)
    scores = [0.0, 1.0, 2.0, -1.0, 0.5, 0.5, 3.0, 7.0]
    found, valid = updates.returns(output(scores), None, plan, method, inkling, None, 4)
    assert valid.all()
    expected = middle_return(torch.tensor(scores).view(4, 2), estimator=value, eta=eta)
    torch.testing.assert_close(found, expected)


def test_a_failed_continuation_makes_its_prefix_invalid_and_no_other(inkling: Inkling) -> None:
    plan = updates.plan("prefix", METHOD, inkling.default_schedule)
    scores = [0.0, 1.0, 2.0, math.nan, 0.5, 0.5, math.nan, math.nan]
    found, valid = updates.returns(output(scores), None, plan, METHOD, inkling, None, 4)
    assert valid.tolist() == [True, False, True, False]
    assert found.isfinite().all()
    soft = [math.log((1 + math.e) / 2), 0.5]
    torch.testing.assert_close(found[[0, 2]], torch.tensor(soft))


@pytest.mark.parametrize("kind", ["full", "prefix", "suffix"])
def test_some_of_the_sequences_are_those_of_all(inkling: Inkling, prompts: list[Prompt], kind: updates.Kind) -> None:
    """Whichever rows are drawn, they are the same rows, with their own continuations and conditions."""
    plan = updates.plan(kind, METHOD, inkling.default_schedule)
    condition, sampling = inkling.condition(prompts[:3]), Sampling(guidance=1.0, top_p=0.9)
    count, k = 3 * plan.sequences, plan.continuations
    every = updates.draw(inkling, condition, plan, sampling, (4,))
    seen: list[Tensor] = []
    for rows in (range(count // 2), range(count // 2, count), range(1, 2)):
        seen.clear()
        some = updates.draw(
            inkling, condition, plan, sampling, (4,), trained=rows, each=lambda part: seen.append(part.actions)
        )
        finished = slice(rows.start * k, rows.stop * k)
        assert torch.equal(some.trained.actions, every.trained.actions[rows.start : rows.stop])
        assert torch.equal(some.whole.actions, every.whole.actions[finished])
        assert torch.equal(torch.cat(seen), some.whole.actions)
        cells = every.whole.condition.features["cells"][finished]
        assert torch.equal(some.whole.condition.features["cells"], cells)


@pytest.mark.parametrize("kind", ["full", "prefix", "suffix"])
def test_all_are_drawn_together_unless_asked_otherwise(
    inkling: Inkling, prompts: list[Prompt], kind: updates.Kind
) -> None:
    plan, condition = updates.plan(kind, METHOD, inkling.default_schedule), inkling.condition(prompts[:3])
    seen: list[int] = []
    given: Any = {"policy": inkling, "condition": condition, "plan": plan, "sampling": Sampling(), "seed": (4,)}
    for options, expected in (({}, [3 * plan.pictures]), ({"at_once": 1}, [1] * 3 * plan.pictures)):
        seen.clear()
        updates.draw(**given, **options, each=lambda part: seen.append(len(part)))
        assert seen == expected
    parts: list[Rollout] = []
    made = updates.draw(**given, each=parts.append)
    assert made.whole is parts[0]  # and not a copy of it


@pytest.mark.parametrize("by_reference", [False, True])
def test_prefixes_are_continued_by_generators_of_their_own(
    inkling: Inkling, prompts: list[Prompt], by_reference: bool
) -> None:
    """The first stage's seed is (seed, 0), the second's (seed, 1), one generator a row."""
    plan = updates.plan("prefix", METHOD, inkling.default_schedule)
    condition = inkling.condition(prompts[:2])
    made = updates.draw(inkling, condition, plan, Sampling(), (7, 1), inkling if by_reference else None)

    heads = condition.repeat(2)
    prefix = rollout(inkling, heads, None, row_generators((7, 1, 0), 4), until=3, keep_state=True)
    whole = rollout(inkling, heads, None, row_generators((7, 1, 1), 8), start=prefix, fork=2)
    assert torch.equal(made.trained.actions, prefix.actions)
    assert torch.equal(made.whole.actions, whole.actions)


def test_what_is_drawn_together() -> None:
    """Portions of 3 prompts' sequences: whole heads together, up to a number of finished pictures, others alone."""
    shared = updates.Plan("suffix", range(3, 5), heads=1, tails=4, branch_at=3, group=4, continuations=1, until=5)
    assert list(shared.portions(range(12), 0)) == [(range(3), range(4))]
    assert list(shared.portions(range(12), 8)) == [(range(2), range(4)), (range(2, 3), range(4))]
    assert list(shared.portions(range(12), 3)) == [(range(i, i + 1), range(4)) for i in range(3)]
    assert list(shared.portions(range(2, 11), 0)) == [
        (range(1), range(2, 4)),
        (range(1, 2), range(4)),
        (range(2, 3), range(3)),
    ]
    prefix = updates.Plan("prefix", range(3), heads=4, tails=3, branch_at=3, group=4, continuations=3, until=5)
    assert (prefix.pictures, prefix.sequences) == (12, 4)
    assert list(prefix.portions(range(5, 8), 6)) == [(range(5, 7), range(3)), (range(7, 8), range(3))]
    reused = updates.Plan("suffix", range(3, 5), 4, 3, 3, 3, 1, 5, reuses=True)
    assert (reused.pictures, reused.sequences) == (12, 12)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"suffix_state": "reused", "continuations": 3}, (range(3, 5), 4, 3, 3, 3, 1, 5, True)),
        ({"suffix_state": "shared"}, (range(3, 5), 1, 4, 3, 4, 1, 5, False)),
        ({"suffix_state": "independent"}, (range(3, 5), 4, 1, 5, 4, 1, 5, False)),
    ],
)
def test_plans_of_a_suffix(inkling: Inkling, options: dict[str, Any], expected: tuple[Any, ...]) -> None:
    method = MethodConfig(middle=3, group=4, **options)
    assert dataclasses.astuple(updates.plan("suffix", method, inkling.default_schedule)) == ("suffix", *expected)


def test_where_prefixes_are_valued(inkling: Inkling) -> None:
    schedule = inkling.default_schedule  # grids 1 2 3 6 12

    def plan(value_at: str, **options: Any) -> updates.Plan:
        return updates.plan("prefix", MethodConfig(middle=3, group=4, value_at=value_at, **options), schedule)

    assert plan("end", continuations=2).until == 5
    assert plan("grid:6", continuations=2).until == 4
    assert plan("grid:3", continuations=1).until == 3
    with pytest.raises(ValueError, match="value_at is step 2, and must not be before the middle step 3"):
        plan("grid:2", continuations=1)
    for options in ({"continuations": 2}, {"continuations": 1, "continuations_by": "reference"}):
        with pytest.raises(ValueError, match="value_at is the middle step, 3, where prefixes are not continued"):
            plan("grid:3", **options)
