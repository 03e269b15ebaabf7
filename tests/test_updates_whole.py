"""Values of prefixes with one continuation."""

from __future__ import annotations

import pytest
import torch

from small import make_inkling, make_prompts
from varl import Sampling, log_probs, updates
from varl.config import MethodConfig
from varl.rewards import RewardOutput

GUIDED = Sampling(guidance=0.7, top_p=0.9, temperature=0.8)


@pytest.mark.parametrize("value", ["policy", "soft-reference"])
@pytest.mark.parametrize("sampling", [Sampling(), GUIDED], ids=["plain", "guided"])
def test_the_value_of_one_continuation(value: str, sampling: Sampling) -> None:
    """R less eta times the log-ratio of its suffix."""
    policy, reference = make_inkling(), make_inkling(1)
    method = MethodConfig(middle=3, group=3, continuations=1, value=value, eta=0.02)  # type: ignore[arg-type]
    plan = updates.plan("prefix", method, policy.default_schedule)
    made = updates.draw(policy, policy.condition(make_prompts(2)), plan, sampling, (0,))
    score = torch.rand(6, generator=torch.Generator().manual_seed(0))
    output = RewardOutput.from_scores(score, 6)
    found, valid = updates.returns(output, made, plan, method, policy, reference, 4, sampling)
    guidance = None if sampling.is_plain else sampling
    own, other = (
        log_probs(p, made.whole.condition, made.whole.actions, range(3, 5), guidance=guidance).logp.sum(1)
        for p in (policy, reference)
    )
    torch.testing.assert_close(found, score - 0.02 * (own - other))
    assert bool(valid.all())
    assert float((found - score).abs().min()) > 0.1
