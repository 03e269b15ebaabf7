"""The loss: what gradients reach and what they do not, its figures number by number, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from varl.algorithm import LossInput, entropy, exact_kl, policy_loss

STEPS = [3, 3, 4, 4, 4]
DOUBLE = {"dtype": torch.float64}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **DOUBLE)  # type: ignore[call-overload]


def make(*events: int, **changes: Any) -> LossInput:
    """Three samples of five tokens, of steps 3 and 4."""
    logp = -1 + 0.3 * normal(3, 5, *events)
    made = LossInput(
        logp_BL=logp,
        old_logp_BL=logp + 0.4 * normal(3, 5, *events, seed=4),
        advantage_B=torch.tensor([1.0, -2.0, 0.5], **DOUBLE),
        weight_BL=torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], **DOUBLE),
        step_of_token_L=STEPS,
        mask_BL=torch.tensor([[1, 0, 1, 1, 0], [0.5, 1, 0, 0, 0], [1, 1, 1, 1, 1]], **DOUBLE),
        reference_logp_BL=logp + 0.5 * normal(3, 5, *events, seed=2),
        exact_kl_BL=normal(3, 5, *events, seed=3).abs(),
        valid_B=torch.tensor([True, True, False]),
        kl_weight_BL=torch.tensor([0.5, 0.1, 0.2, 0.3, 0.7], **DOUBLE),
    )
    return replace(made, **changes)


@pytest.mark.parametrize("kl", ["k2", "k3"])
@pytest.mark.parametrize("mask_kl", [False, True])
def test_only_the_policys_log_probabilities_are_differentiated(kl: str, mask_kl: bool) -> None:
    names = ("old_logp_BL", "reference_logp_BL", "advantage_B", "weight_BL", "kl_weight_BL", "mask_BL")
    inputs = make()
    leaves = {name: getattr(inputs, name).clone().requires_grad_() for name in names}
    leaf = inputs.logp_BL.clone().requires_grad_()
    loss = policy_loss(replace(inputs, logp_BL=leaf, **leaves), kl=kl, mask_kl=mask_kl, beta=0.5).loss
    found = torch.autograd.grad(loss, [leaf, *(leaves[name] for name in names)], allow_unused=True)
    assert found[0] is not None
    constants = dict(zip(names, found[1:], strict=True))
    for name in ("old_logp_BL", "reference_logp_BL", "mask_BL"):
        assert constants[name] is None or not constants[name].any(), name


def test_the_exact_kl_is_differentiated() -> None:
    inputs = make()
    leaf = inputs.exact_kl_BL.clone().requires_grad_()
    loss = policy_loss(replace(inputs, exact_kl_BL=leaf), kl="exact", beta=0.5).loss
    (found,) = torch.autograd.grad(loss, leaf)
    expected = 0.5 / 3 * inputs.kl_weight_BL * inputs.valid_B[:, None]
    torch.testing.assert_close(found, expected)


def test_figures_number_by_number() -> None:
    """Everything that is reported, from its definition, in plain loops."""
    inputs, low, high = make(), 0.1, 0.3
    out = policy_loss(inputs, clip=(low, high), beta=0.7, kl="k2")
    assert out.steps == range(3, 5)
    policy, kl, kls, drift, largest = ([0.0, 0.0] for _ in range(5))
    ratios, clipped = [], 0
    for b, i in ((b, i) for b in range(2) for i in range(5)):
        t = STEPS[i] - 3
        log_ratio = (inputs.logp_BL - inputs.old_logp_BL)[b, i].item()
        rho, a, m = math.exp(log_ratio), inputs.advantage_B[b].item(), inputs.mask_BL[b, i].item()
        bounded = min(max(rho, 1 - low), 1 + high)
        policy[t] -= inputs.weight_BL[i].item() * m * min(rho * a, bounded * a) / 3
        d = (inputs.reference_logp_BL - inputs.logp_BL)[b, i].item()
        kl[t] += inputs.kl_weight_BL[i].item() * 0.7 * d * d / 2 / 3
        kls[t] += d * d / 2 / (2 * STEPS.count(STEPS[i]))
        drift[t] += log_ratio / (2 * STEPS.count(STEPS[i]))
        largest[t] = max(largest[t], abs(log_ratio))
        if m > 0:
            ratios.append(rho)
            clipped += bounded * a < rho * a
    assert out.policy_term_T.tolist() == pytest.approx(policy)
    assert out.kl_term_T.tolist() == pytest.approx(kl)
    assert out.kl_mean_T is not None
    assert out.kl_mean_T.tolist() == pytest.approx(kls)
    assert out.log_ratio_mean_T.tolist() == pytest.approx(drift)
    assert out.log_ratio_max_T.tolist() == pytest.approx(largest)
    assert out.loss.item() == pytest.approx(sum(policy) + sum(kl))
    found = [out.ratio_mean.item(), out.ratio_min.item(), out.ratio_max.item(), out.clip_fraction.item()]
    assert found == pytest.approx([sum(ratios) / len(ratios), min(ratios), max(ratios), clipped / len(ratios)])
    assert 0 < clipped < len(ratios)


def test_events_are_summed_to_the_token() -> None:
    """Ratio and clip of each event; their sum is the token's term."""
    inputs = make(2)
    out = policy_loss(inputs, clip=0.2, beta=0.3, kl="k3")
    total, carried, clipped = 0.0, 0, 0
    for b, i, e in ((b, i, e) for b in range(2) for i in range(5) for e in range(2)):
        rho = math.exp((inputs.logp_BL - inputs.old_logp_BL)[b, i, e].item())
        a, m = inputs.advantage_B[b].item(), inputs.mask_BL[b, i].item()
        bounded = min(max(rho, 0.8), 1.2)
        d = (inputs.reference_logp_BL - inputs.logp_BL)[b, i, e].item()
        total -= inputs.weight_BL[i].item() * m * min(rho * a, bounded * a) / 3
        total += inputs.kl_weight_BL[i].item() * 0.3 * (math.exp(d) - d - 1) / 3
        carried += m > 0
        clipped += m > 0 and bounded * a < rho * a
    assert out.loss.item() == pytest.approx(total)
    assert out.clip_fraction.item() == pytest.approx(clipped / carried)
    per_token = policy_loss(make(2, exact_kl_BL=make(2).exact_kl_BL.sum(-1)), kl="exact", beta=0.3).loss
    per_event = policy_loss(make(2), kl="exact", beta=0.3).loss
    torch.testing.assert_close(per_token, per_event)


