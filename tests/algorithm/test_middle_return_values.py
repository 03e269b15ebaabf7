"""The middle return's types, its limits, and what each estimator is computed from."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from varl.algorithm import middle_return
from varl.algorithm.middle_return import ESTIMATORS, EstimatorNeeds

LOGP = torch.tensor([[-1.0, -2.0, -4.0]], dtype=torch.float64)
REFERENCE = torch.tensor([[-2.0, -1.5, -3.0]], dtype=torch.float64)
REWARDS = torch.tensor([[1.0, 3.0, 2.0]])


def test_what_estimators_need() -> None:
    assert EstimatorNeeds() == EstimatorNeeds(log_ratio=False, eta=False)
    assert {name: (needs.log_ratio, needs.eta) for name, needs in ESTIMATORS.items()} == {
        "soft": (False, True),
        "soft-reference": (True, True),
        "policy": (True, True),
        "mean": (False, False),
        "max": (False, False),
    }


def test_the_defaults() -> None:
    expected = math.log(sum(math.exp(r) for r in (1, 3, 2)) / 3)
    assert middle_return(REWARDS).tolist() == pytest.approx([expected])
    given: Any = {"logp": LOGP, "reference_logp": REFERENCE}
    weighed = middle_return(REWARDS, estimator="soft-reference", **given)
    assert (
        weighed.tolist()
        == middle_return(REWARDS, estimator="soft-reference", eta=1.0, self_normalised=True, **given).tolist()
    )
    for estimator in ("soft", "mean", "max"):  # of the rewards alone, whatever else is given
        assert torch.equal(
            middle_return(REWARDS, estimator=estimator, **given),  # type: ignore[arg-type]
            middle_return(REWARDS, estimator=estimator),  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("estimator", ["soft", "soft-reference", "policy", "mean", "max"])
def test_the_type_is_that_of_the_rewards(estimator: Any) -> None:
    given: Any = {"logp": LOGP, "reference_logp": REFERENCE, "estimator": estimator}
    for dtype, expected in (
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int64, torch.float32),
    ):
        found = middle_return(REWARDS.to(dtype), **given)
        assert found.dtype == expected
        assert found.item() == pytest.approx(middle_return(REWARDS.double(), **given).item(), rel=1e-6)


def test_weights_that_are_not_normalised_by_the_number_of_valid_ones() -> None:
    valid = torch.tensor([[True, False, True]])
    given: Any = {"logp": LOGP, "reference_logp": REFERENCE, "estimator": "soft-reference", "eta": 0.5}
    found = middle_return(REWARDS.double(), valid=valid, self_normalised=False, **given)
    total = math.exp(-1 + 1 / 0.5) + math.exp(1 + 2 / 0.5)
    assert found.item() == pytest.approx(0.5 * math.log(total / 2), abs=1e-12)
    infinite = middle_return(REWARDS.double(), **{**given, "eta": math.inf})
    weights = [math.exp(d) for d in (-1, 0.5, 1)]
    assert infinite.item() == pytest.approx(sum(w * r for w, r in zip(weights, (1, 3, 2), strict=True)) / sum(weights))
    with pytest.raises(ValueError, match="'soft-reference' has no limit at eta = inf here"):
        middle_return(REWARDS, **{**given, "eta": math.inf}, self_normalised=False)


def test_no_graph_is_kept() -> None:
    leaf = REWARDS.clone().requires_grad_()
    assert not middle_return(leaf).requires_grad


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        (torch.tensor(1.0), {}, r"rewards_K must be \[..., K\] with K >= 1 continuations, got shape \(\)"),
        (torch.zeros(2, 0), {}, r"got shape \(2, 0\)"),
        (REWARDS, {"logp": LOGP[0]}, r"logp must have the shape of rewards_K \(1, 3\), got \(3,\)"),
        (REWARDS, {"reference_logp": LOGP[0]}, "^reference_logp must have the shape"),
        (REWARDS, {"estimator": "policy", "reference_logp": LOGP}, "needs logp and reference_logp"),
        (REWARDS, {"estimator": "policy", "logp": LOGP}, "needs logp and reference_logp"),
    ],
)
def test_what_is_refused(rewards: torch.Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        middle_return(rewards, **options)
    assert middle_return(torch.tensor([2.0])).item() == 2.0
