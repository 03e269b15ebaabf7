"""What VAR and Switti do alike: caches, forks, scores, costs, and what is trained, under each of their options."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import varl
from models.switti import test_policy as switti
from models.var import test_policy as var
from small import counting
from varl import Prompt, Sampling, ScaleSchedule
from varl.models.switti.policy import GRIDS as SWITTI_GRIDS
from varl.models.var.policy import GRIDS as VAR_GRIDS
from varl.policy import Condition
from varl.rollout import replay

KINDS: dict[str, Callable[..., Any]] = {
    "var": var.make,
    "var-shared": partial(var.make, shared_aln=True),
    "var-plain": partial(var.make, attn_l2_norm=False),
    **{f"switti-{kind}": partial(switti.make, kind) for kind in switti.KINDS},
    # Guidance that ends, and a temperature that divides the logits from there on.
    **{
        f"switti-{kind}-off": partial(switti.make, kind, turn_off_cfg_start_si=3, last_scale_temp=0.5)
        for kind in ("ar", "nonar")
    },
}
FROZEN = {"crop_embed.weight"}


def condition_of(policy: Any, rows: int = 3) -> Condition:
    if policy.family == "switti":
        return policy.condition_from(switti.features(rows))
    return policy.condition([Prompt(label=label) for label in (3, 0, 4)[:rows]])


@pytest.fixture(scope="module", params=list(KINDS))
def policy(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


@pytest.fixture
def condition(policy: Any) -> Condition:
    return condition_of(policy)


@pytest.fixture
def actions(policy: Any) -> Tensor:
    return var.drawn(policy)


GRIDS = {
    "var": (VAR_GRIDS[256], VAR_GRIDS[512], (1, 2, 3), (2, 3, 5)),
    "var-shared": (VAR_GRIDS[256], (2, 3, 5)),
    "var-plain": (VAR_GRIDS[256], (2, 3, 5)),
    **{f"switti-{kind}": (SWITTI_GRIDS[512], (1, 2, 3), (1, 4, 5)) for kind in switti.KINDS},
}


@pytest.mark.parametrize(("kind", "grids"), [(kind, grids) for kind in GRIDS for grids in GRIDS[kind]], ids=str)
def test_cached_logits_are_teacher_forced_ones(kind: str, grids: tuple[int, ...]) -> None:
    policy = KINDS[kind](patch_nums=grids)
    condition, actions = condition_of(policy, 1), var.drawn(policy, 1)
    whole, state = var.forced(policy, condition, actions), policy.start(condition)
    for step in range(len(grids)):
        span = condition.schedule.tokens_of(step)
        torch.testing.assert_close(policy.next_logits(state), whole[:, span], atol=1e-5, rtol=1e-5)
        policy.advance(state, actions[:, span])


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_fork_and_select(policy: Any, condition: Condition, actions: Tensor, guidance: float) -> None:
    """Also across the step at which guidance ends and the unconditional rows go."""
    state = replay(policy, condition, actions, 2, guidance).state
    alone = policy.next_logits(state)
    forked, chosen = state.fork(2), state.select([2, 0])
    assert (forked.batch, chosen.batch) == (6, 2)
    torch.testing.assert_close(policy.next_logits(forked), alone.repeat_interleave(2, 0), atol=1e-4, rtol=1e-5)
    policy.advance(chosen, actions[[2, 0]][:, 5:14])
    whole = replay(policy, condition.select([2, 0]), actions[[2, 0]], 3, guidance).state
    torch.testing.assert_close(policy.next_logits(chosen), policy.next_logits(whole), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(policy.next_logits(state), alone, atol=1e-4, rtol=1e-5)
    again, copies = chosen.fork(2), 1 + (guidance > 0 and policy.guidance_ramp(condition.schedule)[3] > 0)
    assert (chosen.copies, again.copies, again.batch) == (copies, copies, 4)
    expected = policy.next_logits(chosen).repeat_interleave(2, 0)
    torch.testing.assert_close(policy.next_logits(again), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_scores_are_those_of_the_draw(policy: Any, condition: Condition, guidance: float) -> None:
    sampling = Sampling(guidance=guidance, top_k=12, top_p=0.9, temperature=0.8)
    rollout = varl.rollout(policy, condition, sampling, torch.Generator().manual_seed(0), logp=True)
    with torch.no_grad():
        scores = varl.log_probs(policy, condition, rollout.actions, guidance=sampling)
    assert rollout.logp is not None
    torch.testing.assert_close(scores.logp, rollout.logp, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [range(1), range(2), range(1, 3), range(4)], ids=str)
def test_a_prefix_costs_a_prefix(policy: Any, condition: Condition, actions: Tensor, steps: range) -> None:
    """Without shared keys a step costs itself alone."""
    schedule = condition.schedule
    whole = varl.log_probs(policy, condition, actions).logp
    with counting(policy.transformer.blocks[0]) as counts:
        found = varl.log_probs(policy, condition, actions[:, : schedule.offsets[steps.stop]], steps).logp
    first = 0 if policy.shares_keys else schedule.offsets[steps.start]
    assert counts == [3 * (schedule.offsets[steps.stop] - first)]
    torch.testing.assert_close(found, whole[:, schedule.span(steps)], atol=1e-5, rtol=1e-5)


def test_a_shared_prefix_is_not_computed_again(policy: Any, condition: Condition, actions: Tensor) -> None:
    state = replay(policy, condition, actions, 2).state
    both, twice = condition.repeat(2), actions.repeat_interleave(2, 0)
    whole = varl.log_probs(policy, both, twice, range(2, 4)).logp
    with counting(policy.transformer.blocks[0]) as counts:
        found = varl.log_probs(policy, both, twice, range(2, 4), prefix=state).logp
    assert counts == [6 * 25]
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="the prefix is at step 2, the steps to score start at 1"):
        policy.hidden(both, twice, range(1, 3), state)
    with pytest.raises(ValueError, match="4 rows of actions cannot go on from the 3"):
        policy.hidden(condition.select([0, 1, 2, 0]), actions[[0, 1, 2, 0]], range(2, 4), state)


def test_one_schedule(policy: Any, actions: Tensor) -> None:
    assert policy.schedules() == policy.schedules(64) == policy.schedules(64, 1.0) == ScaleSchedule.square((1, 2, 3, 4))
    for wrong in [(32, None), (None, 2.0)]:
        with pytest.raises(ValueError, match="64x64 pictures only"):
            policy.schedules(*wrong)
    other = ScaleSchedule.square((1, 2, 4))
    given = [Prompt(label=0)] if policy.family == "var" else switti.features()
    take = policy.condition if policy.family == "var" else policy.condition_from
    with pytest.raises(ValueError, match="have one schedule"):
        take(given, other)
    with pytest.raises(ValueError, match="have one schedule"):
        policy.decode(actions, other)
    with pytest.raises(ValueError, match="encodes pictures"):
        policy.encode(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("tables", "resolution", "tokens", "quarter"),
    [
        (VAR_GRIDS, 256, 680, 4),
        (VAR_GRIDS, 512, 2240, 5),
        (VAR_GRIDS, 1024, 9451, 9),
        (SWITTI_GRIDS, 512, 2240, 5),
        (SWITTI_GRIDS, 1024, 9451, 9),
    ],
)
def test_the_tables(tables: dict[int, tuple[int, ...]], resolution: int, tokens: int, quarter: int) -> None:
    schedule = ScaleSchedule.square(tables[resolution])
    assert (schedule.tokens, schedule.image_size) == (tokens, (resolution, resolution))
    assert schedule.middle("quarter") == quarter
    assert schedule.grids[quarter - 1][0] * 4 <= schedule.grids[-1][0] < schedule.grids[quarter][0] * 4
    for m in range(1, len(schedule)):
        side = schedule.grids[m - 1][0]
        assert schedule.middle(f"grid:{side}") == schedule.middle(f"pixels:{16 * side}") == schedule.middle(m) == m


def test_checkpointing_gives_the_same_gradients(policy: Any, condition: Condition, actions: Tensor) -> None:
    gradients: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        policy.transformer.checkpointing = checkpointing
        policy.zero_grad()
        with counting(policy.transformer.blocks[0].ffn) as counts:
            varl.log_probs(policy, condition, actions).logp.sum().backward()
        assert len(counts) == 1 + checkpointing
        gradients.append({name: p.grad for name, p in policy.transformer.named_parameters() if p.grad is not None})
    policy.transformer.checkpointing = False
    names = {name for name, _ in policy.transformer.named_parameters()} - FROZEN
    assert gradients[0].keys() == gradients[1].keys() == names
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-4, rtol=1e-4)


def test_what_is_trained(policy: Any) -> None:
    """The transformer alone, but for fixed random features; adapters go to linear layers of every block."""
    assert policy.trainable is policy.transformer
    assert not any(p.requires_grad for p in policy.tokenizer.parameters())
    names = {name for name, _ in policy.transformer.named_parameters()}
    assert {name for name, p in policy.transformer.named_parameters() if not p.requires_grad} == names & FROZEN
    for target in policy.lora_targets:
        found = [module for name, module in policy.transformer.named_modules() if name.endswith(f".{target}")]
        assert len(found) >= 2
        assert all(isinstance(module, torch.nn.Linear) for module in found)