def test_a_step_without_a_mask_has_a_ratio_of_one() -> None:
    inputs = make(mask_BL=torch.tensor([[0, 0, 1, 1, 0.0]] * 3, **DOUBLE), valid_B=None)
    out = policy_loss(inputs, ratio="step", clip=10.0, beta=0)
    log_ratio = inputs.logp_BL - inputs.old_logp_BL
    rho = log_ratio[:, 2:4].mean(1).exp()
    expected = -(rho * inputs.advantage_B).mul(0.7).sum() / 3
    assert out.loss.item() == pytest.approx(expected.item())
    assert out.policy_term_T[0] == 0
    none = policy_loss(replace(inputs, mask_BL=torch.zeros(3, 5, **DOUBLE)), beta=0)
    figures = [none.ratio_mean, none.ratio_min, none.ratio_max, none.clip_fraction]
    assert [float(figure) for figure in figures] == [1, 1, 1, 0]


def test_what_does_not_count_may_hold_anything() -> None:
    """A failed sample, and the policy term outside the mask, are left out in value and gradient, whatever they are."""
    inputs, nan = make(), float("nan")
    spoilt = inputs.logp_BL.clone()
    spoilt[2] = nan
    advantage = inputs.advantage_B.clone()
    advantage[2] = nan
    leaf = spoilt.requires_grad_()
    changes = {"logp_BL": leaf, "advantage_B": advantage}
    out = policy_loss(replace(inputs, **changes), beta=0.5)
    assert out.loss.item() == pytest.approx(policy_loss(inputs, beta=0.5).loss.item())
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    assert gradient.isfinite().all()
    old = inputs.old_logp_BL.masked_fill(inputs.mask_BL == 0, nan)
    out = policy_loss(replace(inputs, old_logp_BL=old), beta=0.5)
    assert out.loss.item() == pytest.approx(policy_loss(inputs, beta=0.5).loss.item())
    exact = inputs.exact_kl_BL.clone()
    exact[2] = nan
    assert policy_loss(replace(inputs, exact_kl_BL=exact), kl="exact", beta=0.5).loss.isfinite()
    # With a masked KL its tokens outside the mask are left out, too.
    exact[:2][inputs.mask_BL[:2] == 0] = nan
    assert policy_loss(replace(inputs, exact_kl_BL=exact), kl="exact", beta=0.5, mask_kl=True).loss.isfinite()


