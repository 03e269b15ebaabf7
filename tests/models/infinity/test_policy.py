"""The contract: sampling and scoring agree, rows are their own, and only what is asked for is computed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import varl
from models.infinity.cases import difference, draw_bits, make_policy, make_texts
from models.infinity.reference import reference_logits
from small import counting
from varl import Sampling
from varl.models.infinity import Infinity
from varl.models.infinity.schedules import RATIOS
from varl.policy import Condition, State

TINY: dict[str, Any] = {"embed_dim": 16, "num_heads": 2, "depth": 2, "block_chunks": 2, "mlp_ratio": 16}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"shared_aln": False},
    {"cos_attn": False, "tau": 1.7},
    {"head_depth": 2},
    {"rope2d_normalized_by_hw": 0},
    {"rope2d_normalized_by_hw": 1},
    {"rope2d_normalized_by_hw": 1, "scale_schedule": [[1, 1], [2, 2], [3, 2], [6, 4], [9, 6]]},
    {"block_chunks": 1},
    {"block_chunks": 4, "add_lvl_embeding_only_first_block": 0},
    {"block_chunks": 1, "add_lvl_embeding_only_first_block": 0},
    {"text_channels": 256, "cross_attn_layer_scale": 0.3, "mlp_ratio": 12.0},
    {"apply_spatial_patchify": 1, "ch_mult": (1, 1, 1, 1), "patch_size": 8},
]


@pytest.fixture(scope="module")
def policy() -> Infinity:
    return make_policy()


@pytest.fixture(scope="module")
def condition(policy: Infinity) -> Condition:
    return policy.condition_from(make_texts([5, 1, 9]))


def sample(policy: Infinity, condition: Condition, **options: Any) -> varl.Rollout:
    return varl.rollout(policy, condition, generator=torch.Generator().manual_seed(1), logp=True, **options)


def score(policy: Infinity, made: varl.Rollout, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return varl.log_probs(policy, made.condition, made.actions, range(made.steps), **options).logp


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
def test_every_option_is_as_the_plain_reference_has_it(options: dict[str, Any]) -> None:
    policy = make_policy(**options)
    schedule = policy.default_schedule
    texts = make_texts([4, 11], channels=policy.config.transformer.text_channels)
    condition, actions = policy.condition_from(texts), draw_bits(policy, 2)
    maps = torch.cat(policy.quantizer.accumulate(actions, schedule, len(schedule))[1], 1)
    with torch.no_grad():
        logits = policy.logits(policy.hidden(condition, actions, range(len(schedule))))
    assert logits.shape == (2, schedule.tokens, *policy.event, 2)
    assert logits.std() > 0.3
    for row in range(2):
        assert difference(logits[row], reference_logits(policy, texts[row], maps[row], schedule)) < 2e-4
    made = sample(policy, condition)
    assert made.logp is not None
    assert difference(made.logp, score(policy, made)) < 1e-5 * policy.config.bits


@pytest.mark.parametrize("ratio", RATIOS)
def test_sampling_equals_teacher_forcing_at_every_ratio(ratio: float) -> None:
    policy = make_policy(**TINY)
    schedule = policy.schedules("0.06M", ratio)
    condition, actions = policy.condition_from(make_texts([3, 7]), schedule), draw_bits(policy, 2, schedule=schedule)
    with torch.no_grad():
        forced = policy.logits(policy.hidden(condition, actions, range(len(schedule))))
    state = policy.start(condition)
    assert isinstance(state, State)
    for step in range(len(schedule)):
        span = schedule.tokens_of(step)
        assert difference(policy.next_logits(state), forced[:, span]) < 1e-5
        policy.advance(state, actions[:, span])


def test_guided_draws_are_scored_as_they_were_drawn(policy: Infinity, condition: Condition) -> None:
    sampling = Sampling(guidance=2.0, top_p=0.9, temperature=0.7)
    made = sample(policy, condition, sampling=sampling)
    assert made.logp is not None
    assert difference(made.logp, score(policy, made, guidance=sampling)) < 1e-4
    assert difference(made.logp, score(policy, made)) > 0.1
    assert policy.guidance_ramp(condition.schedule) == [1] * 4


def test_fork_and_select_go_on_as_if_drawn_at_once(policy: Infinity, condition: Condition) -> None:
    sampling = Sampling(guidance=1.0)
    start = sample(policy, condition, sampling=sampling, until=2, keep_state=True)
    branches = sample(policy, condition, sampling=sampling, start=start, fork=3)
    assert branches.logp is not None
    assert torch.equal(branches.condition.features["length"], torch.tensor([5, 5, 5, 1, 1, 1, 9, 9, 9]))
    assert difference(branches.logp, score(policy, branches, guidance=sampling)) < 1e-4
    for rows in ([2, 0], [1]):
        picked = start.state.select(rows)
        logits = policy.next_logits(picked)
        assert difference(logits, policy.next_logits(start.state)[rows]) < 1e-5


def test_every_row_has_its_own_unconditional_text(policy: Infinity, condition: Condition) -> None:
    assert torch.equal(condition.null["length"], condition.features["length"])
    picked, repeated = condition.select([2, 0]), condition.repeat(2)
    assert picked.null["length"].tolist() == [9, 5]
    assert repeated.null["length"].tolist() == [5, 5, 1, 1, 9, 9]
    learned = policy.condition_from([policy.transformer.cfg_uncond[:n] for n in (5, 1, 9)])
    actions = draw_bits(policy, 3)
    with torch.no_grad():
        null = policy.hidden(Condition(condition.schedule, condition.null, condition.null), actions, range(4))
        assert difference(null, policy.hidden(learned, actions, range(4))) < 1e-6


def test_a_row_does_not_depend_on_its_batch(policy: Infinity, condition: Condition) -> None:
    actions = draw_bits(policy, 3)
    with torch.no_grad():
        together = policy.hidden(condition, actions, range(4))
        for row, text in enumerate(make_texts([5, 1, 9])):
            alone = policy.hidden(policy.condition_from([text]), actions[row : row + 1], range(4))
            assert difference(alone[0], together[row]) < 1e-5
            wide = policy.condition_from([text, torch.full((12, 128), 50.0)]).select([0])
            assert difference(policy.hidden(wide, actions[row : row + 1], range(4))[0], alone[0]) < 1e-5


def test_negative_prompts(policy: Infinity, condition: Condition) -> None:
    bad = make_texts([12], seed=7)
    given = policy.condition_from(make_texts([5, 1, 9]), negative=bad)
    assert given.null["length"].tolist() == [12] * 3
    state, actions = policy.start(given, 1.0), draw_bits(policy, 3)
    plain = [policy.start(c) for c in (condition, policy.condition_from(bad * 3))]
    for step in range(2):
        conditional, negative = (policy.next_logits(s) for s in plain)
        assert difference(policy.next_logits(state), 2 * conditional - negative) < 1e-4
        for each in (state, *plain):
            policy.advance(each, actions[:, condition.schedule.tokens_of(step)])


def test_only_the_tokens_asked_for_are_computed(policy: Infinity, condition: Condition) -> None:
    actions = draw_bits(policy, 3)
    block = policy.transformer.layers[-1]
    with counting(block) as counts, torch.no_grad():
        varl.log_probs(policy, condition, actions[:, :5], range(2))
        start = sample(policy, condition, until=2, keep_state=True)
        counts.clear()
        policy.hidden(condition, actions, range(2))
        policy.hidden(start.condition, torch.cat([start.actions, actions[:, 5:]], 1), range(2, 3), start.state)
    assert counts == [3 * 5, 3 * 6]


def test_a_shared_prefix_gives_the_same_features(policy: Infinity, condition: Condition) -> None:
    start = sample(policy, condition, until=2, keep_state=True, sampling=Sampling(guidance=1.0))
    made = sample(policy, condition, sampling=Sampling(guidance=1.0), start=start, fork=2)
    steps = range(2, 4)
    whole = policy.hidden(made.condition, made.actions, steps)
    assert difference(policy.hidden(made.condition, made.actions, steps, start.state), whole) < 1e-5
    with torch.no_grad():
        assert difference(policy.hidden(made.condition, made.actions, steps, start.state), whole) < 1e-5
    with pytest.raises(ValueError, match="at step 2"):
        policy.hidden(made.condition, made.actions, range(1, 4), start.state)
    with pytest.raises(ValueError, match="5 rows"):
        policy.hidden(made.condition, made.actions[:5], steps, start.state)
    with pytest.raises(ValueError, match="need 11 tokens"):
        policy.hidden(made.condition, made.actions[:, :5], steps)


def test_taus_of_the_scales_are_part_of_the_distribution(condition: Condition) -> None:
    taus = [0.5, 1.0, 2.0, 0.8]
    plain, tempered = make_policy(), make_policy(tau_list=taus, cfg_list=[1, 2, 3, 1.5])
    actions = draw_bits(plain, 3)
    with torch.no_grad():
        logits = [p.logits(p.hidden(condition, actions, range(1, 4))) for p in (plain, tempered)]
    per_token = torch.tensor([taus[s] for s in condition.schedule.step_of_token()])[1:]
    assert difference(logits[0] / per_token.view(1, -1, 1, 1), logits[1]) < 1e-5
    assert tempered.guidance_ramp(condition.schedule) == [0, 1, 2, 0.5]
    sampling = Sampling(guidance=1.0)
    made = sample(tempered, condition, sampling=sampling)
    assert made.logp is not None
    assert difference(made.logp, score(tempered, made, guidance=sampling)) < 1e-4
    again = tempered.generate(condition, sampling, torch.Generator().manual_seed(1))
    assert torch.equal(made.actions, again)
    state = tempered.start(tempered.condition_from(make_texts([3]), tempered.schedules("0.06M")))
    with pytest.raises(ValueError, match="tau_list has 4 entries, the schedule has 7"):
        tempered.next_logits(state)


def test_generation_with_guidance_inside_the_blocks(policy: Infinity, condition: Condition) -> None:
    def generate(**options: Any) -> torch.Tensor:
        return policy.generate(condition, Sampling(top_k=900), torch.Generator().manual_seed(1), **options)

    plain = sample(policy, condition).actions
    assert torch.equal(generate(), plain)
    assert torch.equal(generate(cfg_list=1.0, cfg_insertion_layer=[-1]), plain)
    guided = sample(policy, condition, sampling=Sampling(guidance=2.0)).actions
    assert torch.equal(generate(cfg_list=3.0, tau_list=1.0), guided)
    within = [generate(cfg_list=3.0, cfg_insertion_layer=[place]) for place in (-1, -3)]
    assert not torch.equal(within[0], guided)
    assert not torch.equal(within[0], within[1])
    for wrong in ([], [1], [-4]):
        with pytest.raises(ValueError, match="cfg_insertion_layer"):
            generate(cfg_insertion_layer=wrong)
    with pytest.raises(ValueError, match="cfg_list has 2 entries"):
        generate(cfg_list=[1, 2])


def test_guidance_inside_the_blocks_makes_both_halves_alike(policy: Infinity, condition: Condition) -> None:
    seen: list[torch.Tensor] = []
    hook = policy.transformer.layers[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    mixed = policy.guided_logits(policy.start(condition, 1.0), 3.0, 1.0, (-2,))
    policy.guided_logits(policy.start(condition, 1.0), 3.0, 1.0)
    hook.remove()
    conditional, unconditional = seen[1].chunk(2)
    assert difference(seen[0], (3 * conditional - 2 * unconditional).repeat(2, 1, 1)) < 1e-5
    assert difference(conditional, unconditional) > 0.01
    assert mixed.shape == (3, 1, 4, 2)


def test_in_bfloat16(policy: Infinity, condition: Condition) -> None:
    half = copy.deepcopy(policy)
    half.trainable.to(torch.bfloat16)
    actions = draw_bits(policy, 3)
    with torch.no_grad():
        wanted = policy.logits(policy.hidden(condition, actions, range(4)))
        hidden = half.hidden(condition, actions, range(4))
        found = half.logits(hidden)
    assert found.dtype == hidden.dtype == torch.float32
    assert 0 < float((found - wanted).abs().mean()) < 0.05 * float(wanted.std())
    made = sample(half, condition, sampling=Sampling(guidance=1.0))
    assert made.logp is not None
    assert difference(made.logp, score(half, made, guidance=Sampling(guidance=1.0))) < 0.2
    varl.log_probs(half, condition, actions).logp.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in half.trainable.parameters())


def test_autocast_keeps_the_head_in_full_precision(policy: Infinity, condition: Condition) -> None:
    hidden = torch.randn(2, 3, 32)
    with torch.no_grad():
        wanted = policy.logits(hidden)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(policy.logits(hidden), wanted)
            found = policy.logits(policy.hidden(condition, draw_bits(policy, 3), range(4)))
        exact = policy.logits(policy.hidden(condition, draw_bits(policy, 3), range(4)))
    assert 0 < float((found - exact).abs().mean()) < 0.05 * float(exact.std())


def test_checkpointing_changes_memory_only(condition: Condition) -> None:
    policy, gradients, calls = make_policy(drop_path_rate=0.5).train(), [], []
    policy.transformer.layers[1].ffn.register_forward_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        policy.transformer.checkpointing = checkpointing
        policy.zero_grad()
        torch.manual_seed(3)
        varl.log_probs(policy, condition, draw_bits(policy, 3)).logp.sum().backward()
        gradients.append([p.grad.clone() for p in policy.trainable.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert len(calls) == 3


def test_drop_path_leaves_out_whole_rows_in_training_only(condition: Condition) -> None:
    policy, actions = make_policy(drop_path_rate=0.9), draw_bits(make_policy(), 3)
    with torch.no_grad():
        evaluated = policy.hidden(condition, actions, range(4))
        assert torch.equal(evaluated, make_policy().hidden(condition, actions, range(4)))
        policy.train()
        assert difference(policy.hidden(condition, actions, range(4)), evaluated) > 0.1
        rates = [block.drop_path for block in policy.transformer.layers]
    assert rates == pytest.approx([0, 0.3, 0.6, 0.9])
    dropped = torch.stack([policy.transformer.layers[-1]._dropped(torch.ones(100, 2, 2)) for _ in range(20)])
    assert dropped.unique().tolist() == pytest.approx([0, 10])
    assert (dropped == dropped[:, :, :1, :1]).all()
    assert 0.05 < float((dropped > 0).float().mean()) < 0.15


def test_names_for_adapters_are_linear_layers(policy: Infinity) -> None:
    modules = dict(policy.trainable.named_modules())
    for suffix in policy.lora_targets:
        found = [m for name, m in modules.items() if name.endswith("." + suffix) and "module" in name]
        assert len(found) == 4
        assert all(isinstance(m, nn.Linear) for m in found)
    hits = []
    for name, module in modules.items():
        if name.endswith(policy.lora_targets):
            module.register_forward_hook(lambda *_, name=name: hits.append(name))
    sample(policy, policy.condition_from(make_texts([2])), until=1)
    assert len(set(hits)) == 4 * 7 + 2
    for module in modules.values():
        module._forward_hooks.clear()


def test_pictures_of_all_and_of_the_first_steps(policy: Infinity) -> None:
    actions = draw_bits(policy, 2)
    schedule = policy.default_schedule
    for steps in (1, 3, 4):
        some = actions[:, : schedule.prefix_tokens(steps)]
        picture = policy.decode(some)
        assert picture.shape == (2, 3, 96, 64)
        assert 0 <= picture.min() < picture.max() <= 1
        total = policy.quantizer.accumulate(some, schedule)[0]
        assert torch.equal(picture, (policy._autoencoder.picture(total) + 1) / 2)
    with pytest.raises(ValueError, match=r"6 tokens end inside a step; steps end at \(1, 5, 11, 35\)"):
        policy.decode(actions[:, :6])
    with pytest.raises(ValueError, match="4\\] bits"):
        policy.decode(actions[..., :3])
    assert policy.encode(torch.rand(2, 3, 96, 64)).shape == (2, 35, 4)
    with pytest.raises(ValueError, match=r"\(96, 64\), got \(64, 64\)"):
        policy.encode(torch.rand(2, 3, 64, 64))


def test_conditions_that_cannot_be_made(policy: Infinity) -> None:
    with pytest.raises(ValueError, match=r"no text encoder.*condition_from"):
        policy.condition([varl.Prompt("a cat")])
    with pytest.raises(ValueError, match="at least one prompt"):
        policy.condition([])
    with pytest.raises(ValueError, match="at least one prompt"):
        policy.condition_from([])
    for shape in ((0, 128), (13, 128), (3, 64)):
        with pytest.raises(ValueError, match="1 to 12 tokens, 128 channels"):
            policy.condition_from([torch.zeros(shape)])
    with pytest.raises(ValueError, match="one token, not"):
        policy.condition_from(make_texts([3]), varl.ScaleSchedule(((2, 2), (4, 4))))
    with pytest.raises(ValueError, match="2 negative prompts were given for 3"):
        policy.condition_from(make_texts([3, 3, 3]), negative=make_texts([1, 1]))
