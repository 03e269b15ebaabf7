import math

import numpy as np
import pytest
import torch
from torch import Tensor

from small import counting, make_inkling
from varl import Prompt, Sampling, log_probs, updates
from varl.config import MaskConfig, MethodConfig
from varl.models.inkling import Inkling
from varl.rewards import RewardOutput
from varl.updates import Drawn, Plan

METHOD = MethodConfig(middle=3, prompts=2, group=4, continuations=3)
STEPS = 5
INDEPENDENT = MethodConfig(middle=3, group=4, suffix_state="independent")


@pytest.mark.parametrize(
    ("kind", "method", "expected"),
    [
        ("full", METHOD, Plan("full", range(5), heads=4, tails=1, branch_at=5, group=4, continuations=1, until=5)),
        ("prefix", METHOD, Plan("prefix", range(3), heads=4, tails=3, branch_at=3, group=4, continuations=3, until=5)),
        (
            "suffix",
            METHOD,
            Plan("suffix", range(3, 5), heads=1, tails=4, branch_at=3, group=4, continuations=1, until=5),
        ),
        (
            "suffix",
            INDEPENDENT,
            Plan("suffix", range(3, 5), heads=4, tails=1, branch_at=5, group=4, continuations=1, until=5),
        ),
    ],
)
def test_plans(inkling: Inkling, kind: updates.Kind, method: MethodConfig, expected: Plan) -> None:
    plan = updates.plan(kind, method, inkling.default_schedule)
    assert plan == expected
    assert plan.pictures == (12 if kind == "prefix" else 4)


def test_a_plan_needs_a_middle_step_of_the_schedule(inkling: Inkling) -> None:
    schedule = inkling.default_schedule
    assert updates.plan("prefix", MethodConfig(), schedule).steps == range(3)  # quarter of 12 is 3
    with pytest.raises(ValueError, match="no step"):
        updates.plan("prefix", MethodConfig(middle="grid:5"), schedule)
    updates.plan("full", MethodConfig(middle="grid:5"), schedule)


def test_the_order_of_the_alternation() -> None:
    def kinds(count: int, **options) -> str:
        return "".join(updates.kind_of_update(MethodConfig(**options), i)[0] for i in range(count))

    assert kinds(9) == "pppspppsp"
    assert kinds(7, prefix_updates=1, suffix_updates=2) == "psspssp"
    assert kinds(3, update="full") == "fff"
    assert kinds(3, update="suffix") == "sss"
    assert kinds(3, update="prefix") == "ppp"


def drawn(policy: Inkling, prompts: list[Prompt], plan: Plan, seed: int = 0, sampling: Sampling | None = None) -> Drawn:
    return updates.draw(policy, policy.condition(prompts), plan, sampling or Sampling(), (seed, 5))


def test_a_prefix_update(inkling: Inkling, prompts: list[Prompt]) -> None:
    plan = updates.plan("prefix", METHOD, inkling.default_schedule)
    with counting(inkling.transformer.blocks[0]) as tokens:
        made = drawn(inkling, prompts[:2], plan)
    assert sum(tokens) == 2 * 4 * 14 + 2 * 4 * 3 * 180
    assert made.trained.actions.shape == (2 * 4, 14)
    assert made.whole.actions.shape == (2 * 4 * 3, 194)
    # K adjacent continuations of each prefix, and as many different prefixes as the group is large.
    assert torch.equal(made.whole.actions[:, :14], made.trained.actions.repeat_interleave(3, 0))
    assert len(made.trained.actions.unique(dim=0)) == 8
    assert len(made.whole.actions.unique(dim=0)) == 24
    cells = inkling.condition(prompts[:2]).features["cells"]
    assert torch.equal(made.trained.condition.features["cells"], cells.repeat_interleave(4, 0))
    assert torch.equal(made.whole.condition.features["cells"], cells.repeat_interleave(12, 0))
    assert made.trained.state is None


def test_a_suffix_update_shares_the_prefix(inkling: Inkling, prompts: list[Prompt]) -> None:
    plan = updates.plan("suffix", METHOD, inkling.default_schedule)
    with counting(inkling.transformer.blocks[0]) as tokens:
        made = drawn(inkling, prompts[:2], plan)
    assert sum(tokens) == 2 * 14 + 2 * 4 * 180
    assert made.trained is made.whole
    actions = made.whole.actions.view(2, 4, 194)
    assert bool((actions[:, :, :14] == actions[:, :1, :14]).all())
    assert not torch.equal(actions[0, 0, :14], actions[1, 0, :14])
    assert len(made.whole.actions.unique(dim=0)) == 8
    cells = inkling.condition(prompts[:2]).features["cells"]
    assert torch.equal(made.whole.condition.features["cells"], cells.repeat_interleave(4, 0))


