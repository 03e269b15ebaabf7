import math

import pytest
import torch
from torch import Tensor

from bits import SCHEDULE, Bits, labels
from varl import Sampling
from varl.probe import Probe, StepReport, decided_share, probe
from varl.rewards import RewardOutput


def simulated(prompts: int, prefixes: int, k: int, share: float, seed: int) -> Tensor:
    """Rewards of unit within-prompt variance, ``share`` of it between prefixes; prompts differ by much more."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    between, within = math.sqrt(share), math.sqrt(1 - share)
    return 5 * normal(prompts, 1, 1) + between * normal(prompts, prefixes, 1) + within * normal(prompts, prefixes, k)


@pytest.mark.parametrize("true", [0.0, 0.3, 0.75, 1.0])
def test_the_known_share_is_found(true: float) -> None:
    share, error = decided_share(simulated(800, 4, 4, true, seed=1))
    assert error < 0.03
    assert share == pytest.approx(true, abs=3 * error + 1e-6)


@pytest.mark.parametrize("true", [0.2, 0.7])
def test_the_error_is_the_spread_of_repetitions(true: float) -> None:
    found = [decided_share(simulated(24, 5, 4, true, seed)) for seed in range(300)]
    shares = torch.tensor([share for share, _ in found])
    errors = torch.tensor([error for _, error in found])
    assert float(errors.mean()) == pytest.approx(float(shares.std()), rel=0.15)
    assert float(shares.mean()) == pytest.approx(true, abs=0.03)


def test_shares_by_hand() -> None:
    # Prefix means 1 and 3, deviations of 1 in each: MS within 2, between 4, so (4 - 2) / 2 between to 2 within.
    scores = torch.tensor([[[0.0, 2.0], [2.0, 4.0]]]).expand(3, 2, 2)
    share, error = decided_share(scores)
    assert share == pytest.approx(1 / 3)
    assert error == pytest.approx(0, abs=1e-9)


def test_shares_at_the_limits() -> None:
    decided = torch.randn(5, 4, 1, generator=torch.Generator().manual_seed(0)).expand(5, 4, 3)
    assert decided_share(decided) == pytest.approx((1, 0), abs=1e-9)
    assert decided_share(torch.full((5, 4, 3), 0.7)) == pytest.approx((0, 0), abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 4, 4), (4, 1, 4), (4, 4, 1)])
def test_a_share_needs_two_of_everything(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"at least 2 (prompts|prefixes|continuations), got 1"):
        decided_share(torch.rand(shape))


def found(*shares: float) -> Probe:
    steps = [StepReport(i + 1, i + 1.0, 1 - (i + 1) / 4, share, 0.01, 1.0) for i, share in enumerate((*shares, 1.0))]
    return Probe(SCHEDULE, steps, 100, 0)


@pytest.mark.parametrize(
    ("shares", "m", "prefix_updates"),
    [
        ((0.1, 0.75, 0.9), 2, 3),
        ((0.1, 0.5, 0.8), 3, 4),
        ((0.1, 0.5, 0.4), 2, 1),
        ((0.2, 0.1, 0.0), 1, 1),
        ((0.99, 0.99, 1.0), 1, 9),
        ((0.1, 0.6, 0.66), 3, 2),
    ],
)
def test_suggestions(shares: tuple[float, ...], m: int, prefix_updates: int) -> None:
    made = found(*shares)
    assert made.suggestion() == (m, prefix_updates)
    assert made.to_dict()["suggested_m"] == m
    assert made.to_dict()["suggested_alternation"] == [prefix_updates, 1]


def deciding(step: int, failing: int | None = None, calls: list[int] | None = None):
    """A reward that one step's bits alone set (see ``Bits.decode``)."""

    def reward(images: Tensor, prompts: list) -> RewardOutput:
        assert len(images) == len(prompts)
        sevenths = (7 * images[:, :, 0, 0]).round().long()
        score = ((sevenths >> (2 - step)) & 1).sum(1).float()
        if failing is not None:
            score[[i for i, p in enumerate(prompts) if p.label == failing]] = math.nan
        if calls is not None:
            calls.append(len(images))
        return RewardOutput.from_scores(score, len(images))

    return reward


def test_what_a_step_decides_is_decided_from_there_on() -> None:
    policy = Bits()
    for step in range(3):
        calls: list[int] = []
        made = probe(policy, deciding(step, calls=calls), labels(6), Sampling(), prefixes=6, continuations=5)
        assert [s.step for s in made.steps] == [1, 2, 3]
        assert calls == [6 * 6 * 5] * 2
        assert made.pictures == 360
        for report in made.steps[:-1]:
            if report.step > step:
                assert report.share == pytest.approx(1, abs=1e-9)
                assert report.error == pytest.approx(0, abs=1e-9)
            else:
                assert report.share < 0.5
        assert made.steps[-1].share == 1
    assert [s.tokens_left for s in made.steps] == pytest.approx([8 / 9, 6 / 9, 0])
    assert [s.side for s in made.steps] == pytest.approx([1, 2**0.5, 6**0.5])
    assert all(0 < s.entropy < 3 * math.log(2) for s in made.steps)


def test_a_probe_repeats() -> None:
    policy = Bits()
    one, two, other = (probe(policy, deciding(1), labels(4), Sampling(), seed=s).to_dict() for s in (0, 0, 1))
    assert one == two
    assert one != other


def test_failed_pictures_drop_their_prompt() -> None:
    policy = Bits()
    made = probe(policy, deciding(0, failing=2), labels(6), Sampling(), prefixes=3, continuations=2)
    assert made.failed == 2 * 3 * 2
    assert made.steps[0].share == pytest.approx(1, abs=1e-9)


def test_too_few_of_anything_is_said_before_work() -> None:
    policy, calls = Bits(), []
    for options, prompts, name in (
        ({"prefixes": 1}, 4, "prefixes"),
        ({"continuations": 1}, 4, "continuations"),
        ({}, 1, "prompts"),
    ):
        with pytest.raises(ValueError, match=f"at least 2 {name}, got 1"):
            probe(policy, deciding(0, calls=calls), labels(prompts), Sampling(), **options)
    assert not calls


def test_table_and_picture(tmp_path) -> None:
    made = found(0.1, 0.75, 0.9)
    assert made.table().row_count == 4
    made.plot(tmp_path / "probe.png")
    assert (tmp_path / "probe.png").stat().st_size > 5000
