"""The contract, on a small random TokenFlow."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import varl
from models.tokenflow.whole import whole_logits
from small import counting
from varl import Sampling, log_probs, rollout
from varl.models.tokenflow import TokenFlow, model
from varl.models.tokenflow.refine import draw_refined, published_passes
from varl.policy import Condition, State
from varl.rollout import replay
from varl.schedule import ScaleSchedule

PAD, START = 20, 21
TRANSFORMER = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 100.0,
    "tokenizer_model_max_length": 64,
    "max_text_token_num": 5,
    "pad_token_id": PAD,
    "image_token_start": START,
    "img_open_ids": [7, 8],
}
TOKENIZER = {
    "scales": [1, 2, 3, 4],
    "pos_grid": 3,
    "codebook_size": 37,
    "codebook_embed_dim": 4,
    "semantic_code_dim": 6,
    "ch_mult": [1, 1],
    "enc_ch": 32,
    "enc_res": 1,
    "dec_ch": 32,
    "dec_res": 1,
    "z_channels": 8,
    "vit_width": 16,
    "vit_layers": 1,
    "vit_heads": 2,
    "vit_dec_width": 16,
    "vit_dec_depth": 1,
    "vit_dec_heads": 2,
}
PROMPTS = torch.tensor(
    [
        [PAD, PAD, PAD, 1, 5, 7, 8],
        [1, 9, 3, 12, 19, 7, 8],
        [PAD, PAD, PAD, PAD, 1, 7, 8],
    ]
)
NULL = torch.tensor([PAD, 1, 15, 16, 17, 7, 8])
STEPS = range(4)


def make(seed: int = 0, **changes: Any) -> TokenFlow:
    """Distributions far from uniform, that depend on prompts and on what was drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = varl.load_policy("tokenflow", {"transformer": TRANSFORMER | changes, "tokenizer": TOKENIZER}, "random")
        assert isinstance(policy, TokenFlow)
        for name, parameter in policy.transformer.named_parameters():
            parameter.data.mul_(1 + 0.3 * torch.randn_like(parameter) if parameter.ndim == 1 else 12)
            assert "norm" in name or parameter.ndim > 1 or "mm_projector" in name
    return policy


@pytest.fixture(scope="module")
def _policy() -> TokenFlow:
    return make()


@pytest.fixture
def policy(_policy: TokenFlow) -> TokenFlow:
    """Shared: tests must not change it."""
    return _policy


@pytest.fixture
def condition(policy: TokenFlow) -> Condition:
    return policy.condition_from({"prompt": PROMPTS, "null": NULL})


def random_actions(rows: int = 3, seed: int = 1) -> Tensor:
    return torch.randint(37, (rows, 30), generator=torch.Generator().manual_seed(seed))


def test_the_published_schedule() -> None:
    with torch.device("meta"):
        schedule = TokenFlow().default_schedule
    assert [h for h, _ in schedule.grids] == [1, 2, 4, 6, 8, 10, 12, 14, 16]
    assert schedule.image_size == (256, 256)
    assert schedule.tokens == 817
    assert schedule.middle("quarter") == schedule.middle("grid:4") == schedule.middle("pixels:64") == 3
    assert schedule.middle("pixels:224") == schedule.middle(8) == 8
    assert schedule.prefix_tokens(3) == 21


def test_schedules(policy: TokenFlow) -> None:
    assert policy.schedules() == policy.schedules(8, 1.0) == policy.default_schedule
    assert policy.guidance_ramp(policy.default_schedule) == [0, 1 / 3, 2 / 3, 1]
    for asked in ((256, None), (8, 1.5)):
        with pytest.raises(ValueError, match="8x8 pictures only"):
            policy.schedules(*asked)


