import dataclasses
import math

import pytest
import torch

from varl.algorithm import (
    LossInput,
    entropy,
    exact_kl,
    kl_k1,
    kl_k2,
    kl_k3,
    policy_loss,
    token_weights,
)

COUNTS = [1, 4, 6]
STEPS = [t for t, n in enumerate(COUNTS) for _ in range(n)]
B, L = 8, 11


def make(seed=0, drift=0.3, events=0, **changes):
    """A batch whose ratios lie on both sides of the clip range, in float64."""
    g = torch.Generator().manual_seed(seed)
    shape = (B, L, events) if events else (B, L)

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    logp = -2 + normal(*shape)
    made = LossInput(
        logp_BL=logp,
        old_logp_BL=logp + drift * normal(*shape),
        advantage_B=normal(B),
        weight_BL=token_weights(COUNTS, 0.6, dtype=torch.float64),
        step_of_token_L=STEPS,
        mask_BL=(torch.rand(B, L, generator=g) < 0.6).double(),
        reference_logp_BL=logp + 0.5 * normal(*shape),
        exact_kl_BL=normal(*shape).abs(),
    )
    return dataclasses.replace(made, **changes)


def gradient(inputs, **options):
    leaf = inputs.logp_BL.clone().requires_grad_()
    out = policy_loss(dataclasses.replace(inputs, logp_BL=leaf), **options)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    return out, grad


def rows(inputs, index):
    """The given rows of every per-sample field."""
    picked = {}
    for field in dataclasses.fields(inputs):
        value = getattr(inputs, field.name)
        if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == B:
            picked[field.name] = value[index]
    return dataclasses.replace(inputs, **picked)


def loop(inputs, clip=0.2, beta=0.01, kl="k3", mask_kl=False, ratio="token", divisor=None):
    """The loss of method.md, sections 4 and 5, number by number."""
    total = 0.0
    batch = inputs.logp_BL.shape[0]
    for b in range(batch):
        advantage = inputs.advantage_B[b].item()
        if inputs.valid_B is not None and not inputs.valid_B[b]:
            continue
        mask = [1.0] * L if inputs.mask_BL is None else inputs.mask_BL[b].tolist()
        drift = (inputs.logp_BL[b] - inputs.old_logp_BL[b]).tolist()
        for i in range(L):
            rho = math.exp(drift[i])
            if ratio == "step":
                mates = [j for j in range(L) if STEPS[j] == STEPS[i]]
                held = sum(mask[j] for j in mates)
                rho = math.exp(sum(mask[j] * drift[j] for j in mates) / held) if held else 1.0
            pg = -min(rho * advantage, min(max(rho, 1 - clip), 1 + clip) * advantage)
            d = (inputs.reference_logp_BL[b, i] - inputs.logp_BL[b, i]).item()
            term = {"k3": math.exp(d) - d - 1, "k2": d * d / 2, "exact": inputs.exact_kl_BL[b, i].item()}[kl]
            weight = inputs.weight_BL[i] if inputs.weight_BL.ndim == 1 else inputs.weight_BL[b, i]
            kept = mask[i] if mask_kl else 1.0
            total += weight.item() * (mask[i] * pg + beta * kept * term)
    return total / (batch if divisor is None else divisor)


