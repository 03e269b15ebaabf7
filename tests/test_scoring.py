import itertools
import math

import pytest
import torch
from torch import Tensor

from bits import SCHEDULE, Bits, labels
from small import counting, make_inkling
from varl import Prompt, Sampling, log_probs, rollout
from varl.models.inkling import Inkling
from varl.policy import Condition
from varl.rollout import Rollout, row_generators

STEPS = 5


@pytest.fixture
def drawn(inkling: Inkling, prompts: list[Prompt]) -> Rollout:
    return rollout(inkling, inkling.condition(prompts[:4]), None, row_generators((0,), 4))


@pytest.fixture(scope="module")
def reference() -> Inkling:
    return make_inkling(seed=1)


@pytest.mark.parametrize("steps", [range(1), range(3), range(1, 3), range(3, 5), range(5)])
def test_a_prefix_costs_a_prefix(inkling: Inkling, drawn: Rollout, steps: range) -> None:
    with counting(inkling.transformer.blocks[0]) as body, counting(inkling.transformer.head) as head:
        scores = log_probs(inkling, drawn.condition, drawn.actions, steps)
    schedule = inkling.default_schedule
    span = schedule.span(steps)
    assert sum(body) == 4 * schedule.offsets[steps.stop]
    assert sum(head) == 4 * (span.stop - span.start)
    whole = log_probs(inkling, drawn.condition, drawn.actions).logp
    torch.testing.assert_close(scores.logp, whole[:, span], atol=1e-5, rtol=0)


def test_a_prefix_needs_the_actions_of_a_prefix_only(inkling: Inkling, drawn: Rollout) -> None:
    tokens = inkling.default_schedule.prefix_tokens(3)
    short = log_probs(inkling, drawn.condition, drawn.actions[:, :tokens], range(3)).logp
    assert torch.equal(short, log_probs(inkling, drawn.condition, drawn.actions, range(3)).logp)
    with pytest.raises(ValueError, match="need 50 tokens, the actions have 49"):
        log_probs(inkling, drawn.condition, drawn.actions[:, :49], range(4))


def test_against_plain_loops(inkling: Inkling, drawn: Rollout, reference: Inkling) -> None:
    steps = range(1, 4)
    span = inkling.default_schedule.span(steps)
    scores = log_probs(inkling, drawn.condition, drawn.actions, steps, entropy=True, reference=reference)
    with torch.no_grad():
        p, q = (
            model.logits(model.hidden(drawn.condition, drawn.actions, steps)).double().softmax(-1)
            for model in (inkling, reference)
        )
    for row, token in itertools.product(range(4), (0, 3, 12, 48)):
        probability = p[row, token].tolist()
        chosen = drawn.actions[row, span.start + token]
        assert scores.logp[row, token].item() == pytest.approx(math.log(probability[chosen]), abs=1e-5)
        entropy = -sum(x * math.log(x) for x in probability)
        assert scores.entropy[row, token].item() == pytest.approx(entropy, abs=1e-5)
        kl = sum(x * math.log(x / y) for x, y in zip(probability, q[row, token].tolist(), strict=True))
        assert scores.kl[row, token].item() == pytest.approx(kl, abs=1e-4)
    assert scores.kl.min() > 0.01
    assert scores.logp.requires_grad
    assert scores.kl.requires_grad
    assert not scores.entropy.requires_grad


def test_no_kl_to_itself(inkling: Inkling, drawn: Rollout) -> None:
    scores = log_probs(inkling, drawn.condition, drawn.actions, reference=inkling)
    assert scores.kl.abs().max() < 1e-6


