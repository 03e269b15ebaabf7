"""Draws on the device: the right frequencies, the same from the same seeds, and what is kept of the CPU's.

Rounding may flip a draw whose number falls between two classes, and so all that follows in its row; nothing else may
differ. ``FLIPPED`` is how much of it is allowed.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu.measuring import Report
from gpu.pairs import Pair, every
from varl import Sampling, rollout
from varl.policy import Policy
from varl.rollout import Rollout, replay, row_generators
from varl.sampling import draw, filter_logits

FLIPPED = 0.1
"""Share of a tiny rollout's tokens: one early flip changes what follows it."""
CPU = torch.device("cpu")


def share(found: Tensor, expected: Tensor) -> float:
    """Of numbers that differ."""
    return float((found.cpu() != expected.cpu()).double().mean())


@pytest.mark.parametrize("there", [True, False], ids=["their generator on the device", "their generator on the CPU"])
@pytest.mark.parametrize("truncated", [False, True])
def test_frequencies_are_the_probabilities(there: bool, truncated: bool, device: torch.device, report: Report) -> None:
    draws, logits = 100_000, torch.tensor([0.5, -1.0, 2.0, 0.0, -torch.inf, 1.0])
    kept = filter_logits(logits, Sampling(top_k=3)) if truncated else logits
    generator = torch.Generator(device if there else CPU).manual_seed(0)
    counts = torch.bincount(draw(kept.to(device).expand(1, draws, 6), generator).flatten(), minlength=6).cpu().double()
    expected = kept.double().softmax(0) * draws
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = float(((counts - expected).square() / expected)[possible].sum())
    report.facts[f"chi-square of draws{', truncated' * truncated}, {'device' if there else 'CPU'}"] = chi_square
    assert chi_square < {5: 18.5, 3: 13.9}[int(possible.sum())]  # the 99.9% quantiles


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.7), (5, 1.0), (5, 0.8), (1, 0.5), (30, 0.95), (64, 0.9)])
def test_filters_keep_what_the_cpus_keep(
    top_k: int, top_p: float, ties: bool, device: torch.device, report: Report
) -> None:
    logits = 2 * torch.randn(40, 25, 64, generator=torch.Generator().manual_seed(0))
    logits = (2 * logits).round() / 2 if ties else logits
    sampling = Sampling(top_k=top_k, top_p=top_p, temperature=0.9)
    expected, found = filter_logits(logits, sampling), filter_logits(logits.to(device), sampling).cpu()
    other = (found.isfinite() != expected.isfinite()).any(-1)
    report.within(f"filters, top-k {top_k}, top-p {top_p}{', ties' * ties}", float(other.double().mean()), 0.01)
    torch.testing.assert_close(found[~other], expected[~other], atol=1e-6, rtol=1e-6)
    # Where rounding decided, it was about one class, or about classes that are alike.
    assert bool((found.isfinite().sum(-1) - expected.isfinite().sum(-1)).abs().le(1)[other].all())


def test_generators_of_the_cpu_draw_from_the_devices_logits_what_they_draw_from_the_cpus(
    device: torch.device, report: Report
) -> None:
    logits = 3 * torch.randn(8, 500, 100, generator=torch.Generator().manual_seed(1))
    one, other = (draw(logits.to(place), row_generators((5,), 8)) for place in (CPU, device))
    assert other.device == device
    report.within("draws by generators of the CPU", share(other, one), 1e-3)


def test_seeds_decide_what_a_generator_of_the_device_draws(device: torch.device, report: Report) -> None:
    logits = torch.randn(8, 200, 100, generator=torch.Generator().manual_seed(1)).to(device)
    first, again = (draw(logits, row_generators((5,), 8, device)) for _ in range(2))
    assert torch.equal(first, again)
    assert share(draw(logits, row_generators((6,), 8, device)), first) > 0.5
    # The generator that rewards and random weights draw from.
    torch.manual_seed(3)
    first = torch.rand(4, device=device)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4, device=device), first)
    on_cpu = draw(logits.cpu(), row_generators((5,), 8))
    report.facts["share of draws that differ between the CPU's and the device's generators"] = share(again, on_cpu)


