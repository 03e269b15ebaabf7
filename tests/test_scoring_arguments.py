"""Every argument of ``log_probs``: what it changes, what it leaves alone, and what it costs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bits import SCHEDULE, Bits, labels
from small import counting, make_inkling
from varl import Prompt, Sampling, log_probs, rollout, scoring
from varl.models.inkling import Inkling
from varl.rollout import Rollout, replay, row_generators

SUFFIX = range(3, 5)
SAMPLINGS = [Sampling(temperature=0.6), Sampling(top_k=12), Sampling(guidance=1.5, top_p=0.8, temperature=1.3)]


@pytest.fixture
def branched(inkling: Inkling, prompts: list[Prompt]) -> Rollout:
    """Two prefixes of three steps, three continuations of each."""
    condition = inkling.condition(prompts[:2])
    head = rollout(inkling, condition, None, row_generators((1,), 2), until=3, keep_state=True)
    return rollout(inkling, condition, None, row_generators((2,), 6), start=head, fork=3)


@pytest.fixture(scope="module")
def reference() -> Inkling:
    return make_inkling(seed=1)


def gradients(policy: torch.nn.Module, value: Tensor) -> list[Tensor]:
    parameters = list(policy.parameters())
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def close(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether gradients are equal but for rounding: of the largest, where many are summed."""
    largest = max(float(y.abs().max()) for y in b)
    return all(torch.allclose(x, y, atol=1e-5 * largest, rtol=1e-4) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("guidance", [None, Sampling(guidance=1.5)])
def test_a_shared_prefix_is_computed_once_and_learns_as_if_it_were_not_shared(
    inkling: Inkling, branched: Rollout, guidance: Sampling | None
) -> None:
    def scored(shared: int) -> tuple[Tensor, list[Tensor], int]:
        with counting(inkling.transformer.blocks[0]) as tokens:
            logp = log_probs(
                inkling, branched.condition, branched.actions, SUFFIX, guidance=guidance, shared=shared
            ).logp
        return logp, gradients(inkling.transformer, logp.square().sum()), sum(tokens)

    alone, own_gradient, tokens = scored(1)
    together, gradient, fewer = scored(3)
    copies = 1 if guidance is None else 2
    assert (tokens, fewer) == (copies * 6 * 194, copies * (2 * 14 + 6 * 180))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert close(gradient, own_gradient)
    # All rows of a group read the prefix of its first row: rows that share none must not be called a group.
    assert not torch.allclose(scored(6)[0], alone, atol=1e-3)


def test_without_prefix_gradient_the_prefix_is_a_constant(inkling: Inkling, branched: Rollout) -> None:
    given = (inkling, branched.condition, branched.actions, SUFFIX)
    whole = log_probs(*given, shared=3).logp
    stopped = log_probs(*given, shared=3, prefix_gradient=False).logp
    assert torch.equal(stopped, whole)
    first = branched.condition.select([0, 3])
    state = replay(inkling, first, branched.actions[::3], 3).state
    constant = log_probs(*given, prefix=state).logp
    found, expected, all_of_it = (gradients(inkling.transformer, x.square().sum()) for x in (stopped, constant, whole))
    assert close(found, expected)
    assert not close(found, all_of_it)
    # The same whether the rows' prefix is computed once or for each.
    alone = log_probs(*given, prefix_gradient=False).logp
    torch.testing.assert_close(alone, whole, atol=1e-5, rtol=0)
    assert close(gradients(inkling.transformer, alone.square().sum()), expected)
    # Where there is no prefix there is nothing to stop.
    given = (inkling, branched.condition, branched.actions, range(2))
    both = [gradients(inkling.transformer, log_probs(*given, prefix_gradient=on).logp.sum()) for on in (True, False)]
    assert close(*both)


def test_groups_must_divide_the_rows(inkling: Inkling, branched: Rollout) -> None:
    with pytest.raises(ValueError, match="6 rows are no groups of 4 that share a prefix"):
        log_probs(inkling, branched.condition, branched.actions, SUFFIX, shared=4)


def test_what_could_not_be_meant_is_refused(inkling: Inkling, branched: Rollout) -> None:
    given = (inkling, branched.condition, branched.actions, SUFFIX)
    for shared in (0, -3):
        with pytest.raises(ValueError, match=f"6 rows are no groups of {shared}"):
            log_probs(*given, shared=shared)
    for chunk in (0, -3):
        with pytest.raises(ValueError, match=f"chunk must be 1 token or more, got {chunk}"):
            log_probs(*given, chunk=chunk)
    state = replay(inkling, branched.condition, branched.actions, SUFFIX.start).state
    with pytest.raises(ValueError, match="prefix_gradient False has no effect on a prefix that is given"):
        log_probs(*given, prefix=state, prefix_gradient=False)


@pytest.mark.parametrize("keep", [None, "some"])
@pytest.mark.parametrize("events", [False, True])
def test_entropy_of_the_asked_tokens_only(inkling: Inkling, branched: Rollout, keep: str | None, events: bool) -> None:
    """Those that are asked for and kept hold their entropy, all others 0."""
    if events:
        policy, condition = Bits(), Bits().condition(labels(6))
        actions = rollout(policy, condition, None, row_generators((0,), 6)).actions
    else:
        policy, condition, actions = inkling, branched.condition, branched.actions
    length = actions.shape[1]
    generator = torch.Generator().manual_seed(0)
    asked = torch.rand(length, generator=generator) < 0.4
    kept = None if keep is None else torch.rand(6, length, generator=generator) < 0.5
    whole = log_probs(policy, condition, actions, entropy=True).entropy
    for chunk in (None, 7):
        scores = log_probs(policy, condition, actions, keep=kept, entropy=asked, chunk=chunk)
        mask = asked.expand(6, -1) if kept is None else asked & kept
        assert 0 < mask.sum() < mask.numel()
        torch.testing.assert_close(scores.entropy, whole * mask, atol=1e-5, rtol=0)
    assert log_probs(policy, condition, actions).entropy is None
    assert log_probs(policy, condition, actions).kl is None


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_values_under_a_sampling_distribution(
    inkling: Inkling, reference: Inkling, prompts: list[Prompt], sampling: Sampling
) -> None:
    """Log-probability, entropy and KL are of the guided, truncated and tempered distribution, from its definition."""
    condition = inkling.condition(prompts[:3])
    drawn = rollout(inkling, condition, sampling, row_generators((0,), 3))
    scores = log_probs(inkling, condition, drawn.actions, guidance=sampling, entropy=True, reference=reference)
    null = {key: value.expand(3, *value.shape[1:]) for key, value in condition.null.items()}
    unconditional = type(condition)(condition.schedule, null, condition.null)
    schedule = inkling.default_schedule
    ramp = torch.tensor(
        [sampling.guidance * inkling.guidance_ramp(schedule)[s] for s in range(5) for _ in range(schedule.counts[s])]
    )[:, None]

    def logits(policy: Inkling) -> Tensor:
        with torch.no_grad():
            a, b = (policy.logits(policy.hidden(c, drawn.actions, range(5))) for c in (condition, unconditional))
        return ((1 + ramp) * a - ramp * b) / sampling.temperature

    own, other = logits(inkling), logits(reference)
    support = torch.ones_like(own, dtype=torch.bool)
    if sampling.top_k:
        support &= own >= own.topk(sampling.top_k).values[..., -1:]
    if sampling.top_p < 1:
        sorted_p, order = own.softmax(-1).sort(-1, descending=True)
        before = sorted_p.cumsum(-1) - sorted_p
        support &= torch.zeros_like(support).scatter(-1, order, before < sampling.top_p)
    support = support.scatter(-1, drawn.actions[..., None], True)
    logp, other_logp = (x.masked_fill(~support, -math.inf).log_softmax(-1) for x in (own, other))
    chosen = logp.gather(-1, drawn.actions[..., None])[..., 0]
    torch.testing.assert_close(scores.logp, chosen, atol=1e-4, rtol=1e-4)
    p = logp.exp()
    torch.testing.assert_close(scores.entropy, -(p * logp).nan_to_num(0).sum(-1), atol=1e-4, rtol=1e-4)
    kl = torch.where(support, p * (logp - other_logp), 0).sum(-1)
    torch.testing.assert_close(scores.kl, kl, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(scores.logp, log_probs(inkling, condition, drawn.actions).logp, atol=0.1)


def test_no_gradient_reaches_the_reference(inkling: Inkling, branched: Rollout, reference: Inkling) -> None:
    scores = log_probs(inkling, branched.condition, branched.actions, range(2), reference=reference)
    found = torch.autograd.grad(scores.kl.sum(), list(reference.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in found)
    # With guidance and a shared prefix the reference is read as the policy is.
    options = {"guidance": Sampling(guidance=1.0), "reference": inkling}
    same = log_probs(inkling, branched.condition, branched.actions, SUFFIX, shared=3, **options)
    assert same.kl.abs().max() < 1e-5


@pytest.mark.parametrize(("chunk", "times"), [(None, 1), (6 * 5, 1), (6 * 5 - 1, 2), (7, 2)])
def test_logits_are_made_again_only_where_there_are_several_chunks(
    inkling: Inkling, branched: Rollout, chunk: int | None, times: int
) -> None:
    """Forward and backward together see each token once, or twice if it was too much to hold."""
    with counting(inkling.transformer.head) as tokens:
        logp = log_probs(inkling, branched.condition, branched.actions, range(2), chunk=chunk).logp
        forward = list(tokens)
        logp.sum().backward(inputs=list(inkling.transformer.parameters()))
    for parameter in inkling.transformer.parameters():
        parameter.grad = None
    assert sum(forward) == 30
    assert max(forward) <= (chunk or 30)
    assert len(forward) == math.ceil(30 / (chunk or 30))
    assert sum(tokens) == 30 * times


def test_without_a_gradient_nothing_is_made_again(inkling: Inkling, branched: Rollout) -> None:
    with torch.no_grad(), counting(inkling.transformer.head) as tokens:
        logp = log_probs(inkling, branched.condition, branched.actions, range(2), chunk=7).logp
    assert sum(tokens) == 30
    assert not logp.requires_grad


def test_how_many_tokens_are_a_chunk(monkeypatch: pytest.MonkeyPatch, inkling: Inkling, branched: Rollout) -> None:
    """As many as make so many logits, of all bits of a token; and one at least."""
    for limit, expected in ((64 * 10, [10] * 3), (64 * 7, [7, 7, 7, 7, 2]), (1, [1] * 30)):
        monkeypatch.setattr(scoring, "LOGITS", limit)
        with torch.no_grad(), counting(inkling.transformer.head) as tokens:
            log_probs(inkling, branched.condition, branched.actions, range(2))
        assert tokens == expected
    policy = Bits()
    drawn = rollout(policy, policy.condition(labels(2)))
    monkeypatch.setattr(scoring, "LOGITS", 6 * 4)
    with torch.no_grad(), counting(policy.head) as tokens:
        log_probs(policy, drawn.condition, drawn.actions)
    assert tokens == [4] * (2 * SCHEDULE.tokens // 4) + [2] * (2 * SCHEDULE.tokens % 4 > 0)


def test_numbers_are_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits in half precision are scored in fp32, those in double stay so."""
    policy, plain = Bits(), Bits.logits
    drawn = rollout(policy, policy.condition(labels(2)))
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
        monkeypatch.setattr(Bits, "logits", lambda self, hidden, dtype=dtype: plain(self, hidden).to(dtype))
        scores = log_probs(policy, drawn.condition, drawn.actions, entropy=True, reference=policy)
        assert {scores.logp.dtype, scores.entropy.dtype, scores.kl.dtype} == {expected}
    monkeypatch.undo()
    double = Bits().double()
    assert log_probs(double, drawn.condition, drawn.actions).logp.dtype == torch.float64


def test_nothing_is_truncated_where_nothing_is_to_be(
    monkeypatch: pytest.MonkeyPatch, inkling: Inkling, branched: Rollout
) -> None:
    """Guidance and temperature alone leave every class, and make no mask of them."""

    def refused(*_: object) -> Tensor:
        raise AssertionError("logits were filtered")

    monkeypatch.setattr(scoring, "filter_logits", refused)
    given = (inkling, branched.condition, branched.actions, range(2))
    for sampling in (None, Sampling(), Sampling(guidance=1.0, temperature=0.5)):
        assert log_probs(*given, guidance=sampling).logp.isfinite().all()
    for sampling in (Sampling(top_k=3), Sampling(top_p=0.5)):
        with pytest.raises(AssertionError, match="logits were filtered"):
            log_probs(*given, guidance=sampling)