@pytest.mark.parametrize("ratio", ["token", "step"])
@pytest.mark.parametrize("kl", ["k3", "k2", "exact"])
@pytest.mark.parametrize("mask_kl", [False, True])
def test_the_loss_equals_a_plain_loop(ratio, kl, mask_kl):
    weights = torch.rand(B, L, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    valid = torch.tensor([True, True, False, True, True, True, False, True])
    options = {"ratio": ratio, "kl": kl, "mask_kl": mask_kl, "beta": 0.3, "clip": 0.15}
    for changes in ({}, {"mask_BL": None}, {"weight_BL": weights}, {"valid_B": valid}):
        inputs = make(**changes)
        assert policy_loss(inputs, **options).loss.item() == pytest.approx(loop(inputs, **options), rel=1e-9)
    assert policy_loss(inputs, divisor=3.0, **options).loss.item() == pytest.approx(
        loop(inputs, divisor=3.0, **options), rel=1e-9
    )


@pytest.mark.parametrize("ratio", ["token", "step"])
@pytest.mark.parametrize("kl", ["k3", "k2"])
def test_the_gradient_equals_finite_differences(ratio, kl):
    soft = torch.rand(B, L, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    for mask in (None, make().mask_BL, soft):
        inputs = make(mask_BL=mask)
        options = {"ratio": ratio, "kl": kl, "beta": 0.3}
        _, grad = gradient(inputs, **options)
        assert grad.abs().max() > 1e-3
        for b, i in [(0, 0), (1, 3), (2, 7), (3, 10), (5, 2), (7, 5)]:
            bump = torch.zeros(B, L, dtype=torch.float64)
            bump[b, i] = 1e-6
            ends = [
                policy_loss(dataclasses.replace(inputs, logp_BL=inputs.logp_BL + s * bump), **options).loss
                for s in (1, -1)
            ]
            assert ((ends[0] - ends[1]) / 2e-6).item() == pytest.approx(grad[b, i].item(), abs=1e-7)


@pytest.mark.parametrize("ratio", ["token", "step"])
def test_on_policy_the_ratio_is_one_and_the_gradient_is_that_of_the_advantage(ratio):
    inputs = make()
    inputs = dataclasses.replace(inputs, old_logp_BL=inputs.logp_BL)
    out, grad = gradient(inputs, ratio=ratio, beta=0.0)
    assert out.ratio_min == out.ratio_max == out.ratio_mean == 1
    assert out.clip_fraction == 0
    weighted = inputs.weight_BL * inputs.mask_BL * inputs.advantage_B[:, None] / B
    assert out.loss.item() == pytest.approx(-weighted.sum().item())
    torch.testing.assert_close(grad, -weighted)
    assert (out.log_ratio_mean_T == 0).all()
    assert (out.log_ratio_max_T == 0).all()


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "flows"),
    [
        # drift, A: -min(rho A, clip(rho) A); the gradient flows unless the clipped branch is the smaller one.
        (1.5, 1.0, -1.2, False),
        (1.5, -1.0, 1.5, True),
        (0.5, 1.0, -0.5, True),
        (0.5, -1.0, 0.8, False),
        (1.1, 1.0, -1.1, True),
        (1.1, -1.0, 1.1, True),
        (1.5, 0.0, 0.0, False),
    ],
)
@pytest.mark.parametrize("kind", ["token", "step"])
def test_clipping_for_both_signs_of_the_advantage(ratio, advantage, value, flows, kind):
    logp = torch.full((1, 2), -1.0, dtype=torch.float64, requires_grad=True)
    inputs = LossInput(
        logp_BL=logp,
        old_logp_BL=logp.detach() - math.log(ratio),
        advantage_B=torch.tensor([advantage]).double(),
        weight_BL=torch.tensor([0.5, 0.5]).double(),
        step_of_token_L=[0, 0],
    )
    out = policy_loss(inputs, beta=0.0, ratio=kind)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(value)
    assert logp.grad.tolist()[0] == pytest.approx([-0.5 * advantage * ratio if flows else 0.0] * 2)
    assert out.clip_fraction.item() == (0.0 if flows or advantage == 0 else 1.0)
    assert out.ratio_mean.item() == pytest.approx(ratio)