@torch.no_grad()
@pytest.mark.parametrize("attend", ["_attend", "_attend_rounding"])
def test_the_cache_equals_rebuilding_the_whole_sequence(attend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step, with guidance, heads of keys shared, and prompts of different lengths in a batch."""
    monkeypatch.setattr(model, "_attend", getattr(model, attend))
    policy, actions = make(), random_actions()
    condition = policy.condition_from({"prompt": PROMPTS, "null": NULL})
    schedule = condition.schedule
    closing = torch.tensor([[7, 9, 2]]).expand(3, -1)
    rows = [torch.cat([p.expand(3, -1), actions + START, closing], 1) for p in (PROMPTS, NULL[None])]
    conditional, null = (whole_logits(policy, ids, 7)[:, 6:36, START : START + 37] for ids in rows)
    state = policy.start(condition, 3.0)
    for step in STEPS:
        own = schedule.tokens_of(step)
        t = step
        expected = (1 + t) * conditional[:, own] - t * null[:, own]
        torch.testing.assert_close(policy.next_logits(state), expected, atol=1e-4, rtol=1e-5)
        policy.advance(state, actions[:, own])
    hidden = policy.hidden(condition, actions, STEPS)
    torch.testing.assert_close(policy.logits(hidden), conditional, atol=3e-5, rtol=1e-5)


@torch.no_grad()
def test_cached_steps_equal_teacher_forcing(policy: TokenFlow, condition: Condition) -> None:
    drawn = rollout(policy, condition, generator=torch.Generator().manual_seed(0), logp=True)
    assert drawn.logp is not None
    torch.testing.assert_close(log_probs(policy, condition, drawn.actions).logp, drawn.logp, atol=1e-5, rtol=1e-5)
    forced = policy.logits(policy.hidden(condition, drawn.actions, STEPS))
    state = policy.start(condition)
    assert isinstance(state, State)
    for step in STEPS:
        own = condition.schedule.tokens_of(step)
        logits = policy.next_logits(state)
        torch.testing.assert_close(logits, forced[:, own], atol=1e-5, rtol=1e-5)
        assert torch.equal(policy.next_logits(state), logits)
        policy.advance(state, drawn.actions[:, own])
    assert state.step == 4


@torch.no_grad()
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_forks_and_selected_rows_go_on_as_their_own(policy: TokenFlow, condition: Condition, guidance: float) -> None:
    actions = random_actions()
    at = replay(policy, condition, actions, 2, guidance).state
    expected = policy.next_logits(at)
    chosen = at.fork(2).select([5, 0, 2])
    assert (chosen.batch, chosen.step, at.batch) == (3, 2, 3)
    rows = torch.tensor([2, 0, 1])
    torch.testing.assert_close(policy.next_logits(chosen), expected[rows], atol=1e-5, rtol=1e-5)
    policy.advance(chosen, actions[rows, 5:14])
    policy.advance(at, actions[:, 5:14])
    torch.testing.assert_close(policy.next_logits(chosen), policy.next_logits(at)[rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("m", [1, 3])
def test_going_on_from_a_prefix(policy: TokenFlow, condition: Condition, m: int) -> None:
    actions = random_actions()
    prefix = replay(policy, condition, actions, m, guidance=1.0).state
    steps = range(m, 4)
    whole = policy.hidden(condition, actions, steps)
    torch.testing.assert_close(policy.hidden(condition, actions, steps, prefix), whole, atol=1e-5, rtol=1e-5)
    twice = policy.hidden(condition.repeat(2), actions.repeat_interleave(2, 0), steps, prefix)
    torch.testing.assert_close(twice[1::2], whole, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="the steps to score start at 2"):
        policy.hidden(condition, actions, range(2, 4), replay(policy, condition, actions, 1).state)
    with pytest.raises(ValueError, match="2 rows of actions cannot go on from the 3"):
        policy.hidden(condition.select([0, 1]), actions[:2], steps, prefix)


def test_a_prefix_costs_a_prefix(policy: TokenFlow, condition: Condition) -> None:
    """Per row: 6 positions of text, and the tokens of the steps asked for; after a cached prefix those alone."""
    actions = random_actions()
    prefix = replay(policy, condition, actions, 2).state
    with counting(policy.transformer.model.layers[0]) as counts:
        scored = log_probs(policy, condition, actions[:, :14], range(3))
        policy.hidden(condition, actions, range(2, 4))
        policy.hidden(condition, actions, range(2, 3), prefix)
        state = policy.start(condition)
        policy.next_logits(state)
        policy.advance(state, actions[:, :1])
        policy.next_logits(state)
    assert counts == [3 * (6 + 14), 3 * (6 + 30), 3 * 9, 3 * 7, 3 * 4]
    assert scored.logp.shape == (3, 14)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", [False, True])
def test_nothing_of_padding_leaks(dtype: torch.dtype, rounding: bool) -> None:
    """Whatever [PAD] is embedded as, a prompt's numbers are the same, and finite."""
    policy = make(upstream_rounding=rounding)
    policy.trainable.to(dtype)
    condition, actions = policy.condition_from(PROMPTS), random_actions()
    before = policy.hidden(condition, actions, STEPS)
    assert before.isfinite().all()
    policy.transformer.model.embed_tokens.weight[PAD] = 1e4
    assert torch.equal(policy.hidden(condition, actions, STEPS), before)
    policy.transformer.model.embed_tokens.weight[1] += 1
    assert not torch.equal(policy.hidden(condition, actions, STEPS), before)


def test_every_row_sees_some_key(policy: TokenFlow) -> None:
    """Rows of [PAD] themselves: kernels differ in what they make of a row that sees none, NaN among it."""
    layout = policy.transformer._layout(PROMPTS, STEPS, torch.zeros(3, 36, 32))
    assert layout.text_mask is not None
    assert layout.text_mask.shape == (3, 1, 7, 7)
    assert layout.text_mask.any(-1).all()
    assert layout.text_mask[0, 0].tolist()[4] == [False, False, False, True, True, False, False]
    assert layout.keys[0].flatten().tolist() == [False] * 3 + [True] * 33


def test_bf16_is_near_fp32(policy: TokenFlow, condition: Condition) -> None:
    low = copy.deepcopy(policy)
    low.trainable.to(torch.bfloat16)
    actions = random_actions()
    fp32, bf16 = (p.logits(p.hidden(condition, actions, STEPS)).log_softmax(-1) for p in (policy, low))
    assert bf16.dtype == torch.float32
    assert 0 < (fp32 - bf16).abs().mean() < 0.02 * fp32.std()
    drawn = rollout(low, condition, Sampling(guidance=2.0), torch.Generator().manual_seed(0), logp=True)
    assert drawn.logp is not None
    assert drawn.logp.isfinite().all()
    assert low.decode(drawn.actions).dtype == torch.float32


@pytest.mark.parametrize("m", [0, 2])
def test_checkpointing_gives_the_same_gradients(m: int) -> None:
    actions, gradients, runs = random_actions(), [], []
    for checkpointing in (False, True):
        policy = make()
        policy.transformer.checkpointing = checkpointing
        condition = policy.condition_from(PROMPTS)
        prefix = replay(policy, condition, actions, m).state if m else None
        with counting(policy.transformer.model.layers[0].self_attn.q_proj) as counts:
            log_probs(policy, condition, actions, range(m, 4), prefix=prefix).logp.sum().backward()
        runs.append(len(counts))
        gradients.append({n: p.grad for n, p in policy.transformer.named_parameters() if p.grad is not None})
    assert runs == [1, 2]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=0, rtol=0)