@pytest.mark.parametrize("shape", ["L", "BL", "none"])
@pytest.mark.parametrize("sampling", [None, Sampling(guidance=1.5, top_p=0.9)])
def test_kept_tokens_only(
    inkling: Inkling, drawn: Rollout, reference: Inkling, shape: str, sampling: Sampling | None
) -> None:
    steps = range(1, 4)
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(49 if shape == "L" else (4, 49), generator=generator) < (0 if shape == "none" else 0.3)
    options = {"guidance": sampling, "entropy": True, "reference": reference if sampling is None else None}
    everything = log_probs(inkling, drawn.condition, drawn.actions, steps, **options)
    with counting(inkling.transformer.head) as head:
        some = log_probs(inkling, drawn.condition, drawn.actions, steps, keep, **options)
    mask = keep.expand(4, 49)
    assert sum(head) == mask.sum() * (1 if sampling is None else 2)
    for name in ("logp", "entropy") if sampling else ("logp", "entropy", "kl"):
        values, expected = getattr(some, name), getattr(everything, name)
        torch.testing.assert_close(values[mask], expected[mask], atol=1e-5, rtol=0)
        assert not values[~mask].any()


def gradients(policy: Inkling, value: Tensor) -> list[Tensor]:
    parameters = list(policy.trainable.parameters())
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@pytest.mark.parametrize("sampling", [None, Sampling(guidance=1.5, top_k=30)])
@pytest.mark.parametrize("kept", [False, True])
def test_chunks_change_nothing(
    inkling: Inkling, drawn: Rollout, reference: Inkling, sampling: Sampling | None, kept: bool
) -> None:
    keep = torch.rand(4, 50, generator=torch.Generator().manual_seed(1)) < 0.5 if kept else None
    weight = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    found = []
    for chunk in (8192, 7):
        options = {"guidance": sampling, "entropy": True, "reference": reference, "chunk": chunk}
        scores = log_probs(inkling, drawn.condition, drawn.actions, range(4), keep, **options)
        loss = (weight * scores.logp).sum() + (weight * scores.kl).sum()
        found.append((scores, gradients(inkling, loss)))
    (whole, whole_gradients), (chunked, chunked_gradients) = found
    for name in ("logp", "entropy", "kl"):
        torch.testing.assert_close(getattr(whole, name), getattr(chunked, name), atol=1e-5, rtol=1e-5)
    for a, b in zip(whole_gradients, chunked_gradients, strict=True):
        assert a.isfinite().all()
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("m", range(1, STEPS))
@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_prefix_state_stands_for_recomputation(
    inkling: Inkling, prompts: list[Prompt], m: int, guidance: float, recorded: bool
) -> None:
    sampling = Sampling(guidance=guidance)
    condition = inkling.condition(prompts[:2])
    head = rollout(inkling, condition, sampling, row_generators((1,), 2), until=m, keep_state=True)
    drawn = rollout(inkling, condition, sampling, row_generators((2,), 6), start=head, fork=3)
    steps = range(m, STEPS)
    with torch.set_grad_enabled(recorded):
        with counting(inkling.transformer.blocks[0]) as tokens:
            shared = log_probs(inkling, drawn.condition, drawn.actions, steps, prefix=head.state).logp
        again = log_probs(inkling, drawn.condition, drawn.actions, steps, prefix=head.state).logp
        expected = log_probs(inkling, drawn.condition, drawn.actions, steps).logp
    assert sum(tokens) == 6 * shared.shape[1]
    torch.testing.assert_close(shared, expected, atol=1e-5, rtol=0)
    assert torch.equal(shared, again)
    assert shared.requires_grad == recorded


def test_a_prefix_state_must_fit(inkling: Inkling, prompts: list[Prompt], drawn: Rollout) -> None:
    head = rollout(inkling, inkling.condition(prompts[:3]), until=2, keep_state=True)
    with pytest.raises(ValueError, match="prefix is at step 2"):
        log_probs(inkling, drawn.condition, drawn.actions, range(3, 5), prefix=head.state)
    with pytest.raises(ValueError, match="4 rows of actions cannot go on from the 3"):
        log_probs(inkling, drawn.condition, drawn.actions, range(2, 5), prefix=head.state)


