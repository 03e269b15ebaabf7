import pytest
import torch

from varl.algorithm import group_advantages

REWARDS = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.1, 0.1, 0.1, 0.1], [-1.0, 0.0, 0.5, 2.5]])
KINDS = ["std", "mean", "leave_one_out", "batch_std"]


def test_std_divides_by_the_population_standard_deviation():
    out = group_advantages(REWARDS[:1], eps=0.0)
    # mean 3, deviations -2 -1 0 3, variance (4 + 1 + 0 + 9) / 4 = 3.5
    expected = torch.tensor([[-2.0, -1.0, 0.0, 3.0]]) / 3.5**0.5
    torch.testing.assert_close(out.advantage_PG, expected)
    assert out.group_mean_P.item() == 3.0
    assert out.group_std_P.item() == pytest.approx(3.5**0.5)


def test_mean_and_leave_one_out():
    torch.testing.assert_close(
        group_advantages(REWARDS[:1], kind="mean").advantage_PG, torch.tensor([[-2.0, -1.0, 0.0, 3.0]])
    )
    got = group_advantages(REWARDS, kind="leave_one_out").advantage_PG
    for p in (0, 2):
        for g in range(4):
            others = [REWARDS[p, i].item() for i in range(4) if i != g]
            assert got[p, g].item() == pytest.approx(REWARDS[p, g].item() - sum(others) / 3, abs=1e-6)


def test_batch_std_uses_one_scale_for_all_groups():
    got = group_advantages(REWARDS, kind="batch_std", eps=0.0).advantage_PG
    centred = group_advantages(REWARDS, kind="mean").advantage_PG
    torch.testing.assert_close(got, centred / REWARDS.std(unbiased=False))
    one = group_advantages(REWARDS[:1], kind="batch_std").advantage_PG
    torch.testing.assert_close(one, group_advantages(REWARDS[:1], kind="std").advantage_PG)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_of_equal_rewards_gives_exactly_zero_and_is_counted(kind):
    out = group_advantages(REWARDS, kind=kind)
    assert (out.advantage_PG[1] == 0).all()
    assert out.group_std_P[1] == 0
    assert out.zero_variance_P.tolist() == [False, True, False]
    # Equal up to rounding in another order of summation, at HPSv3's size of rewards.
    noisy = torch.tensor([[10.64, 10.64, 10.640001, 10.64]])
    assert noisy[0, 2] != noisy[0, 0]
    out = group_advantages(noisy, kind=kind)
    assert (out.advantage_PG == 0).all()
    assert out.zero_variance_P.all()
    # A small but real difference is kept.
    assert not group_advantages(torch.tensor([[1e-8, 2e-8]]), kind=kind).zero_variance_P.any()
    assert not group_advantages(torch.tensor([[10.0, 10.001]]), kind=kind).zero_variance_P.any()


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_of_a_group_sum_to_zero_and_ignore_an_offset_per_group(kind):
    out = group_advantages(REWARDS, kind=kind).advantage_PG
    torch.testing.assert_close(out.sum(1), torch.zeros(3), atol=1e-5, rtol=0)
    if kind != "batch_std":
        moved = group_advantages(REWARDS + torch.tensor([[5.0], [1.0], [-3.0]]), kind=kind).advantage_PG
        torch.testing.assert_close(moved, out, atol=1e-4, rtol=1e-4)


def test_std_ignores_the_scale_of_the_reward():
    a = group_advantages(REWARDS).advantage_PG
    torch.testing.assert_close(group_advantages(1000 * REWARDS).advantage_PG, a, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1e30, float("nan"), float("inf")])
def test_a_failed_reward_drops_its_group_and_touches_no_other(kind, value):
    rewards = REWARDS.clone()
    rewards[2, 1] = value
    valid = torch.ones(3, 4, dtype=torch.bool)
    valid[2, 1] = False
    out = group_advantages(rewards, valid, kind=kind)
    assert out.dropped_P.tolist() == [False, False, True]
    assert out.zero_variance_P.tolist() == [False, True, False]
    assert (out.advantage_PG[2] == 0).all()
    assert out.group_mean_P[2].isnan()
    torch.testing.assert_close(out.advantage_PG[:2], group_advantages(REWARDS[:2], kind=kind).advantage_PG)


def test_a_reward_that_is_not_finite_counts_as_failed():
    rewards = REWARDS.clone()
    rewards[0, 0] = float("nan")
    out = group_advantages(rewards, kind="batch_std")
    assert out.dropped_P.tolist() == [True, False, False]
    assert out.advantage_PG.isfinite().all()
    assert group_advantages(torch.full((2, 3), float("nan")), kind="batch_std").advantage_PG.eq(0).all()


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        (torch.zeros(4), {}, "prompts, group"),
        (torch.zeros(4, 1), {}, "at least 2"),
        (torch.zeros(2, 2), {"kind": "rank"}, "kind must be one of std"),
        (torch.zeros(2, 2), {"eps": -1.0}, "eps"),
        (torch.zeros(2, 2), {"valid_PG": torch.ones(2, dtype=torch.bool)}, "valid_PG"),
        (torch.zeros(2, 2), {"valid_PG": torch.ones(2, 2)}, "bool"),
    ],
)
def test_bad_arguments_are_refused_by_name(rewards, options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, **options)
