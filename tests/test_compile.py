"""Compiled blocks: equal to plain ones, in few graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import Family, actions_of, every, prepared, prompts
from varl import Sampling, log_probs, rollout
from varl.loading import frozen_copy
from varl.policy import Policy
from varl.rollout import row_generators


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of operations of every graph made; they run as they are, which takes no compiler."""
    made: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        made.append(len(graph.graph.nodes))
        return graph.forward

    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled(self, backend=backend, **options))
    torch.compiler.reset()
    with torch.compiler.config.patch(fail_on_recompile_limit_hit=True):
        yield made
    torch.compiler.reset()


def use(policy: Policy, reference: Policy, middle: int) -> list[Tensor]:
    """What updates do: draw with and without guidance, continue, score a prefix and a suffix, with gradients."""
    condition, found = policy.condition(prompts(3)), []
    steps, prefix = len(condition.schedule), condition.schedule.span(range(middle)).stop
    for guidance in (0.0, 2.0):
        sampling = Sampling(guidance=guidance)
        start = rollout(policy, condition, sampling, row_generators((0,), 3), until=middle, keep_state=True)
        found.append(rollout(policy, condition, sampling, row_generators((1,), 6), start=start, fork=2).actions)
    actions = actions_of(policy, 3, condition.schedule.tokens)
    same = policy.condition(prompts(1)).repeat(3)
    actions[:, :prefix] = actions[0, :prefix]
    for asked in (range(steps), range(middle), range(middle, steps)):
        with torch.no_grad():
            found.append(log_probs(reference, condition, actions, asked).logp)
        found.append(log_probs(policy, condition, actions, asked).logp)
    found.append(log_probs(policy, same, actions, range(middle, steps), shared=3).logp)
    sum(logp.mean() for logp in found if logp.requires_grad).backward()  # type: ignore[union-attr]
    return [*found, *(p.grad for p in policy.trainable.parameters() if p.grad is not None)]


@pytest.mark.slow
@every
def test_few_graphs_serve_all_steps_and_layers(
    family: Family, graphs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = prepared(family, monkeypatch)
    expected = use(plain, frozen_copy(plain), 2)
    policy = prepared(family, monkeypatch, compile=True)
    reference = frozen_copy(policy)
    for found, value in zip(use(policy, reference, 2), expected, strict=True):
        torch.testing.assert_close(found, value, atol=1e-5, rtol=1e-5)
    before = len(graphs)
    use(policy, reference, 3)
    assert before > 0
    assert len(graphs) == before
