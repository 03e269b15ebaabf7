import math
from typing import Any

import pytest
import torch
from torch import Tensor

import varl
from small import counting
from varl import Prompt, Sampling, ScaleSchedule
from varl.models import coded
from varl.models.layers import plain_norm
from varl.models.var import Var
from varl.models.var.policy import GRIDS
from varl.policy import Condition
from varl.rollout import replay

GRIDS_SMALL = (1, 2, 3, 4)
TOKENIZER = {"vocab_size": 24, "z_channels": 4, "ch": 32}
SHAPE = {"num_classes": 5, "depth": 2, "embed_dim": 16, "num_heads": 2}


def make(tokenizer: dict[str, Any] | None = None, **transformer: Any) -> Var:
    """A random VAR whose distributions are far from uniform, and depend on what was drawn and asked for."""
    shape = {**SHAPE, "patch_nums": GRIDS_SMALL, **transformer}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = varl.load_policy(
            "var", {"transformer": shape, "tokenizer": {**TOKENIZER, **(tokenizer or {})}}, "random"
        )
        assert isinstance(policy, Var)
        for parameter in policy.transformer.parameters():
            parameter.data.normal_(std=0.4)
    return policy


@pytest.fixture(
    scope="module", params=[{}, {"shared_aln": True}, {"attn_l2_norm": False}], ids=["own", "shared", "plain"]
)
def policy(request: pytest.FixtureRequest) -> Var:
    return make(**request.param)


@pytest.fixture
def condition(policy: Var) -> Condition:
    return policy.condition([Prompt(label=label) for label in (3, 0, 4)])


