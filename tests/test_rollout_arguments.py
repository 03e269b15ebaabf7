"""Every argument of ``rollout``, ``replay`` and ``row_generators``: what it changes, and what it leaves alone."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from bits import SCHEDULE, Bits, labels
from varl import Prompt, Sampling, rollout
from varl.models.inkling import Inkling
from varl.rollout import replay, row_generators

GUIDED = Sampling(guidance=1.5, top_k=20)


def test_what_was_not_asked_for_is_not_there(inkling: Inkling, prompts: list[Prompt]) -> None:
    condition = inkling.condition(prompts[:2])
    plain = rollout(inkling, condition)
    assert (plain.logp, plain.state, plain.guidance, plain.steps) == (None, None, 0.0, 5)
    assert plain.condition is condition
    part = rollout(inkling, condition, GUIDED, until=2, keep_state=True)
    assert (part.steps, part.guidance, part.actions.shape) == (2, 1.5, (2, 5))
    assert part.state.step == 2
    rest = rollout(inkling, condition, GUIDED, start=part, until=4)
    assert (rest.steps, rest.guidance, rest.actions.shape, rest.state) == (4, 1.5, (2, 50), None)
    # What was scored before is not given unless it is asked for again.
    scored = rollout(inkling, condition, until=2, keep_state=True, logp=True)
    assert rollout(inkling, condition, start=scored).logp is None


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.0])
def test_a_start_goes_on_with_its_own_guidance_only(inkling: Inkling, prompts: list[Prompt], guidance: float) -> None:
    condition = inkling.condition(prompts[:2])
    start = rollout(inkling, condition, Sampling(guidance=1.5), until=2, keep_state=True)
    with pytest.raises(ValueError, match=f"drawn with guidance 1.5, and cannot go on with {guidance}"):
        rollout(inkling, condition, Sampling(guidance=guidance), start=start)


def test_defaults_are_the_policys_own_distribution_and_one_continuation(
    inkling: Inkling, prompts: list[Prompt]
) -> None:
    condition = inkling.condition(prompts[:2])
    plain, given = (
        rollout(inkling, condition, sampling, row_generators((3,), 2), until=3, keep_state=True).actions
        for sampling in (None, Sampling())
    )
    assert torch.equal(plain, given)
    head = rollout(inkling, condition, None, row_generators((3,), 2), until=3, keep_state=True)
    assert len(rollout(inkling, condition, start=head)) == 2
    assert torch.equal(head.actions, plain)


def test_draws_come_from_the_generator_that_is_given(inkling: Inkling, prompts: list[Prompt]) -> None:
    condition = inkling.condition(prompts[:2])
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first = rollout(inkling, condition).actions
        torch.manual_seed(5)
        assert torch.equal(rollout(inkling, condition).actions, first)
        before = torch.get_rng_state()
        own = rollout(inkling, condition, None, torch.Generator().manual_seed(1)).actions
        rollout(inkling, condition, None, row_generators((1,), 2))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(rollout(inkling, condition, None, torch.Generator().manual_seed(1)).actions, own)


def test_continuations_have_generators_of_their_own(inkling: Inkling, prompts: list[Prompt]) -> None:
    """Row r of a branched batch is drawn by generator r: continuation r % fork of prefix r // fork."""
    condition = inkling.condition(prompts[:2])
    head = rollout(inkling, condition, GUIDED, row_generators((1,), 2), until=3, keep_state=True)
    whole = rollout(inkling, condition, GUIDED, row_generators((2,), 6), start=head, fork=3).actions
    for row in range(6):
        one = rollout(inkling, condition, GUIDED, row_generators((1,), 2), until=3, keep_state=True)
        one.state, one.condition = one.state.select([row // 3]), condition.select([row // 3])
        one.actions = one.actions[[row // 3]]
        alone = rollout(inkling, one.condition, GUIDED, row_generators((2,), 6)[row : row + 1], start=one).actions
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("limit", [1, 3 * 36 * 64, 10**9])
@pytest.mark.parametrize("sampling", [None, GUIDED])
def test_how_many_rows_are_drawn_at_once_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, inkling: Inkling, prompts: list[Prompt], limit: int, sampling: Sampling | None
) -> None:
    condition = inkling.condition(prompts[:4])
    whole = rollout(inkling, condition, sampling, row_generators((4,), 4), logp=True)
    module, sizes = sys.modules["varl.rollout"], list[int]()  # varl.rollout is the function
    draw = module.draw
    monkeypatch.setattr(module, "LOGITS", limit)
    monkeypatch.setattr(module, "draw", lambda part, own: sizes.append(len(part)) or draw(part, own))
    parts = rollout(inkling, condition, sampling, row_generators((4,), 4), logp=True)
    assert torch.equal(parts.actions, whole.actions)
    torch.testing.assert_close(parts.logp, whole.logp)
    tokens = inkling.default_schedule.counts
    expected = [min(4, max(limit // (count * 64), 1)) for count in tokens]
    assert max(sizes) == max(expected)
    assert len(sizes) == sum(-(-4 // rows) for rows in expected)


def test_log_probabilities_are_of_whole_tokens() -> None:
    policy = Bits()
    drawn = rollout(policy, policy.condition(labels(3)), None, row_generators((0,), 3), logp=True)
    assert drawn.logp is not None
    assert drawn.logp.shape == (3, SCHEDULE.tokens)
    assert drawn.actions.shape == (3, SCHEDULE.tokens, 3)


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_a_replay_is_the_state_after_given_actions(inkling: Inkling, prompts: list[Prompt], guidance: float) -> None:
    condition = inkling.condition(prompts[:2])
    drawn = rollout(inkling, condition, None, row_generators((0,), 2))
    again = replay(inkling, condition, drawn.actions, 3, guidance)
    assert (again.steps, again.guidance, again.logp) == (3, guidance, None)
    assert torch.equal(again.actions, drawn.actions[:, :14])
    assert again.condition is condition
    assert again.state.step == 3
    assert replay(inkling, condition, drawn.actions, 3).guidance == 0.0


def test_seeds_of_rows() -> None:
    """A row's seed is that of (seed..., row, 1), of 63 bits, whatever the number of rows."""
    found = [generator.initial_seed() for generator in row_generators((7, 2), 3)]
    for row, seed in enumerate(found):
        word = int(np.random.SeedSequence((7, 2, row, 1)).generate_state(1, np.uint64)[0])
        assert seed == word >> 1
    assert [generator.initial_seed() for generator in row_generators((7, 2), 5)][:3] == found
    assert row_generators((7, 2), 0) == []
    assert row_generators((0, 5), 1)[0].initial_seed() != row_generators((0, 5, 0), 1)[0].initial_seed()