def test_clip_takes_two_sides_and_infinity():
    inputs = make(drift=1.0)
    both = policy_loss(inputs, clip=0.2).loss
    assert torch.equal(both, policy_loss(inputs, clip=(0.2, 0.2)).loss)
    for rho, advantage, expected in [(1.3, 1.0, -1.3), (1.5, 1.0, -1.4), (0.7, -1.0, 0.8), (0.3, -1.0, 0.8)]:
        one = LossInput(
            logp_BL=torch.tensor([[rho]]).log(),
            old_logp_BL=torch.zeros(1, 1),
            advantage_B=torch.tensor([advantage]),
            weight_BL=torch.ones(1),
            step_of_token_L=[0],
        )
        assert policy_loss(one, clip=(0.2, 0.4), beta=0.0).loss.item() == pytest.approx(expected)
    free = policy_loss(inputs, clip=math.inf, beta=0.0)
    rho = (inputs.logp_BL - inputs.old_logp_BL).exp()
    expected = -(inputs.weight_BL * inputs.mask_BL * rho * inputs.advantage_B[:, None]).sum() / B
    torch.testing.assert_close(free.loss, expected)
    assert free.clip_fraction == 0


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("ratio", ["token", "step"])
def test_micro_batches_equal_one_batch(size, ratio):
    valid = torch.tensor([True, False, True, True, True, True, True, True])
    inputs = make(valid_B=valid)
    whole, grad = gradient(inputs, ratio=ratio)
    parts = [gradient(rows(inputs, slice(i, i + size)), ratio=ratio, divisor=B) for i in range(0, B, size)]
    torch.testing.assert_close(sum(out.loss for out, _ in parts), whole.loss)
    torch.testing.assert_close(torch.cat([g for _, g in parts]), grad)
    for name in ("policy_term_T", "kl_term_T"):
        torch.testing.assert_close(sum(getattr(out, name) for out, _ in parts), getattr(whole, name))


@pytest.mark.parametrize("ratio", ["token", "step"])
def test_a_full_mask_is_no_mask_and_permuting_samples_changes_nothing(ratio):
    inputs = make(mask_BL=None)
    plain = policy_loss(inputs, ratio=ratio)
    full = policy_loss(dataclasses.replace(inputs, mask_BL=torch.ones(B, L)), ratio=ratio, mask_kl=True)
    assert torch.equal(plain.loss, full.loss)
    turned = policy_loss(rows(make(), torch.arange(B - 1, -1, -1)), ratio=ratio)
    torch.testing.assert_close(turned.loss, policy_loss(make(), ratio=ratio).loss)


@pytest.mark.parametrize("ratio", ["token", "step"])
def test_unmasked_tokens_carry_no_policy_gradient_even_if_they_are_not_finite(ratio):
    inputs = make()
    _, clean = gradient(inputs, ratio=ratio, beta=0.5, mask_kl=True)
    assert (clean[inputs.mask_BL == 0] == 0).all()
    assert (clean[inputs.mask_BL > 0] != 0).any()
    broken = inputs.logp_BL.clone()
    broken[inputs.mask_BL == 0] = float("nan")
    out, grad = gradient(dataclasses.replace(inputs, logp_BL=broken), ratio=ratio, beta=0.5, mask_kl=True)
    assert out.loss.isfinite()
    torch.testing.assert_close(grad, clean)
    _, kl_only = gradient(inputs, ratio=ratio, beta=0.5)
    assert (kl_only[inputs.mask_BL == 0] != 0).all()


def test_an_invalid_sample_carries_nothing_and_a_zero_advantage_carries_kl():
    valid = torch.ones(B, dtype=torch.bool)
    valid[2] = False
    inputs = make(mask_BL=None, valid_B=valid)
    advantage = inputs.advantage_B.clone()
    advantage[3] = 0.0
    inputs = dataclasses.replace(inputs, advantage_B=advantage)
    out, grad = gradient(inputs, beta=0.5)
    assert (grad[2] == 0).all()
    d = (inputs.reference_logp_BL - inputs.logp_BL)[3]
    torch.testing.assert_close(grad[3], 0.5 * inputs.weight_BL * (1 - d.exp()) / B)
    for name in ("logp_BL", "old_logp_BL", "reference_logp_BL", "advantage_B"):
        broken = getattr(inputs, name).clone()
        broken[2] = float("nan")
        same, same_grad = gradient(dataclasses.replace(inputs, **{name: broken}), beta=0.5)
        torch.testing.assert_close(same.loss, out.loss)
        torch.testing.assert_close(same_grad, grad)
        for field in ("kl_mean_T", "log_ratio_mean_T", "log_ratio_max_T", "ratio_mean"):
            torch.testing.assert_close(getattr(same, field), getattr(out, field))