def test_scores_are_causal(inkling: Inkling, drawn: Rollout) -> None:
    """Other actions at a step change the features of later steps only, and no bit of those up to it."""
    schedule = inkling.default_schedule
    with torch.no_grad():
        before = inkling.hidden(drawn.condition, drawn.actions, range(STEPS))
        before_logp = log_probs(inkling, drawn.condition, drawn.actions).logp
        for step in range(STEPS):
            own, end = schedule.tokens_of(step), schedule.offsets[step + 1]
            changed = drawn.actions.clone()
            changed[:, own] = (changed[:, own] + 7) % inkling.classes
            after = inkling.hidden(drawn.condition, changed, range(STEPS))
            assert torch.equal(after[:, :end], before[:, :end])
            assert step == STEPS - 1 or bool((after[:, end:] != before[:, end:]).any(2).all())
            logp = log_probs(inkling, drawn.condition, changed).logp
            assert torch.equal(logp[:, : own.start], before_logp[:, : own.start])
            assert (logp[:, own] != before_logp[:, own]).float().mean() > 0.9


def test_every_row_has_its_own_prompt(inkling: Inkling, drawn: Rollout) -> None:
    with torch.no_grad():
        logp = log_probs(inkling, drawn.condition, drawn.actions).logp
        order = [2, 0, 3, 1]
        moved = log_probs(inkling, drawn.condition.select(order), drawn.actions[order]).logp
        other = log_probs(inkling, drawn.condition.select(order), drawn.actions).logp
    torch.testing.assert_close(moved, logp[order], atol=1e-5, rtol=0)
    assert (other - logp).abs().max() > 0.1


