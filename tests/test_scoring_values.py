"""What scoring computes and no more: passes, graphs, and prefixes of families that share no keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bits import SCHEDULE, Bits, labels
from small import counting
from varl import Prompt, Sampling, log_probs, rollout
from varl.models.inkling import Inkling
from varl.policy import Condition
from varl.rollout import Rollout, row_generators
from varl.scoring import Scores


@pytest.fixture
def branched(inkling: Inkling, prompts: list[Prompt]) -> Rollout:
    condition = inkling.condition(prompts[:2])
    head = rollout(inkling, condition, None, row_generators((1,), 2), until=3, keep_state=True)
    return rollout(inkling, condition, None, row_generators((2,), 4), start=head, fork=2)


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.5), Sampling(top_k=3), Sampling(guidance=1.0)])
def test_the_unconditional_pass_is_made_for_guidance_only(
    inkling: Inkling, branched: Rollout, sampling: Sampling | None
) -> None:
    with counting(inkling.transformer.blocks[0]) as tokens, torch.no_grad():
        log_probs(inkling, branched.condition, branched.actions, range(2), guidance=sampling)
    assert sum(tokens) == 4 * 5 * (2 if sampling is not None and sampling.guidance else 1)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_a_graph_of_the_prefix_is_made_where_it_is_asked_for(
    inkling: Inkling, branched: Rollout, monkeypatch: pytest.MonkeyPatch, recorded: bool, gradient: bool
) -> None:
    seen: list[tuple[int, int, bool]] = []
    prefill = Inkling.prefill

    def spy(self: Inkling, condition: Condition, actions: torch.Tensor, until: int, *rest: Any) -> Any:
        seen.append((len(actions), until, torch.is_grad_enabled()))
        return prefill(self, condition, actions, until, *rest)

    monkeypatch.setattr(Inkling, "prefill", spy)
    with torch.set_grad_enabled(recorded):
        log_probs(inkling, branched.condition, branched.actions, range(3, 5), shared=2, prefix_gradient=gradient)
        log_probs(inkling, branched.condition, branched.actions, range(3), shared=2, prefix_gradient=gradient)
    assert seen == [(2, 3, recorded and gradient)]


@pytest.mark.parametrize("gradient", [False, True])
def test_a_family_that_shares_no_keys_reads_every_prefix(gradient: bool) -> None:
    policy = Bits()
    condition = policy.condition(labels(2))
    head = rollout(policy, condition, None, row_generators((0,), 2), until=1, keep_state=True)
    drawn = rollout(policy, condition, None, row_generators((1,), 4), start=head, fork=2)
    given = (policy, drawn.condition, drawn.actions, range(1, 3))
    found = log_probs(*given, shared=2, prefix_gradient=gradient).logp
    assert torch.equal(found, log_probs(*given).logp)
    assert found.shape == (4, SCHEDULE.tokens - 1)


def test_what_is_not_asked_for_is_none() -> None:
    logp = torch.zeros(1, 2)
    assert (Scores(logp).entropy, Scores(logp).kl) == (None, None)