def test_events_are_summed_and_on_policy_equal_the_token_level():
    inputs = make(events=3)
    per_event, _ = gradient(inputs, beta=0.3)
    total = 0.0
    for e in range(3):
        one = dataclasses.replace(
            inputs,
            logp_BL=inputs.logp_BL[..., e],
            old_logp_BL=inputs.old_logp_BL[..., e],
            reference_logp_BL=inputs.reference_logp_BL[..., e],
            exact_kl_BL=None,
        )
        total += policy_loss(one, beta=0.3).loss
    torch.testing.assert_close(per_event.loss, total)
    inputs = dataclasses.replace(inputs, old_logp_BL=inputs.logp_BL)
    _, grad = gradient(inputs, beta=0.0)
    summed = dataclasses.replace(
        inputs, logp_BL=inputs.logp_BL.sum(-1), old_logp_BL=inputs.logp_BL.sum(-1), reference_logp_BL=None
    )
    summed = dataclasses.replace(summed, exact_kl_BL=None)
    _, token_grad = gradient(summed, beta=0.0)
    torch.testing.assert_close(grad, token_grad[..., None].expand(-1, -1, 3))


def test_exact_kl_may_come_per_event_with_token_log_probabilities():
    kl = torch.rand(B, L, 4, dtype=torch.float64)
    a = policy_loss(make(exact_kl_BL=kl), kl="exact").loss
    torch.testing.assert_close(a, policy_loss(make(exact_kl_BL=kl.sum(-1)), kl="exact").loss)


def test_kl_weights_of_their_own_and_beta_zero():
    inputs = make()
    grid = torch.rand(L, dtype=torch.float64)
    out = policy_loss(dataclasses.replace(inputs, kl_weight_BL=grid), beta=0.5)
    kl = kl_k3(inputs.logp_BL, inputs.reference_logp_BL)
    torch.testing.assert_close(out.kl_term_T.sum(), 0.5 * (grid * kl).sum() / B)
    torch.testing.assert_close(out.policy_term_T, policy_loss(inputs).policy_term_T)
    none = policy_loss(make(reference_logp_BL=None), beta=0.0)
    assert none.kl_mean_T is None
    assert (none.kl_term_T == 0).all()
    reported = policy_loss(inputs, beta=0.0)
    assert torch.equal(reported.loss, none.loss)
    torch.testing.assert_close(reported.kl_mean_T[2], kl[:, 5:].mean())


def test_per_step_terms_sum_to_the_loss_and_statistics_are_plain_means():
    inputs = make(step_of_token_L=torch.tensor(STEPS) + 7)
    out = policy_loss(inputs, beta=0.4)
    assert out.steps == range(7, 10)
    torch.testing.assert_close((out.policy_term_T + out.kl_term_T).sum(), out.loss.detach())
    drift = inputs.logp_BL - inputs.old_logp_BL
    for t, part in enumerate(drift.split(COUNTS, 1)):
        torch.testing.assert_close(out.log_ratio_mean_T[t], part.mean())
        torch.testing.assert_close(out.log_ratio_max_T[t], part.abs().max())
    rho = drift.exp()[inputs.mask_BL > 0]
    torch.testing.assert_close(out.ratio_mean, rho.mean())
    assert out.ratio_min == rho.min()
    assert out.ratio_max == rho.max()
    up = inputs.advantage_B[:, None] > 0
    clipped = torch.where(up, drift.exp() > 1.2, drift.exp() < 0.8)[inputs.mask_BL > 0]
    torch.testing.assert_close(out.clip_fraction, clipped.double().mean(), check_dtype=False)
    nothing = policy_loss(make(mask_BL=torch.zeros(B, L)))
    assert nothing.ratio_mean == nothing.ratio_min == nothing.ratio_max == 1
    assert nothing.clip_fraction == 0


