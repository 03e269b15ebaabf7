import math
from typing import Any

import pytest
import torch
from torch import Tensor

import varl
from varl import Prompt, Sampling, ScaleSchedule
from varl.models import coded
from varl.models.var import Var
from varl.policy import Condition

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