def test_limits_of_the_options() -> None:
    inputs = make()
    assert policy_loss(inputs, clip=math.inf).clip_fraction == 0
    assert 0 < policy_loss(inputs, clip=0.0, beta=0.0).clip_fraction <= 1
    one = policy_loss(inputs, divisor=1.0).loss
    torch.testing.assert_close(policy_loss(inputs, divisor=0.5).loss, 2 * one)
    torch.testing.assert_close(policy_loss(inputs).loss, one / 3)
    without = replace(inputs, reference_logp_BL=None, exact_kl_BL=None)
    for kl in ("k2", "k3", "exact"):
        out = policy_loss(without, beta=0, kl=kl)
        assert out.kl_mean_T is None
        assert not out.kl_term_T.any()
        reported = policy_loss(inputs, beta=0, kl=kl)
        assert reported.kl_mean_T is not None
        assert not reported.kl_term_T.any()
        assert reported.loss == out.loss
    with pytest.raises(ValueError, match=r"beta 0\.1 with kl='exact' needs exact_kl_BL"):
        policy_loss(replace(inputs, exact_kl_BL=None), beta=0.1, kl="exact")
    with pytest.raises(ValueError, match=r"beta 0\.1 with kl='k2' needs reference_logp_BL"):
        policy_loss(replace(inputs, reference_logp_BL=None), beta=0.1, kl="k2")


@pytest.mark.parametrize(
    "options",
    [
        {"clip": (-0.1, 0.2)},
        {"clip": (0.2, -0.1)},
        {"beta": -0.1},
        {"beta": math.inf},
        {"divisor": 0.0},
        {"divisor": -1.0},
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        policy_loss(make(), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"old_logp_BL": normal(3, 4)}, "old_logp_BL must have shape"),
        ({"advantage_B": normal(4)}, "advantage_B must have shape"),
        ({"weight_BL": normal(3)}, "weight_BL must have shape"),
        ({"weight_BL": normal(2, 5)}, "weight_BL must have shape"),
        ({"mask_BL": normal(5)}, "mask_BL must have shape"),
        ({"reference_logp_BL": normal(5)}, "reference_logp_BL must have shape"),
        ({"exact_kl_BL": normal(5)}, "exact_kl_BL must have shape"),
        ({"valid_B": torch.ones(2, dtype=torch.bool)}, "valid_B must have shape"),
        ({"valid_B": torch.ones(3)}, "valid_B must be bool"),
        ({"kl_weight_BL": normal(3, 4)}, "kl_weight_BL must have shape"),
        ({"logp_BL": normal(5)}, "logp_BL must be"),
        ({"logp_BL": normal(3, 5, 2, 2)}, "logp_BL must be"),
        ({"logp_BL": normal(0, 5)}, "logp_BL must be"),
        ({"step_of_token_L": [3, 3, 4, 4]}, "got .* and 4 entries"),
        ({"step_of_token_L": [3, 3, 5, 5, 5]}, "ascend without gaps"),
        ({"step_of_token_L": [4, 4, 3, 3, 3]}, "ascend without gaps"),
    ],
)
def test_shapes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_loss(make(**changes))


def test_events_have_no_ratio_of_a_step() -> None:
    with pytest.raises(ValueError, match="ratio='step' needs log-probabilities summed to the token"):
        policy_loss(make(2), ratio="step")


def test_classes_without_probability() -> None:
    """Entropy and KL over classes that are excluded: they count nothing, and leave no NaN in a gradient."""
    logits = torch.tensor([[0.3, -1.0, -math.inf], [2.0, 0.0, 1.0]], requires_grad=True, **DOUBLE)  # type: ignore[call-overload]
    other = torch.tensor([[0.0, 0.5, 0.2], [0.0, 0.0, 0.0]], **DOUBLE)
    p, q = logits.detach().softmax(-1), other.softmax(-1)
    assert entropy(logits)[0].item() == pytest.approx(-sum(x * math.log(x) for x in p[0, :2].tolist()))
    expected = [
        sum(a * math.log(a / b) for a, b in zip(p[i].tolist(), q[i].tolist(), strict=True) if a) for i in (0, 1)
    ]
    found = exact_kl(logits, other)
    assert found.tolist() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(found.sum() + entropy(logits).sum(), logits)
    assert gradient.isfinite().all()
    assert exact_kl(other, logits).tolist()[0] == math.inf
    with pytest.raises(ValueError, match="must have one shape"):
        exact_kl(logits, other[0])