def expected_gradient(term):
    """E_x~pi [grad term(logp_x, ref_x)] over a categorical, by enumeration, and the gradients of both KLs."""
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(5, generator=g, dtype=torch.float64).requires_grad_()
    reference = torch.randn(5, generator=g, dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    sampled = (logp.exp().detach() * term(logp, reference)).sum()
    reverse = (logp.exp() * (logp - reference)).sum()
    forward = (reference.exp() * (reference - logp)).sum()
    return [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (sampled, reverse, forward)]


def test_expected_gradients_of_the_kl_estimators():
    sampled, reverse, forward = expected_gradient(kl_k2)
    torch.testing.assert_close(sampled, reverse)
    assert not torch.allclose(sampled, forward, atol=1e-3)
    sampled, reverse, forward = expected_gradient(kl_k3)
    torch.testing.assert_close(sampled, forward)
    assert not torch.allclose(sampled, reverse, atol=1e-3)
    sampled, reverse, _ = expected_gradient(kl_k1)
    torch.testing.assert_close(sampled, torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
    assert reverse.abs().max() > 0.01


def test_k1_and_k3_are_unbiased_in_value_and_k2_is_not():
    g = torch.Generator().manual_seed(4)
    logits, reference = torch.randn(2, 5, generator=g, dtype=torch.float64)
    logp, ref = logits.log_softmax(0), reference.log_softmax(0)
    exact = exact_kl(logits, reference)
    for estimate in (kl_k1, kl_k3):
        torch.testing.assert_close((logp.exp() * estimate(logp, ref)).sum(), exact)
    assert ((logp.exp() * kl_k2(logp, ref)).sum() - exact).abs() > 1e-3


def test_exact_kl_and_entropy():
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, -math.inf, -math.inf]], requires_grad=True)
    torch.testing.assert_close(entropy(logits), torch.tensor([math.log(4), math.log(2)]))
    kl = exact_kl(logits[1], logits[0].detach())
    torch.testing.assert_close(kl, torch.tensor(math.log(2)))
    (kl + entropy(logits).sum()).backward()
    assert logits.grad.isfinite().all()
    assert exact_kl(logits[0], logits[1]).item() == math.inf
    assert exact_kl(torch.randn(2, 3, 7), torch.randn(2, 3, 7)).shape == (2, 3)
    assert (exact_kl(logits, logits) == 0).all()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"clip": -0.1}, "clip and beta"),
        ({}, {"beta": -1.0}, "clip and beta"),
        ({}, {"kl": "k1"}, "kl must be one of k3, k2, exact"),
        ({}, {"ratio": "product"}, "ratio"),
        ({}, {"divisor": 0.0}, "divisor"),
        ({"reference_logp_BL": None}, {}, "needs reference_logp_BL"),
        ({"exact_kl_BL": None}, {"kl": "exact"}, "needs exact_kl_BL"),
        ({"advantage_B": torch.zeros(3)}, {}, "advantage_B must have shape"),
        ({"mask_BL": torch.ones(L)}, {}, "mask_BL must have shape"),
        ({"weight_BL": torch.ones(B)}, {}, "weight_BL must have shape"),
        ({"old_logp_BL": torch.ones(B, L, 1)}, {}, "old_logp_BL must have shape"),
        ({"valid_B": torch.ones(B)}, {}, "valid_B must be bool"),
        ({"step_of_token_L": STEPS[:-1]}, {}, "step_of_token_L"),
        ({"step_of_token_L": STEPS[::-1]}, {}, "ascend"),
        ({"events": 2}, {"ratio": "step"}, "summed to the token"),
    ],
)
def test_bad_arguments_are_refused_by_name(changes, options, message):
    with pytest.raises(ValueError, match=message):
        policy_loss(make(**changes), **options)