def test_guidance_formula(inkling: Inkling, drawn: Rollout) -> None:
    """(1 + t) conditional - t unconditional, t = guidance * step / 4; then the temperature."""
    sampling = Sampling(guidance=2.0, temperature=0.5)
    logp = log_probs(inkling, drawn.condition, drawn.actions, guidance=sampling).logp
    null = Condition(
        inkling.default_schedule, {"cells": drawn.condition.null["cells"].expand(4, -1, -1)}, drawn.condition.null
    )
    schedule = inkling.default_schedule
    with torch.no_grad():
        conditional, unconditional = (
            inkling.logits(inkling.hidden(c, drawn.actions, range(STEPS))) for c in (drawn.condition, null)
        )
        for step in range(STEPS):
            span, t = schedule.tokens_of(step), 2.0 * step / 4
            logits = ((1 + t) * conditional[:, span] - t * unconditional[:, span]) / 0.5
            expected = logits.log_softmax(-1).gather(-1, drawn.actions[:, span, None]).squeeze(-1)
            torch.testing.assert_close(logp[:, span], expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("sampling", [Sampling(top_k=4), Sampling(top_p=0.7), Sampling(guidance=1, top_k=2, top_p=0.9)])
def test_drawn_actions_stay_in_the_support_of_another_policy(
    inkling: Inkling, prompts: list[Prompt], reference: Inkling, sampling: Sampling
) -> None:
    """Ratios and KL to a policy that would not have drawn these actions under truncation are finite."""
    condition = inkling.condition(prompts[:3])
    drawn = rollout(inkling, condition, sampling, row_generators((0,), 3))
    scores = log_probs(inkling, condition, drawn.actions, guidance=sampling, reference=reference)
    assert log_probs(reference, condition, drawn.actions, guidance=sampling).logp.isfinite().all()
    assert scores.logp.isfinite().all()
    assert scores.kl.isfinite().all()
    assert scores.kl.min() >= -1e-6
    for gradient in gradients(inkling, scores.kl.sum() + scores.logp.sum()):
        assert gradient.isfinite().all()


def test_bits_per_event_and_summed() -> None:
    policy, other = Bits(0), Bits(1)
    condition = policy.condition(labels(5))
    drawn = rollout(policy, condition, None, row_generators((0,), 5))
    keep = torch.rand(5, SCHEDULE.tokens, generator=torch.Generator().manual_seed(0)) < 0.5
    logits, other_logits = (m.logits(m.hidden(condition, drawn.actions, range(3))) for m in (policy, other))
    options = {"entropy": True, "reference": other}
    by_bit = log_probs(policy, condition, drawn.actions, per_event=True, **options)
    by_token = log_probs(policy, condition, drawn.actions, **options)
    some = log_probs(policy, condition, drawn.actions, keep=keep, per_event=True, chunk=4, **options)
    assert by_bit.logp.shape == (5, SCHEDULE.tokens, 3)
    for row, token in itertools.product(range(5), range(SCHEDULE.tokens)):
        total = entropy = kl = 0.0
        for bit in range(3):
            p, q = (x[row, token, bit].double().softmax(0).tolist() for x in (logits, other_logits))
            logp = math.log(p[drawn.actions[row, token, bit]])
            assert by_bit.logp[row, token, bit].item() == pytest.approx(logp, abs=1e-5)
            total += logp
            entropy -= sum(x * math.log(x) for x in p)
            kl += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
        assert by_token.logp[row, token].item() == pytest.approx(total, abs=1e-5)
        assert by_token.entropy[row, token].item() == pytest.approx(entropy, abs=1e-5)
        assert by_bit.kl[row, token].item() == pytest.approx(kl, abs=1e-5)
        kept = bool(keep[row, token])
        torch.testing.assert_close(some.logp[row, token], by_bit.logp[row, token] * kept, atol=1e-6, rtol=0)
        assert some.entropy[row, token].item() == pytest.approx(entropy * kept, abs=1e-5)
        assert some.kl[row, token].item() == pytest.approx(kl * kept, abs=1e-5)


def test_bits_nothing_kept() -> None:
    policy = Bits()
    drawn = rollout(policy, policy.condition(labels(2)))
    keep = torch.zeros(SCHEDULE.tokens, dtype=torch.bool)
    for per_event in (False, True):
        options = {"entropy": True, "reference": policy, "per_event": per_event}
        scores = log_probs(policy, drawn.condition, drawn.actions, keep=keep, **options)
        assert not scores.logp.any()
        assert not scores.entropy.any()
        assert not scores.kl.any()


def test_bits_prefix_state() -> None:
    policy = Bits()
    condition = policy.condition(labels(2))
    head = rollout(policy, condition, until=1, keep_state=True)
    drawn = rollout(policy, condition, start=head, fork=3)
    shared = log_probs(policy, drawn.condition, drawn.actions, range(1, 3), prefix=head.state).logp
    torch.testing.assert_close(shared, log_probs(policy, drawn.condition, drawn.actions, range(1, 3)).logp)


def test_bits_gradients_by_finite_differences() -> None:
    policy, other = Bits().double(), Bits(1).double()
    drawn = rollout(policy, policy.condition(labels(3)), None, row_generators((0,), 3))
    weight = torch.randn(3, SCHEDULE.tokens, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value() -> Tensor:
        scores = log_probs(policy, drawn.condition, drawn.actions, guidance=Sampling(guidance=0.7), reference=other)
        return (weight * (scores.logp + 0.3 * scores.kl)).sum()

    for parameter in policy.parameters():
        (gradient,) = torch.autograd.grad(value(), [parameter])
        flat, index = parameter.data.view(-1), int(gradient.abs().argmax())
        with torch.no_grad():
            kept = flat[index].item()
            flat[index] = kept + 1e-6
            above = value()
            flat[index] = kept - 1e-6
            below = value()
            flat[index] = kept
        difference = float(above - below) / 2e-6
        assert gradient.view(-1)[index].item() == pytest.approx(difference, rel=1e-6)
        assert abs(difference) > 1e-3
