"""What an update computes, counted: tokens through the transformer, rows through the head; and its gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from learning import assert_close, counting, drawn, gradients, learner, stage
from small import make_inkling, make_prompts
from varl import log_probs, rollout
from varl.config import MethodConfig
from varl.learner import WATCHED
from varl.rollout import row_generators


# Inkling's tokens: 1, 4, 9, 36, 144; a prefix of three steps has 14, the suffix 180.
@pytest.mark.parametrize(
    ("kind", "tokens", "micro_batch"),
    [
        ("prefix", 8 * 14, 8),
        ("full", 8 * 194, 8),
        ("suffix", 2 * 14 + 8 * 180, 8),
        ("suffix", 2 * 14 + 8 * 180, 4),
        ("suffix", 4 * 14 + 8 * 180, 2),
        # Groups of four, three at a time: 3, 1, 3, 1.
        ("suffix", 4 * 14 + 8 * 180, 3),
    ],
)
def test_tokens_of_an_update(kind: str, tokens: int, micro_batch: int) -> None:
    """One pass of the policy and one of the reference, each of the trained steps and what they must read."""
    policy, reference = make_inkling(), make_inkling(1)
    method = MethodConfig(middle=3, group=4, continuations=2)
    batch = drawn(policy, kind, method)
    own = learner(policy, method, reference, micro_batch)
    with counting(policy) as of_policy, counting(reference) as of_reference:
        own.learn(batch, stage)
    scored = {"prefix": 14, "full": 194, "suffix": 180}[kind]
    assert of_policy == of_reference == {"tokens": tokens, "head": 8 * scored}


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 8])
def test_a_shared_prefix_gives_the_gradients_of_whole_sequences(micro_batch: int) -> None:
    policy, reference, method = make_inkling(), make_inkling(1), MethodConfig(middle=3, group=4, beta=0.3)
    batch = drawn(policy, "suffix", method, mask=True)
    learner(policy, method, reference, micro_batch).learn(batch, stage)
    shared = gradients(policy)
    policy = make_inkling()
    learner(policy, method, reference, 8).learn(replace(batch, shared=1), stage)
    assert_close(shared, gradients(policy))


@pytest.mark.parametrize("kind", ["full", "suffix"])
def test_the_head_sees_what_carries_a_term(kind: str) -> None:
    """Without a KL: masked tokens, and those whose entropy is watched; and the gradients stay."""
    method = MethodConfig(middle=3, group=4, beta=0)
    policy = make_inkling()
    batch = drawn(policy, kind, method, mask=True)
    assert batch.mask_BL is not None
    counts = [policy.default_schedule.counts[step] for step in batch.steps]
    watched = torch.cat([torch.arange(n) * min(WATCHED, n) % n < min(WATCHED, n) for n in counts])
    assert [int(part.sum()) for part in watched.split(counts)] == [min(n, WATCHED) for n in counts]
    with counting(policy) as found:
        log = learner(policy, method).learn(batch, stage)
    assert found["head"] == int(((batch.mask_BL > 0) | watched).sum()) < batch.mask_BL.numel()
    some = gradients(policy)
    whole = make_inkling()
    logp = log_probs(whole, batch.sequences.condition, batch.sequences.actions, batch.steps).logp
    weight = torch.tensor([n**-method.alpha for n in counts for _ in range(n)])
    loss = -(weight / weight.sum() * batch.mask_BL * batch.advantage_B[:, None] * logp).sum() / len(logp)
    expected = torch.autograd.grad(loss, list(whole.trainable.parameters()))
    assert_close(some, list(expected))
    assert log["loss"] == pytest.approx(
        float(-(weight / weight.sum() * batch.mask_BL * batch.advantage_B[:, None]).sum() / len(logp)), abs=1e-6
    )


def test_sequences_without_a_term_are_not_computed() -> None:
    method, policy = MethodConfig(middle=3, group=4, beta=0), make_inkling()
    batch = drawn(policy, "prefix", method)
    batch.advantage_B[:4] = 0
    with counting(policy) as found:
        learner(policy, method).learn(batch, stage)
    assert found["tokens"] == 4 * 14
    # With a KL, every valid one has a term.
    batch.valid_B = torch.arange(8) != 7
    with counting(policy) as found:
        learner(policy, replace(method, beta=0.1), make_inkling(1)).learn(batch, stage)
    assert found["tokens"] == 7 * 14


def test_entropy_of_the_watched_tokens_only() -> None:
    policy = make_inkling()
    condition = policy.condition(make_prompts(2))
    actions = rollout(policy, condition, None, row_generators((0,), 2)).actions
    some, kept = torch.arange(194) % 3 == 0, torch.rand(2, 194, generator=torch.Generator().manual_seed(0)) < 0.5
    whole = log_probs(policy, condition, actions, entropy=True).entropy
    assert whole is not None
    for keep in (None, kept):
        found = log_probs(policy, condition, actions, keep=keep, entropy=some, chunk=50).entropy
        assert found is not None
        torch.testing.assert_close(found, whole * some * (1 if keep is None else keep))


def test_decay_leaves_alone_what_a_prefix_does_not_read() -> None:
    """Positions of finer grids, and letters that no prompt has; as in the other families (tests/test_families.py)."""
    policy, method = make_inkling(), MethodConfig(middle=3, group=4, beta=0)
    before = {name: value.clone() for name, value in policy.transformer.state_dict().items()}
    learner(policy, method, weight_decay=0.5).learn(drawn(policy, "prefix", method), stage)
    after = policy.transformer.state_dict()
    assert torch.equal(after["position"][14:], before["position"][14:])
    assert not torch.equal(after["position"][:14], before["position"][:14])
    still = (after["cell.weight"] == before["cell.weight"]).all(1)
    assert 0 < still.sum() < len(still)