@pytest.mark.parametrize(("kind", "method"), [("full", METHOD), ("suffix", INDEPENDENT)])
def test_updates_without_branches(
    inkling: Inkling, prompts: list[Prompt], kind: updates.Kind, method: MethodConfig
) -> None:
    made = drawn(inkling, prompts[:2], updates.plan(kind, method, inkling.default_schedule))
    assert made.trained is made.whole
    assert made.whole.actions.shape == (8, 194)
    assert len(made.whole.actions[:, :14].unique(dim=0)) == 8


def test_draws_are_of_their_seed(inkling: Inkling, prompts: list[Prompt]) -> None:
    plan = updates.plan("prefix", METHOD, inkling.default_schedule)
    one, again, other = (drawn(inkling, prompts[:2], plan, seed).whole.actions for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one[:, :14], other[:, :14])
    # The settings are used: with one class to draw from, a group is all alike.
    greedy = drawn(inkling, prompts[:1], plan, sampling=Sampling(top_k=1)).whole.actions
    assert len(greedy.unique(dim=0)) == 1


def output(scores: list[float], regions: list | None = None) -> RewardOutput:
    made = RewardOutput.from_scores(scores, len(scores))
    made.regions = regions
    return made


def returns(policy: Inkling, plan: Plan, made: RewardOutput, method: MethodConfig, **options) -> tuple[Tensor, Tensor]:
    given = {"drawn": None, "policy": policy, "reference": None, "micro_batch": 4} | options
    value_B, valid_B = updates.returns(made, plan=plan, method=method, **given)
    return value_B.view(-1, plan.group), valid_B.view(-1, plan.group)


def test_returns_of_a_prefix_are_middle_returns(inkling: Inkling) -> None:
    plan = updates.plan("prefix", METHOD, inkling.default_schedule)
    scores = [0.1 * i * i for i in range(24)]
    value, valid = returns(inkling, plan, output(scores), METHOD)
    assert value.shape == (2, 4)
    assert valid.all()
    for i in range(8):
        three = scores[3 * i : 3 * i + 3]
        expected = math.log(sum(math.exp(r) for r in three) / 3)
        assert value.flatten()[i].item() == pytest.approx(expected, rel=1e-5)
    hot = MethodConfig(middle=3, group=4, continuations=3, eta=math.inf)
    value, _ = returns(inkling, plan, output(scores), hot)
    torch.testing.assert_close(value, torch.tensor(scores).view(2, 4, 3).mean(2))


@pytest.mark.parametrize("kind", ["full", "suffix"])
def test_returns_of_whole_pictures_are_their_rewards(inkling: Inkling, kind: updates.Kind) -> None:
    scores = [0.5, -1, 2, 3, 4, 5, 6, 7]
    value, valid = returns(inkling, updates.plan(kind, METHOD, inkling.default_schedule), output(scores), METHOD)
    assert value.tolist() == [scores[:4], scores[4:]]
    assert valid.all()


def test_a_prefix_of_one_continuation_has_its_reward(inkling: Inkling) -> None:
    method = MethodConfig(middle=3, group=4, continuations=1)
    scores = [0.5, -1, 2, 3]
    value, _ = returns(inkling, updates.plan("prefix", method, inkling.default_schedule), output(scores), method)
    torch.testing.assert_close(value, torch.tensor([scores]))


@pytest.mark.parametrize("kind", ["prefix", "suffix", "full"])
def test_a_failed_picture_drops_its_group(inkling: Inkling, kind: updates.Kind) -> None:
    plan = updates.plan(kind, METHOD, inkling.default_schedule)
    scores = torch.rand(2 * plan.pictures).tolist()
    scores[1] = math.nan
    value, valid = returns(inkling, plan, output(scores), METHOD)
    assert value.isfinite().all()
    bad = 1 // plan.continuations
    assert valid.flatten().tolist() == [i != bad for i in range(8)]
    advantages = updates.advantages(value, valid, METHOD)
    assert advantages.dropped_P.tolist() == [True, False]
    assert not advantages.advantage_PG[0].any()
    assert advantages.advantage_PG[1].abs().sum() > 1


@pytest.mark.parametrize("estimator", ["soft-reference", "policy"])
def test_returns_that_need_the_reference(inkling: Inkling, prompts: list[Prompt], estimator: str) -> None:
    method = MethodConfig(middle=3, group=2, continuations=2, value=estimator, eta=0.5)
    plan, reference = updates.plan("prefix", method, inkling.default_schedule), make_inkling(seed=1)
    made = drawn(inkling, prompts[:2], plan)
    scores = torch.linspace(0, 1, 8).tolist()
    with pytest.raises(ValueError, match="needs a reference"):
        returns(inkling, plan, output(scores), method, drawn=made)
    value, _ = returns(inkling, plan, output(scores), method, drawn=made, reference=reference, micro_batch=3)
    with torch.no_grad():
        d = [
            log_probs(m, made.whole.condition, made.whole.actions).logp[:, 14:].double().sum(1)
            for m in (inkling, reference)
        ]
    for i in range(4):
        pair = [(scores[k], float(d[0][k] - d[1][k])) for k in (2 * i, 2 * i + 1)]
        if estimator == "policy":
            expected = sum(r - 0.5 * ratio for r, ratio in pair) / 2
        else:
            top = max(-ratio for _, ratio in pair)
            weights = [math.exp(-ratio - top) for _, ratio in pair]
            terms = [w * math.exp(r / 0.5) for w, (r, _) in zip(weights, pair, strict=True)]
            expected = 0.5 * math.log(sum(terms) / sum(weights))
        assert value.flatten()[i].item() == pytest.approx(expected, abs=1e-3, rel=1e-4)