def test_what_is_trained(policy: TokenFlow, condition: Condition) -> None:
    """The transformer, and of its head the image codes only; the tokenizer is frozen."""
    own = copy.deepcopy(policy)
    log_probs(own, condition, random_actions()).logp.sum().backward()
    assert own.trainable is own.transformer
    assert all(p.grad is None and not p.requires_grad for p in own.tokenizer.parameters())
    head = own.transformer.lm_head.weight.grad
    assert head is not None
    used = head.abs().sum(1) > 0
    assert used.nonzero().flatten().tolist() == list(range(START, START + 37))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own.transformer.parameters())
    names = {name.rsplit(".", 1)[-1] for name, m in own.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(policy.lora_targets) == names - {"lm_head", "0", "2"}


def test_conditions_from_ids(policy: TokenFlow) -> None:
    condition = policy.condition_from(PROMPTS)
    assert condition.null == {}
    assert torch.equal(policy.condition_from(PROMPTS.tolist()).features["prompt"], PROMPTS)
    own = policy.condition_from({"prompt": PROMPTS, "null": NULL.expand(3, -1)}, policy.default_schedule)
    assert own.null["prompt"].shape == (3, 7)
    assert policy.start(own, 1.0).passes["prompt"].shape == (6, 7)
    with pytest.raises(ValueError, match="negative prompt"):
        policy.start(condition, 1.0)
    with pytest.raises(ValueError, match="needs its text tokenizer"):
        policy.condition([varl.Prompt("a cat")])
    with pytest.raises(ValueError, match="at least one prompt"):
        policy.condition([])


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"null": NULL}, "are 'prompt' and 'null'"),
        ({"prompt": PROMPTS, "colour": NULL}, "are 'prompt' and 'null'"),
        (PROMPTS + START, "ids of text, 0 to 20"),
        (-PROMPTS, "ids of text, 0 to 20"),
        (PROMPTS.flip(1), "padded on the left"),
        (torch.ones(1, 35, dtype=torch.long), "more than 64 positions"),
        (torch.ones(1, 2, 3), "must be ids"),
        ({"prompt": PROMPTS, "null": NULL[1:]}, r"\[3, 7\] ids, the negative prompt \[1, 6\]"),
        ({"prompt": PROMPTS, "null": NULL.expand(2, -1)}, r"the negative prompt \[2, 7\]"),
    ],
)
def test_ids_that_cannot_be(policy: TokenFlow, features: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy.condition_from(features)


def test_another_schedule(policy: TokenFlow) -> None:
    with pytest.raises(ValueError, match="has one schedule, 1x1 2x2 3x3 4x4"):
        policy.condition_from(PROMPTS, ScaleSchedule.square([1, 2]))


def test_pictures_and_back(policy: TokenFlow) -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    actions = policy.encode(images)
    assert actions.shape == (2, 30)
    assert actions.dtype == torch.int64
    for tokens in (1, 14, 30):
        pictures = policy.decode(actions[:, :tokens])
        assert pictures.shape == (2, 3, 8, 8)
        assert pictures.min() >= 0
        assert pictures.max() <= 1
    with pytest.raises(ValueError, match="tokens end inside a step"):
        policy.decode(actions[:, :7])
    with pytest.raises(ValueError, match=r"encodes pictures \[batch, 3, 8, 8\]"):
        policy.encode(torch.rand(1, 3, 16, 16))


def test_codes_are_found_again(policy: TokenFlow) -> None:
    """Both codebooks count: the nearest code of a code is itself, and not for one half alone."""
    quantize = policy.tokenizer.quantize
    codes = torch.arange(36)[None]
    maps = quantize.entries(codes).transpose(1, 2).unflatten(2, (6, 6))
    assert torch.equal(quantize.nearest(maps * 3), codes)
    semantic, pixel = quantize.split(maps)
    swapped = torch.cat([semantic, pixel.roll(1, 3)], 1)
    assert not torch.equal(quantize.nearest(swapped), codes)


def test_one_pass_of_generation_is_a_rollout(policy: TokenFlow, condition: Condition) -> None:
    sampling = Sampling(guidance=2.0, top_k=5, top_p=0.9)
    drawn = rollout(policy, condition, sampling, torch.Generator().manual_seed(3))
    pictures = policy.generate(condition, [sampling], torch.Generator().manual_seed(3))
    assert torch.equal(pictures, policy.decode(drawn.actions))
    refined = policy.generate(condition, [sampling, sampling], torch.Generator().manual_seed(3))
    assert not torch.equal(refined, pictures)


def test_refinement_leaves_the_cache_as_a_single_pass_would(
    policy: TokenFlow, condition: Condition, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever passes there were, the next step's first reading is that of the codes they ended with."""
    first: list[Tensor] = []
    own = policy.next_logits

    def spy(state: Any) -> Tensor:
        logits = own(state)
        if state.step == 3:
            first.append(logits)
        return logits

    monkeypatch.setattr(policy, "next_logits", spy)
    sampling = Sampling(guidance=2.0)
    codes = draw_refined(policy, condition, [sampling] * 3, torch.Generator().manual_seed(0))
    state = replay(policy, condition, codes, 3, 2.0).state
    torch.testing.assert_close(first[0], own(state), atol=1e-5, rtol=1e-5)
    assert len(first) == 3
    assert not torch.allclose(first[0], first[1], atol=1e-2)


def test_settings_of_refinement(policy: TokenFlow, condition: Condition) -> None:
    assert [(s.top_k, s.top_p) for s in published_passes(2, 7.5)] == [(1200, 0.8), (1, 1.0)]
    assert all(s.guidance == 7.5 for s in published_passes(3, 7.5))
    with pytest.raises(ValueError, match="settings for 1, 2, 3 passes, not for 4"):
        policy.generate(condition, 4)
    for passes in ([], [Sampling(1.0), Sampling(2.0)]):
        with pytest.raises(ValueError, match="share one guidance"):
            policy.generate(condition, passes)
