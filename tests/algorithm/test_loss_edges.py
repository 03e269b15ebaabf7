"""The loss's defaults and types, what holds no graph, and figures of a single token."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from varl.algorithm import LossInput, kl_k1, kl_k2, kl_k3, policy_loss

from .test_loss_values import make


def test_the_defaults() -> None:
    inputs = make(valid_B=None)
    options = {"clip": 0.2, "beta": 0.01, "kl": "k3", "mask_kl": False, "ratio": "token", "divisor": 3.0}
    found, expected = policy_loss(inputs), policy_loss(inputs, **options)  # type: ignore[arg-type]
    for field in dataclasses.fields(found):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name
    for name, other in (("clip", 0.3), ("beta", 0.02), ("kl", "k2"), ("mask_kl", True), ("ratio", "step")):
        assert policy_loss(inputs, **{name: other}).loss != found.loss, name  # type: ignore[arg-type]


@pytest.mark.parametrize("ratio", ["token", "step"])
@pytest.mark.parametrize("kl", ["k2", "k3", "exact"])
def test_only_the_loss_holds_a_graph(ratio: str, kl: str) -> None:
    inputs = make()
    leaves = {name: getattr(inputs, name).clone().requires_grad_() for name in ("logp_BL", "exact_kl_BL")}
    advantage = inputs.advantage_B.clone().requires_grad_()
    given = dataclasses.replace(inputs, **leaves, advantage_B=advantage)
    out = policy_loss(given, beta=0.5, kl=kl, ratio=ratio)  # type: ignore[arg-type]
    for field in dataclasses.fields(out):
        value = getattr(out, field.name)
        if isinstance(value, torch.Tensor):
            assert value.requires_grad is (field.name == "loss"), field.name
    out.loss.backward()
    assert advantage.grad is None


def test_the_type_is_that_of_the_log_probabilities() -> None:
    inputs = make()
    names = ("logp_BL", "old_logp_BL", "reference_logp_BL", "weight_BL", "kl_weight_BL")
    single = {name: getattr(inputs, name).float() for name in names}
    out = policy_loss(dataclasses.replace(inputs, **single), beta=0.5)
    assert {out.loss.dtype, out.policy_term_T.dtype, out.kl_term_T.dtype, out.ratio_mean.dtype} == {torch.float32}
    assert out.loss.item() == pytest.approx(policy_loss(inputs, beta=0.5).loss.item(), rel=1e-5)
    steps = torch.tensor([3, 3, 4, 4, 4], dtype=torch.int32)
    assert policy_loss(dataclasses.replace(inputs, step_of_token_L=steps)).steps == range(3, 5)


def test_the_figures_of_one_token() -> None:
    one = LossInput(
        logp_BL=torch.tensor([[0.5]], dtype=torch.float64),
        old_logp_BL=torch.zeros(1, 1, dtype=torch.float64),
        advantage_B=torch.ones(1, dtype=torch.float64),
        weight_BL=torch.ones(1, dtype=torch.float64),
        step_of_token_L=[0],
        reference_logp_BL=torch.full((1, 1), 0.25, dtype=torch.float64),
    )
    out = policy_loss(one, beta=0.0)
    figures = [out.ratio_mean, out.ratio_min, out.ratio_max, out.clip_fraction]
    assert [float(figure) for figure in figures] == pytest.approx([math.exp(0.5)] * 3 + [1.0])
    assert out.log_ratio_mean_T.tolist() == out.log_ratio_max_T.tolist() == [0.5]
    assert out.kl_mean_T is not None
    assert out.kl_mean_T.tolist() == pytest.approx([math.exp(-0.25) - 1 + 0.25])
    assert out.steps == range(1)


def test_the_estimators_of_a_kl() -> None:
    logp, reference = torch.tensor(0.75, dtype=torch.float64), torch.tensor(0.25, dtype=torch.float64)
    assert kl_k1(logp, reference).item() == 0.5
    assert kl_k2(logp, reference).item() == 0.125
    assert kl_k3(logp, reference).item() == pytest.approx(math.exp(-0.5) + 0.5 - 1)
    # Without cancellation where the two are close.
    assert kl_k3(logp, logp + 1e-9).item() == pytest.approx(0.5e-18, rel=1e-3, abs=1e-24)