def square(left: float, top: float, side: float) -> np.ndarray:
    return np.array([[left, top], [left + side, top], [left + side, top + side], [left, top + side]], dtype=np.float32)


def test_masks_of_a_prefix_join_its_continuations(inkling: Inkling) -> None:
    schedule, method = inkling.default_schedule, MethodConfig(middle=3, group=2, continuations=2)
    plan = updates.plan("prefix", method, schedule)
    regions = [[square(0, 0, 4)], [square(44, 44, 4)], [square(0, 0, 4)], [], [], [], [square(8, 0, 8)], []]
    masks = updates.masks(output([0.0] * 8, regions), plan, schedule, MaskConfig(), (48, 48))
    assert masks.shape == (4, 194)
    finest = masks[:, schedule.tokens_of(4)].view(4, 12, 12)
    corners = torch.zeros(12, 12)
    corners[0, 0] = corners[11, 11] = 1
    assert torch.equal(finest[0], corners)
    corners[11, 11] = 0
    assert torch.equal(finest[1], corners)
    assert masks[2].all()  # nothing found in any: everything
    assert finest[3].nonzero().tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]
    assert masks[0, schedule.tokens_of(1)].tolist() == [1, 0, 0, 1]
    assert masks[:, 0].all()
    skipped = updates.masks(output([0.0] * 8, regions), plan, schedule, MaskConfig(empty="skip"), (48, 48))
    assert not skipped[2].any()


def test_masks_of_pictures(inkling: Inkling) -> None:
    schedule = inkling.default_schedule
    plan = updates.plan("suffix", METHOD, schedule)
    regions = [[square(0, 0, 4)]] * 4 + [[square(44, 44, 4)]] * 4
    masks = updates.masks(output([0.0] * 8, regions), plan, schedule, MaskConfig(), (48, 48))
    assert masks.shape == (8, 194)
    assert masks[:, -1].tolist() == [0] * 4 + [1] * 4


def test_no_masks(inkling: Inkling) -> None:
    schedule = inkling.default_schedule
    plan = updates.plan("full", METHOD, schedule)
    assert updates.masks(output([0.0] * 4, [[]] * 4), plan, schedule, MaskConfig(enabled=False), (48, 48)) is None
    assert updates.masks(output([0.0] * 4, None), plan, schedule, MaskConfig(), (48, 48)) is None


def test_continuations_by_the_reference(inkling: Inkling, prompts: list[Prompt]) -> None:
    reference = make_inkling(seed=1)
    plan = updates.plan("prefix", METHOD, inkling.default_schedule)
    condition, sampling = inkling.condition(prompts[:2]), Sampling(guidance=1.0)
    own = updates.draw(inkling, condition, plan, sampling, (0,))
    made = updates.draw(inkling, condition, plan, sampling, (0,), continued_by=reference)
    same = updates.draw(inkling, condition, plan, sampling, (0,), continued_by=inkling)
    assert torch.equal(made.trained.actions, own.trained.actions)
    assert torch.equal(made.whole.actions[:, :14], own.trained.actions.repeat_interleave(3, 0))
    assert not torch.equal(made.whole.actions, own.whole.actions)
    assert torch.equal(same.whole.actions, own.whole.actions)
    # The reference's likelihood of them is higher than the policy's.
    with torch.no_grad():
        logp = [
            log_probs(m, made.whole.condition, made.whole.actions, range(3, 5), guidance=sampling).logp.sum()
            for m in (inkling, reference)
        ]
    assert logp[1] > logp[0]


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 7, 100])
@pytest.mark.parametrize("kind", ["full", "prefix", "suffix"])
def test_how_many_are_drawn_at_once_changes_nothing(
    inkling: Inkling, prompts: list[Prompt], kind: updates.Kind, at_once: int
) -> None:
    plan = updates.plan(kind, METHOD, inkling.default_schedule)
    condition, sampling = inkling.condition(prompts[:3]), Sampling(guidance=1.5, top_p=0.9)
    whole = updates.draw(inkling, condition, plan, sampling, (0, 5))
    parts = updates.draw(inkling, condition, plan, sampling, (0, 5), at_once=at_once)
    for found, expected in ((parts.whole, whole.whole), (parts.trained, whole.trained)):
        assert torch.equal(found.actions, expected.actions)
        assert torch.equal(found.condition.features["cells"], expected.condition.features["cells"])
        assert found.steps == expected.steps