def drawn(policy: Var, rows: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(policy.classes, (rows, policy.default_schedule.tokens), generator=generator)


@torch.no_grad()
def forced(policy: Var, condition: Condition, actions: Tensor) -> Tensor:
    return policy.logits(policy.hidden(condition, actions, range(len(condition.schedule))))


def test_condition(policy: Var) -> None:
    condition = policy.condition([Prompt(label=2), Prompt(label=4)])
    assert condition.features["label"].tolist() == [2, 4]
    assert condition.null["label"].tolist() == [5]
    assert condition.schedule == policy.default_schedule == ScaleSchedule.square(GRIDS_SMALL)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "at least one prompt"),
        ([Prompt("a dog")], "needs a label, 0 to 4; 'a dog' has none"),
        ([Prompt(label=5)], "labels are 0 to 4; got 5"),
        ([Prompt(label=0), Prompt(label=-1)], "labels are 0 to 4; got -1"),
    ],
)
def test_labels_are_checked(policy: Var, prompts: list[Prompt], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy.condition(prompts)


@pytest.mark.parametrize("grids", [GRIDS[256], GRIDS[512], (1, 2, 3), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("other", [{}, {"shared_aln": True, "attn_l2_norm": False}], ids=["own", "shared"])
def test_cached_logits_are_teacher_forced_ones(grids: tuple[int, ...], other: dict[str, Any]) -> None:
    policy = make(patch_nums=grids, **other)
    condition, actions = policy.condition([Prompt(label=1)]), drawn(policy, 1)
    whole, state = forced(policy, condition, actions), policy.start(condition)
    for step in range(len(grids)):
        span = condition.schedule.tokens_of(step)
        torch.testing.assert_close(policy.next_logits(state), whole[:, span], atol=1e-5, rtol=1e-5)
        policy.advance(state, actions[:, span])


def test_guidance_is_ramped(policy: Var, condition: Condition) -> None:
    actions = drawn(policy)
    null = Condition(condition.schedule, {"label": condition.null["label"].expand(3)}, condition.null)
    conditional, unconditional = forced(policy, condition, actions), forced(policy, null, actions)
    state = policy.start(condition, 2.0)
    for step, t in enumerate([0, 2 / 3, 4 / 3, 2.0]):
        span = condition.schedule.tokens_of(step)
        expected = (1 + t) * conditional[:, span] - t * unconditional[:, span]
        torch.testing.assert_close(policy.next_logits(state), expected, atol=1e-4, rtol=1e-4)
        policy.advance(state, actions[:, span])


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_fork_and_select(policy: Var, condition: Condition, guidance: float) -> None:
    actions = drawn(policy)
    state = replay(policy, condition, actions, 2, guidance).state
    alone = policy.next_logits(state)
    forked, chosen = state.fork(2), state.select([2, 0])
    assert (forked.batch, chosen.batch) == (6, 2)
    torch.testing.assert_close(policy.next_logits(forked), alone.repeat_interleave(2, 0), atol=1e-5, rtol=1e-5)
    policy.advance(chosen, actions[[2, 0]][:, 5:14])
    whole = replay(policy, condition.select([2, 0]), actions[[2, 0]], 3, guidance).state
    torch.testing.assert_close(policy.next_logits(chosen), policy.next_logits(whole), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(policy.next_logits(state), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_scores_are_those_of_the_draw(policy: Var, condition: Condition, guidance: float) -> None:
    sampling = Sampling(guidance=guidance, top_k=12, top_p=0.9, temperature=0.8)
    rollout = varl.rollout(policy, condition, sampling, torch.Generator().manual_seed(0), logp=True)
    with torch.no_grad():
        scores = varl.log_probs(policy, condition, rollout.actions, guidance=sampling)
    assert rollout.logp is not None
    torch.testing.assert_close(scores.logp, rollout.logp, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("steps", "tokens"), [(range(1), 1), (range(2), 5), (range(1, 3), 14), (range(4), 30)])
def test_a_prefix_costs_a_prefix(policy: Var, condition: Condition, steps: range, tokens: int) -> None:
    actions = drawn(policy)
    whole = varl.log_probs(policy, condition, actions).logp
    with counting(policy.transformer.blocks[0]) as counts:
        found = varl.log_probs(policy, condition, actions[:, : condition.schedule.offsets[steps.stop]], steps).logp
    assert counts == [3 * tokens]
    torch.testing.assert_close(found, whole[:, condition.schedule.span(steps)], atol=1e-5, rtol=1e-5)


def test_a_shared_prefix_is_not_computed_again(policy: Var, condition: Condition) -> None:
    actions = drawn(policy)
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


def test_one_schedule(policy: Var, condition: Condition) -> None:
    assert policy.schedules(64) == policy.schedules() == policy.schedules(64, 1.0)
    for wrong in [(32, None), (None, 2.0)]:
        with pytest.raises(ValueError, match="64x64 pictures only"):
            policy.schedules(*wrong)
    other = ScaleSchedule.square((1, 2, 4))
    with pytest.raises(ValueError, match="have one schedule"):
        policy.condition([Prompt(label=0)], other)
    with pytest.raises(ValueError, match="have one schedule"):
        policy.decode(drawn(policy), other)
    with pytest.raises(ValueError, match="encodes pictures"):
        policy.encode(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(("resolution", "tokens", "quarter"), [(256, 680, 4), (512, 2240, 5), (1024, 9451, 9)])
def test_the_tables(resolution: int, tokens: int, quarter: int) -> None:
    schedule = ScaleSchedule.square(GRIDS[resolution])
    assert (schedule.tokens, schedule.image_size) == (tokens, (resolution, resolution))
    assert schedule.middle("quarter") == quarter
    assert schedule.grids[quarter - 1][0] * 4 <= schedule.grids[-1][0] < schedule.grids[quarter][0] * 4
    for m in range(1, len(schedule)):
        side = schedule.grids[m - 1][0]
        assert schedule.middle(f"grid:{side}") == schedule.middle(f"pixels:{16 * side}") == schedule.middle(m) == m


def test_pictures_of_the_first_steps(policy: Var) -> None:
    actions = drawn(policy)
    for steps in range(1, 5):
        found = policy.decode(actions[:, : policy.default_schedule.offsets[steps]])
        assert found.shape == (3, 3, 64, 64)
        assert 0 <= found.min() < found.max() <= 1
    with pytest.raises(ValueError, match="end inside a step"):
        policy.decode(actions[:, :3])


def test_bf16_is_near_fp32() -> None:
    policy = make()
    with torch.no_grad():
        for parameter in policy.transformer.parameters():
            parameter.mul_(0.4)
    condition, actions = policy.condition([Prompt(label=1)]), drawn(policy, 1)
    exact = forced(policy, condition, actions)
    policy.trainable.to(torch.bfloat16)
    found = forced(policy, condition, actions)
    assert policy.hidden(condition, actions, range(4)).dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().max() < 0.05 * exact.std()
    rollout = varl.rollout(policy, condition, Sampling(guidance=1.0), torch.Generator().manual_seed(0), logp=True)
    with torch.no_grad():
        scores = varl.log_probs(policy, condition, rollout.actions, guidance=Sampling(guidance=1.0))
    torch.testing.assert_close(scores.logp, rollout.logp, atol=0.05, rtol=0.05)


def test_norms_stay_in_fp32() -> None:
    """A sequence far from zero: its variance would be lost in bf16."""
    x = (1000 + torch.arange(8.0) * 8).to(torch.bfloat16)[None, None]
    assert plain_norm(x, 1e-6).dtype == torch.float32
    torch.testing.assert_close(plain_norm(x, 1e-6), plain_norm(x.float(), 1e-6))


def test_checkpointing_gives_the_same_gradients(policy: Var, condition: Condition) -> None:
    actions, gradients = drawn(policy), []
    for checkpointing in (False, True):
        policy.transformer.checkpointing = checkpointing
        policy.zero_grad()
        runs: list[int] = []
        hook = policy.transformer.blocks[0].ffn.fc1.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        varl.log_probs(policy, condition, actions).logp.sum().backward()
        hook.remove()
        assert len(runs) == 1 + checkpointing
        gradients.append([p.grad for p in policy.transformer.parameters() if p.grad is not None])
    policy.transformer.checkpointing = False
    assert len(gradients[0]) == len(gradients[1]) == len(list(policy.transformer.parameters()))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_only_the_transformer_is_trained(policy: Var) -> None:
    assert policy.trainable is policy.transformer
    assert not any(p.requires_grad for p in policy.tokenizer.parameters())
    assert all(p.requires_grad for p in policy.transformer.parameters())


def test_lora_targets_are_linear_layers(policy: Var) -> None:
    for target in policy.lora_targets:
        found = [module for name, module in policy.transformer.named_modules() if name.endswith(target)]
        assert len(found) == 2
        assert all(isinstance(module, torch.nn.Linear) for module in found)


def test_soft_codes_sharpen() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -torch.inf]]).expand(4000, 4)
    generator = torch.Generator().manual_seed(0)
    first, last = coded.soft_codes(logits, 0.0, generator), coded.soft_codes(logits, 1.0, generator)
    assert torch.all(first[:, 3] == 0)
    assert first.max(-1).values.mean() < 0.97 < last.max(-1).values.mean()
    # The largest weight is a draw from the softmax of (1 + ratio) logits.
    shares = torch.bincount(first.argmax(-1), minlength=4) / 4000
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.03, rtol=0)
    shares = torch.bincount(last.argmax(-1), minlength=4) / 4000
    torch.testing.assert_close(shares, (2 * logits[0]).softmax(-1), atol=0.03, rtol=0)


def test_soft_codes_by_hand() -> None:
    logits, ratio = torch.tensor([[0.5, -1.0, 2.0]]), 0.5
    noise = torch.empty(1, 3).exponential_(generator=torch.Generator().manual_seed(3))
    z = [(1.5 * x - math.log(e)) / (0.27 * 0.525) for x, e in zip(logits[0].tolist(), noise[0].tolist(), strict=True)]
    expected = [math.exp(v - max(z)) for v in z]
    found = coded.soft_codes(logits, ratio, torch.Generator().manual_seed(3))[0]
    torch.testing.assert_close(found, torch.tensor(expected) / sum(expected), atol=1e-5, rtol=1e-4)


def test_generate_returns_pictures_only(policy: Var, condition: Condition) -> None:
    plain, again, smooth = (
        policy.generate(condition, Sampling(guidance=1.0, top_k=6), torch.Generator().manual_seed(0), more_smooth)
        for more_smooth in (False, False, True)
    )
    assert plain.shape == smooth.shape == (3, 3, 64, 64)
    assert torch.equal(plain, again)
    assert not torch.allclose(plain, smooth, atol=1e-3)


def test_soft_codes_are_made_of_truncated_logits(policy: Var, condition: Condition) -> None:
    sampling = Sampling(top_k=1)
    greedy = policy.decode(varl.rollout(policy, condition, sampling).actions)
    smooth = policy.generate(condition, sampling, torch.Generator().manual_seed(0), more_smooth=True)
    torch.testing.assert_close(smooth, greedy, atol=1e-4, rtol=0)
