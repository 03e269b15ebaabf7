import math

import pytest
import torch

from varl.algorithm import middle_return

REWARDS = torch.tensor([[0.3, 1.7, -2.0], [4.0, 4.5, 4.25]], dtype=torch.float64)
LOGP = torch.tensor([[-5.0, -7.0, -6.0], [-3.0, -3.5, -9.0]], dtype=torch.float64)
REFERENCE = torch.tensor([[-5.5, -6.0, -6.5], [-3.0, -4.0, -8.0]], dtype=torch.float64)


@pytest.mark.parametrize("estimator", ["soft", "mean", "max"])
@pytest.mark.parametrize("eta", [0.0, 1e-6, 0.5, 1.0, 1e6, math.inf])
def test_one_continuation_gives_its_reward(estimator, eta):
    rewards = torch.tensor([[0.3], [-4.0]])
    torch.testing.assert_close(middle_return(rewards, estimator=estimator, eta=eta), rewards[:, 0])


@pytest.mark.parametrize("eta", [0.1, 1.0, 3.0])
def test_soft_is_log_mean_exp(eta):
    for row, got in zip(REWARDS.tolist(), middle_return(REWARDS, eta=eta).tolist(), strict=True):
        assert got == pytest.approx(eta * math.log(sum(math.exp(r / eta) for r in row) / 3), abs=1e-12)


def test_limits_of_eta_are_the_maximum_and_the_mean():
    torch.testing.assert_close(middle_return(REWARDS, eta=0.0), REWARDS.amax(1))
    torch.testing.assert_close(middle_return(REWARDS, eta=math.inf), REWARDS.mean(1))
    torch.testing.assert_close(middle_return(REWARDS, eta=1e-9), REWARDS.amax(1), atol=1e-7, rtol=0)
    torch.testing.assert_close(middle_return(REWARDS, eta=1e9), REWARDS.mean(1), atol=1e-7, rtol=0)


@pytest.mark.parametrize("eta", [1e-30, 1e-3, 1.0, 1e3, 1e8])
def test_float32_is_stable_at_any_eta(eta):
    got = middle_return(REWARDS.float(), eta=eta)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), middle_return(REWARDS, eta=max(eta, 1e-12)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("estimator", ["soft", "mean", "max", "policy", "soft-reference"])
def test_a_constant_added_to_the_rewards_is_added_to_the_return(estimator):
    options = {"estimator": estimator, "eta": 0.7, "logp": LOGP, "reference_logp": REFERENCE}
    moved = middle_return(REWARDS + 100.0, **options)
    torch.testing.assert_close(moved, middle_return(REWARDS, **options) + 100.0)


def test_soft_lies_between_mean_and_maximum_and_falls_with_eta():
    etas = [0.0, 0.05, 0.5, 1.0, 2.0, 20.0, math.inf]
    values = torch.stack([middle_return(REWARDS, eta=eta) for eta in etas])
    assert (values.diff(dim=0) < 0).all()


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("eta", [0.3, 1.0, 50.0])
def test_soft_reference_equals_a_plain_loop(normalised, eta):
    got = middle_return(
        REWARDS,
        estimator="soft-reference",
        eta=eta,
        logp=LOGP,
        reference_logp=REFERENCE,
        self_normalised=normalised,
    )
    for i in range(2):
        weights = [math.exp(REFERENCE[i, k].item() - LOGP[i, k].item()) for k in range(3)]
        total = sum(w * math.exp(REWARDS[i, k].item() / eta) for k, w in enumerate(weights))
        assert got[i].item() == pytest.approx(eta * math.log(total / (sum(weights) if normalised else 3)), abs=1e-9)


def test_soft_reference_with_equal_log_probabilities_is_soft():
    for normalised in (True, False):
        got = middle_return(
            REWARDS,
            estimator="soft-reference",
            logp=LOGP,
            reference_logp=LOGP,
            self_normalised=normalised,
        )
        torch.testing.assert_close(got, middle_return(REWARDS))


def test_soft_reference_survives_extreme_weights():
    # The continuation of the highest reward has no weight worth naming; the other alone decides.
    got = middle_return(
        torch.tensor([[10.0, 1.0]]),
        estimator="soft-reference",
        logp=torch.tensor([[0.0, 0.0]]),
        reference_logp=torch.tensor([[-400.0, 0.0]]),
    )
    assert got.item() == pytest.approx(1.0, abs=1e-6)


def test_policy_is_the_mean_less_the_log_ratio():
    got = middle_return(REWARDS, estimator="policy", eta=0.1, logp=LOGP, reference_logp=REFERENCE)
    torch.testing.assert_close(got, (REWARDS - 0.1 * (LOGP - REFERENCE)).mean(1))


@pytest.mark.parametrize("estimator", ["soft", "mean", "max", "policy", "soft-reference"])
def test_failed_continuations_are_left_out_whatever_they_hold(estimator):
    rewards = REWARDS.clone()
    rewards[0, 1] = float("nan")
    valid = torch.tensor([[True, False, True], [False, False, False]])
    options = {"estimator": estimator, "eta": 0.5}
    got = middle_return(rewards, valid=valid, logp=LOGP, reference_logp=REFERENCE, **options)
    kept = [0, 2]
    alone = middle_return(REWARDS[:1, kept], logp=LOGP[:1, kept], reference_logp=REFERENCE[:1, kept], **options)
    torch.testing.assert_close(got[:1], alone)
    assert got[1].isnan()


def test_leading_shape_is_free():
    got = middle_return(REWARDS.expand(4, 2, 3))
    assert got.shape == (4, 2)
    assert middle_return(REWARDS[0]).shape == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": -1.0}, "eta"),
        ({"eta": math.nan}, "eta"),
        ({"estimator": "median"}, "estimator must be one of soft"),
        ({"estimator": "policy"}, "needs logp and reference_logp"),
        ({"estimator": "soft-reference", "logp": LOGP}, "needs logp and reference_logp"),
        ({"estimator": "policy", "eta": math.inf, "logp": LOGP, "reference_logp": LOGP}, "eta = inf"),
        ({"logp": LOGP[:1]}, "shape"),
        ({"valid": torch.ones(3, dtype=torch.bool)}, "valid"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        middle_return(REWARDS, **options)
