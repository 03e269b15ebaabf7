import pytest
import torch
from torch import Tensor

from bits import SCHEDULE, Bits, labels
from small import counting
from varl import Prompt, Sampling, log_probs, rollout
from varl.models.inkling import Inkling
from varl.rollout import replay, row_generators

GUIDED = Sampling(guidance=1.5, top_k=20, top_p=0.9, temperature=0.8)
STEPS = 5


def replayed(policy: Inkling, drawn, sampling: Sampling | None = None) -> Tensor:
    with torch.no_grad():
        return log_probs(policy, drawn.condition, drawn.actions, guidance=sampling).logp


def assert_equal_per_step(policy: Inkling, a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    schedule = policy.default_schedule
    for step in range(len(schedule)):
        off = (a - b)[:, schedule.tokens_of(step)].abs().max()
        assert off < tolerance, f"step {step}: {off}"


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("sampling", [None, GUIDED, Sampling(guidance=2.0), Sampling(top_k=3)])
def test_rollout_logp_is_teacher_forced(
    inkling: Inkling, prompts: list[Prompt], batch: int, sampling: Sampling | None
) -> None:
    condition = inkling.condition(prompts[:batch])
    drawn = rollout(inkling, condition, sampling, row_generators((1,), batch), logp=True)
    assert drawn.actions.shape == (batch, inkling.default_schedule.tokens)
    assert drawn.actions.dtype == torch.int64
    assert_equal_per_step(inkling, drawn.logp, replayed(inkling, drawn, sampling))


@pytest.mark.parametrize("fork", [1, 2, 3])
@pytest.mark.parametrize("m", range(1, STEPS))
@pytest.mark.parametrize("sampling", [None, GUIDED])
def test_forked_rollout_logp_is_teacher_forced(
    inkling: Inkling, prompts: list[Prompt], m: int, fork: int, sampling: Sampling | None
) -> None:
    condition = inkling.condition(prompts[:3])
    head = rollout(inkling, condition, sampling, row_generators((2,), 3), until=m, logp=True, keep_state=True)
    rows = row_generators((3,), 3 * fork)
    drawn = rollout(inkling, condition, sampling, rows, start=head, fork=fork, logp=True)
    assert len(drawn) == 3 * fork
    prefix = inkling.default_schedule.prefix_tokens(m)
    assert torch.equal(drawn.actions[:, :prefix], head.actions.repeat_interleave(fork, 0))
    assert torch.equal(drawn.logp[:, :prefix], head.logp.repeat_interleave(fork, 0))
    if fork > 1:
        assert not torch.equal(drawn.actions[0], drawn.actions[1])
    assert_equal_per_step(inkling, drawn.logp, replayed(inkling, drawn, sampling))


@pytest.mark.parametrize("m", range(1, STEPS))
def test_going_on_is_drawing_in_one_go(inkling: Inkling, prompts: list[Prompt], m: int) -> None:
    condition = inkling.condition(prompts)
    whole = rollout(inkling, condition, GUIDED, row_generators((4,), 8), logp=True)
    rows = row_generators((4,), 8)
    head = rollout(inkling, condition, GUIDED, rows, until=m, logp=True, keep_state=True)
    rest = rollout(inkling, condition, GUIDED, rows, start=head, logp=True)
    assert torch.equal(whole.actions, rest.actions)
    assert torch.equal(whole.logp, rest.logp)


@pytest.mark.parametrize("fork", [1, 3])
def test_a_rollout_can_be_gone_on_with_more_than_once(inkling: Inkling, prompts: list[Prompt], fork: int) -> None:
    condition = inkling.condition(prompts[:2])
    head = rollout(inkling, condition, GUIDED, row_generators((5,), 2), until=2, keep_state=True)
    filled = inkling.default_schedule.prefix_tokens(2)
    keys, actions = head.state.cache.keys[..., :filled, :].clone(), head.actions.clone()
    first, again = (
        rollout(inkling, condition, GUIDED, row_generators((6,), 2 * fork), start=head, fork=fork) for _ in range(2)
    )
    assert torch.equal(first.actions, again.actions)
    assert torch.equal(keys, head.state.cache.keys[..., :filled, :])
    assert torch.equal(actions, head.actions)
    assert head.state.step == 2


def test_branches_on_several_levels(inkling: Inkling, prompts: list[Prompt]) -> None:
    condition = inkling.condition(prompts[:2])
    one = rollout(inkling, condition, None, row_generators((7,), 2), until=1, logp=True, keep_state=True)
    two = rollout(
        inkling, condition, None, row_generators((8,), 4), start=one, fork=2, until=3, logp=True, keep_state=True
    )
    assert two.steps == 3
    assert two.actions.shape == (4, inkling.default_schedule.prefix_tokens(3))
    three = rollout(inkling, two.condition, None, row_generators((9,), 12), start=two, fork=3, logp=True)
    assert_equal_per_step(inkling, three.logp, replayed(inkling, three))


def test_selected_rows_go_on_alone(inkling: Inkling, prompts: list[Prompt]) -> None:
    condition = inkling.condition(prompts[:4])
    head = rollout(inkling, condition, GUIDED, row_generators((10,), 4), until=3, keep_state=True)
    state = head.state.select([2, 0, 2])
    assert state.batch == 3
    expected = inkling.next_logits(head.state)[[2, 0, 2]]
    torch.testing.assert_close(inkling.next_logits(state), expected, atol=1e-5, rtol=0)
    # Different goings-on of the copies do not meet.
    actions = torch.arange(3)[:, None].expand(3, 36).contiguous()
    inkling.advance(state, actions)
    alone = head.state.select([2])
    inkling.next_logits(alone)
    inkling.advance(alone, actions[2:])
    torch.testing.assert_close(inkling.next_logits(state)[2:], inkling.next_logits(alone), atol=1e-5, rtol=0)
    assert head.state.step == 3


def test_the_same_seed_repeats(inkling: Inkling, prompts: list[Prompt]) -> None:
    condition = inkling.condition(prompts[:3])

    def drawn(generator) -> Tensor:
        return rollout(inkling, condition, None, generator).actions

    assert torch.equal(drawn(torch.Generator().manual_seed(3)), drawn(torch.Generator().manual_seed(3)))
    assert not torch.equal(drawn(torch.Generator().manual_seed(3)), drawn(torch.Generator().manual_seed(4)))
    assert torch.equal(drawn(row_generators((1, 2), 3)), drawn(row_generators((1, 2), 3)))
    assert not torch.equal(drawn(row_generators((1, 2), 3)), drawn(row_generators((2, 1), 3)))
    rows = row_generators((1, 2), 3)
    assert torch.equal(drawn(tuple(rows)), drawn(row_generators((1, 2), 3)))


def test_a_rows_draws_do_not_depend_on_its_batch(inkling: Inkling, prompts: list[Prompt]) -> None:
    condition = inkling.condition(prompts)
    together = rollout(inkling, condition, GUIDED, row_generators((11,), 8))
    for row in (0, 5):
        alone = rollout(inkling, condition.select([row]), GUIDED, row_generators((11,), 8)[row : row + 1])
        assert torch.equal(alone.actions[0], together.actions[row])


def test_row_generators_differ_from_one_another() -> None:
    seeds = [g.initial_seed() for seed in ((0,), (1,), (0, 1), (1, 1)) for g in row_generators(seed, 50)]
    assert len(set(seeds)) == len(seeds)
    assert seeds[:3] == [g.initial_seed() for g in row_generators((0,), 3)]


@pytest.mark.parametrize("sampling", [None, GUIDED])
def test_the_prefix_is_not_recomputed(inkling: Inkling, prompts: list[Prompt], sampling: Sampling | None) -> None:
    schedule, copies = inkling.default_schedule, 1 if sampling is None else 2
    condition = inkling.condition(prompts[:2])
    with counting(inkling.transformer.blocks[1]) as tokens:
        head = rollout(inkling, condition, sampling, until=3, keep_state=True)
    assert sum(tokens) == copies * 2 * schedule.prefix_tokens(3)
    with counting(inkling.transformer.blocks[1]) as tokens:
        rollout(inkling, condition, sampling, start=head, fork=3)
    assert sum(tokens) == copies * 6 * (schedule.tokens - schedule.prefix_tokens(3))


def test_bits_are_drawn_and_summed_to_the_token() -> None:
    policy = Bits()
    condition = policy.condition(labels(4))
    for sampling in (None, Sampling(guidance=1.0, temperature=0.7)):
        rows = row_generators((0,), 4)
        head = rollout(policy, condition, sampling, rows, until=1, logp=True, keep_state=True)
        drawn = rollout(policy, condition, sampling, row_generators((1,), 8), start=head, fork=2, logp=True)
        assert drawn.actions.shape == (8, SCHEDULE.tokens, 3)
        assert set(drawn.actions.unique().tolist()) == {0, 1}
        scores = log_probs(policy, drawn.condition, drawn.actions, guidance=sampling)
        torch.testing.assert_close(drawn.logp, scores.logp, atol=1e-5, rtol=0)


def test_half_precision_logits_are_scored_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, rounded = Bits(), Bits.logits
    monkeypatch.setattr(Bits, "logits", lambda self, hidden: rounded(self, hidden).bfloat16())
    condition = policy.condition(labels(3))
    drawn = rollout(policy, condition, None, row_generators((0,), 3), logp=True)
    assert drawn.logp.dtype == torch.float32
    logits = policy.logits(policy.hidden(condition, drawn.actions, range(3))).double()
    expected = logits.log_softmax(-1).gather(-1, drawn.actions.unsqueeze(-1)).squeeze(-1).sum(-1)
    torch.testing.assert_close(drawn.logp.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(log_probs(policy, condition, drawn.actions).logp.double(), expected, atol=1e-5, rtol=0)


def test_gradients_are_not_recorded(inkling: Inkling, prompts: list[Prompt]) -> None:
    drawn = rollout(inkling, inkling.condition(prompts[:1]), logp=True)
    assert not drawn.logp.requires_grad


def test_what_cannot_be_drawn(inkling: Inkling, prompts: list[Prompt]) -> None:
    condition = inkling.condition(prompts[:2])
    head = rollout(inkling, condition, until=2, keep_state=True)
    with pytest.raises(ValueError, match="cannot draw steps 0 to 0"):
        rollout(inkling, condition, until=0)
    with pytest.raises(ValueError, match="cannot draw steps 0 to 6"):
        rollout(inkling, condition, until=6)
    with pytest.raises(ValueError, match="cannot draw steps 2 to 2"):
        rollout(inkling, condition, start=head, until=2)
    with pytest.raises(ValueError, match="fork branches the sequences given as start"):
        rollout(inkling, condition, fork=2)
    with pytest.raises(ValueError, match="fork must be at least 1"):
        rollout(inkling, condition, start=head, fork=0)
    with pytest.raises(ValueError, match="keep_state"):
        rollout(inkling, condition, start=rollout(inkling, condition, until=2))
    with pytest.raises(ValueError, match="logp"):
        rollout(inkling, condition, start=head, logp=True)
    with pytest.raises(ValueError, match="2 generators were given for 4 rows"):
        rollout(inkling, condition, None, row_generators((0,), 2), start=head, fork=2)
    with pytest.raises(ValueError, match="guidance"):
        rollout(inkling, condition, Sampling(guidance=2), start=head)


@pytest.mark.parametrize("sampling", [Sampling(), GUIDED])
@pytest.mark.parametrize("m", [1, 3])
def test_a_replayed_prefix_is_gone_on_with_like_a_drawn_one(
    inkling: Inkling, prompts: list[Prompt], sampling: Sampling, m: int
) -> None:
    condition = inkling.condition(prompts[:2])
    head = rollout(inkling, condition, sampling, row_generators((0,), 2), until=m, keep_state=True)
    again = replay(inkling, condition, head.actions, m, sampling.guidance)
    assert torch.equal(again.actions, head.actions)
    rest, expected = (
        rollout(inkling, condition, sampling, row_generators((1,), 4), start=start, fork=2) for start in (again, head)
    )
    assert torch.equal(rest.actions, expected.actions)
    with pytest.raises(ValueError, match="need 14 tokens, the actions have 5"):
        replay(inkling, condition, expected.actions[:, :5], 3)