def test_a_rows_draws_do_not_depend_on_its_batch(device: torch.device, report: Report) -> None:
    logits = torch.randn(8, 200, 100, generator=torch.Generator().manual_seed(1)).to(device)
    together = draw(logits, row_generators((5,), 8, device))
    for rows in ([2], [5, 1]):
        apart = draw(logits[rows], row_generators((5,), rows, device))
        report.within(f"draws of rows {rows} apart from their batch", share(apart, together[rows]), 1e-3)


SAMPLING = {"plain": Sampling(), "guided, truncated": Sampling(guidance=1.5, top_p=0.95, temperature=0.9)}


def drawn(policy: Policy, pair: Pair, name: str, device: torch.device | None, rows: list[int]) -> Rollout:
    """Some of four rows, to the end."""
    condition = policy.condition(pair.prompts(4)).select(rows)
    return rollout(policy, condition, SAMPLING[name], row_generators((7,), rows, device), logp=True)


@every
@pytest.mark.parametrize("name", SAMPLING)
def test_rollouts(pair: Pair, name: str, report: Report) -> None:
    """Twice from the same seeds; in another batch; and from generators of the CPU, as the CPU draws."""
    rows, what = list(range(4)), f"{pair.name}, {name}"
    first = drawn(pair.there, pair, name, pair.device, rows)
    again = drawn(pair.there, pair, name, pair.device, rows)
    assert first.actions.device == pair.device
    assert torch.equal(again.actions, first.actions)
    assert torch.equal(again.logp, first.logp)  # type: ignore[arg-type]
    few = drawn(pair.there, pair, name, pair.device, [3, 1])
    report.within(f"{what}: rollouts in another batch", share(few.actions, first.actions[[3, 1]]), FLIPPED)
    one, other = drawn(pair.cpu, pair, name, None, rows), drawn(pair.there, pair, name, None, rows)
    same = (one.actions == other.actions.cpu()).flatten(1).all(1)
    assert bool(same.any())
    report.within(f"{what}: rollouts by generators of the CPU", share(other.actions, one.actions), FLIPPED)
    assert one.logp is not None
    assert other.logp is not None
    report.near(f"{what}: their log-probabilities", other.logp.cpu()[same], one.logp[same], 1e-4)


@every
def test_forks_go_on_as_replays_do(pair: Pair, report: Report) -> None:
    condition, sampling = pair.there.condition(pair.prompts(2)), SAMPLING["guided, truncated"]
    own = row_generators((1,), 2, pair.device)
    start = rollout(pair.there, condition, sampling, own, until=2, keep_state=True)
    again = replay(pair.there, condition, start.actions, 2, sampling.guidance)
    logits = [pair.there.next_logits(one.state.fork(2)) for one in (start, again)]
    report.near(f"{pair.name}: logits after a replay", logits[1], logits[0], 1e-4)
    for row in range(2):
        own = replay(pair.there, condition.select([row]), start.actions[row : row + 1], 2, sampling.guidance)
        expected = pair.there.next_logits(own.state).repeat_interleave(2, 0)
        report.near(f"{pair.name}: logits of row {row}, forked", logits[0][2 * row : 2 * row + 2], expected, 1e-4)
    found = [
        rollout(pair.there, condition, sampling, row_generators((2,), 6, pair.device), start=one, fork=3).actions
        for one in (start, again)
    ]
    before = condition.schedule.offsets[2]
    assert torch.equal(found[0][:, :before], start.actions.repeat_interleave(3, 0))
    assert not torch.equal(found[0][0], found[0][1])
    report.within(f"{pair.name}: forks of a replay", share(found[1], found[0]), FLIPPED)
    # The state that was forked is as it was.
    report.near(f"{pair.name}: logits after a fork", pair.there.next_logits(start.state.fork(2)), logits[0], 1e-6)
