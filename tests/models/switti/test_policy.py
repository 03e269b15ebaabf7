from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import varl
from small import counting
from varl import Prompt, Sampling, ScaleSchedule
from varl.models.switti import Switti, crop_values
from varl.models.switti.model import Block, TransformerConfig, rotate, rotation_table
from varl.policy import Condition

GRIDS_SMALL = (1, 2, 3, 4)
TEXT, CONTEXT, POOLED = 6, 20, 12
SHAPE = {"Cvae": 4, "V": 24, "depth": 2, "embed_dim": 16, "num_heads": 2, "context_dim": CONTEXT, "pooled_dim": POOLED}
KINDS = {
    "ar": {"use_ar": True},
    "ar-abspos": {"use_ar": True, "rope": False, "use_swiglu_ffn": False, "use_crop_cond": False},
    "nonar": {"use_ar": False},
    "nonar-abspos": {"use_ar": False, "rope": False, "use_swiglu_ffn": False, "mlp_ratio": 3.0},
}


def make(kind: str = "ar", patch_nums: tuple[int, ...] = GRIDS_SMALL, **options: Any) -> Switti:
    """A random Switti whose distributions are far from uniform, and depend on what was drawn and asked for."""
    config = {"transformer": {**SHAPE, **KINDS[kind], "patch_nums": patch_nums}, "tokenizer": {"ch": 32}, **options}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = varl.load_policy("switti", config, "random")
        assert isinstance(policy, Switti)
        for parameter in policy.transformer.parameters():
            parameter.data.normal_(std=0.4)
    return policy


def features(rows: int = 3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    bias = torch.zeros(rows, TEXT)
    bias[0, 4:] = -torch.inf
    null_bias = torch.zeros(1, TEXT)
    null_bias[:, 2:] = -torch.inf
    return {
        "prompt_embeds": torch.randn(rows, TEXT, CONTEXT, generator=g),
        "pooled": torch.randn(rows, POOLED, generator=g),
        "attn_bias": bias,
        "null_prompt_embeds": torch.randn(1, TEXT, CONTEXT, generator=g),
        "null_pooled": torch.randn(1, POOLED, generator=g),
        "null_attn_bias": null_bias,
    }


@pytest.fixture(scope="module", params=list(KINDS))
def policy(request: pytest.FixtureRequest) -> Switti:
    return make(request.param)


@pytest.fixture
def condition(policy: Switti) -> Condition:
    return policy.condition_from(features())


def drawn(policy: Switti, rows: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(policy.classes, (rows, policy.default_schedule.tokens), generator=generator)


@torch.no_grad()
def forced(policy: Switti, condition: Condition, actions: Tensor) -> Tensor:
    return policy.logits(policy.hidden(condition, actions, range(len(condition.schedule))))


def test_whether_keys_are_shared(policy: Switti, condition: Condition) -> None:
    causal = policy.config.transformer.use_ar
    assert policy.shares_keys == causal
    assert (policy.start(condition).cache is not None) == causal


def test_what_a_step_depends_on(policy: Switti, condition: Condition) -> None:
    """With shared keys a step attends to all before it; without, it knows them by the sum of what they drew alone."""
    model = policy.transformer
    maps = policy.tokenizer.quantize.accumulate(drawn(policy), 4)[1]
    other = [maps[0] + 1, *maps[1:]]
    with torch.no_grad():
        one, two = (model(condition.features, inputs, range(4)) for inputs in (maps, other))
    same = [torch.allclose(one[:, s], two[:, s], atol=1e-6) for s in map(condition.schedule.tokens_of, range(4))]
    assert same == ([True, False, False, False] if policy.shares_keys else [True, False, True, True])


def test_padding_is_not_read(policy: Switti) -> None:
    given = features()
    changed = {**given, "prompt_embeds": given["prompt_embeds"].clone()}
    changed["prompt_embeds"][0, 4:] = 9.0
    one, two = (forced(policy, policy.condition_from(f), drawn(policy)) for f in (given, changed))
    torch.testing.assert_close(one, two)
    changed["prompt_embeds"][0, 3] = 9.0
    assert not torch.allclose(one[0], forced(policy, policy.condition_from(changed), drawn(policy))[0], atol=1e-2)


def test_guidance_by_step() -> None:
    policy = make(turn_on_cfg_start_si=1, turn_off_cfg_start_si=3)
    condition, actions = policy.condition_from(features()), drawn(policy)
    assert policy.guidance_ramp(condition.schedule) == [0, 1 / 3, 2 / 3, 0]
    assert make().guidance_ramp(condition.schedule) == [0, 1 / 3, 2 / 3, 1]
    null = {name: value.expand(3, *value.shape[1:]) for name, value in condition.null.items()}
    one = forced(policy, condition, actions)
    other = forced(policy, Condition(condition.schedule, null, condition.null), actions)
    state, rows = policy.start(condition, 3.0), []
    with counting(policy.transformer.blocks[0]) as counts:
        for step, t in enumerate([0, 1, 2, 0]):
            span = condition.schedule.tokens_of(step)
            expected = (1 + t) * one[:, span] - t * other[:, span]
            torch.testing.assert_close(policy.next_logits(state), expected, atol=1e-4, rtol=1e-4)
            policy.advance(state, actions[:, span])
            rows.append(counts[-1] // (span.stop - span.start))
    assert rows == [6, 6, 6, 3]


def test_the_temperature_of_the_last_steps() -> None:
    plain, hot = make(), make(turn_off_cfg_start_si=2, last_scale_temp=0.25)
    actions = drawn(plain)
    one, two = (forced(p, p.condition_from(features()), actions) for p in (plain, hot))
    torch.testing.assert_close(two[:, :5], one[:, :5])
    torch.testing.assert_close(two[:, 5:], 4 * one[:, 5:])


def test_the_text_is_read_once_for_a_drawing(policy: Switti, condition: Condition) -> None:
    with counting(policy.transformer.blocks[0].cross_attn.to_kv) as counts:
        varl.rollout(policy, condition, Sampling(guidance=1.0), torch.Generator().manual_seed(0))
    assert counts == [6 * TEXT]


def test_features_are_checked(policy: Switti) -> None:
    good = features()
    rows = {**good, "null_pooled": torch.zeros(3, POOLED), "null_attn_bias": torch.zeros(3, TEXT)}
    assert policy.condition_from(rows).null["pooled"].shape == (1, POOLED)
    wrong: list[tuple[dict[str, Tensor], str]] = [
        ({k: v for k, v in good.items() if k != "pooled"}, "features are prompt_embeds, pooled, attn_bias"),
        ({k: v for k, v in good.items() if k != "null_pooled"}, "null_ and each of them"),
        ({**good, "text": torch.zeros(3)}, "features are"),
        ({**good, "pooled": torch.zeros(3, POOLED + 1)}, f"pooled must be .batch, {POOLED}"),
        ({**good, "prompt_embeds": good["prompt_embeds"][:2]}, "prompt_embeds must be"),
        ({**good, "null_prompt_embeds": torch.zeros(1, 2, CONTEXT)}, "null_prompt_embeds must be"),
        ({**good, "null_pooled": torch.randn(3, POOLED)}, "its rows differ"),
    ]
    for given, message in wrong:
        with pytest.raises(ValueError, match=message):
            policy.condition_from(given)
    alone = policy.condition_from({k: v for k, v in good.items() if not k.startswith("null_")})
    policy.start(alone)
    with pytest.raises(ValueError, match="guidance needs the unconditional twin"):
        policy.start(alone, 1.0)
    with pytest.raises(ValueError, match="no text encoders"):
        policy.condition([Prompt("a dog")])
    with pytest.raises(ValueError, match="at least one prompt"):
        policy.condition([])


def test_rotations() -> None:
    """Every pair of channels turns by its frequency times the column, or the row, stretched to the same side."""
    schedule = ScaleSchedule.square((1, 2, 3))
    table = rotation_table(schedule, 8, 10000.0, 128.0)
    for step, side in enumerate((1, 2, 3)):
        for row in range(side):
            for column in range(side):
                found = table[schedule.offsets[step] + row * side + column]
                unit = 128 / max(side - 1, 1)
                turns = torch.tensor([column, column * 0.01, row, row * 0.01]) * unit
                torch.testing.assert_close(found, torch.polar(torch.ones(4), turns), atol=2e-5, rtol=0)
    x = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 2.0, 0.0]).view(1, 1, 1, 8)
    a = torch.tensor([0.3, 0.5, 0.7, 0.9])
    expected = torch.tensor([a[0].cos(), a[0].sin(), -a[1].sin(), a[1].cos(), 0, 0, 2 * a[3].cos(), 2 * a[3].sin()])
    torch.testing.assert_close(rotate(x, torch.polar(torch.ones(4), a)[None]).flatten(), expected)


def test_tables_are_no_part_of_the_weights(policy: Switti, condition: Condition) -> None:
    names = set(policy.state_dict())
    forced(policy, condition, drawn(policy))
    assert set(policy.state_dict()) == names
    assert {name for name, _ in policy.transformer.named_buffers()} == {"lvl_1L", "attn_bias_for_masking"}


def test_widths_of_the_feed_forward() -> None:
    with torch.device("meta"):
        gated = [Block(TransformerConfig(embed_dim=width, num_heads=4)).ffn for width in (16, 48, 1920)]
    assert [ffn.up_proj.out_features for ffn in gated] == [42, 128, 5120]
    hidden = {kind: make(kind).transformer.blocks[0].ffn for kind in ("ar-abspos", "nonar-abspos")}
    assert {kind: ffn.fc1.out_features for kind, ffn in hidden.items()} == {"ar-abspos": 64, "nonar-abspos": 48}


def test_crop_values() -> None:
    found = crop_values(torch.tensor([512, 1024, 300, 531]), torch.tensor([512, 2048, 150, 700]))
    assert found.tolist()[:3] == [[512, 512, 0, 0], [512, 1024, 0, 256], [1024, 512, 256, 0]]
    assert found[3].tolist() == [512, 674, 0, 81]
    # Float32 falls short of 512 for some sides, as in training.
    sides = np.arange(512, 3000).astype(np.float32)
    expected = (np.float32(512) / sides * sides).astype(int)
    assert set(expected.tolist()) == {511, 512}
    assert crop_values(torch.from_numpy(sides), torch.from_numpy(sides + 100))[:, 0].tolist() == expected.tolist()


def test_crop_condition_moves_logits(condition: Condition) -> None:
    for kind, moved in [("ar", True), ("ar-abspos", False)]:
        policy, given = make(kind), features()
        crop = torch.tensor([[512, 700, 0, 94]]).expand(3, -1)
        one, two = (forced(policy, policy.condition_from(f), drawn(policy)) for f in (given, {**given, "crop": crop}))
        assert (not torch.allclose(one, two, atol=1e-3)) == moved


@pytest.mark.parametrize("kind", ["ar-abspos", "nonar"])
def test_bf16_is_near_fp32(kind: str) -> None:
    policy = make(kind)
    with torch.no_grad():
        for parameter in policy.transformer.parameters():
            parameter.mul_(0.4)
        if policy.config.transformer.use_crop_cond:
            # Phases of crops lose their meaning in bf16, as in the published pipeline: leave them out.
            policy.transformer.crop_embed.weight.zero_()
    condition, actions = policy.condition_from(features()), drawn(policy)
    exact = forced(policy, condition, actions)
    policy.trainable.to(torch.bfloat16)
    found = forced(policy, condition, actions)
    assert policy.hidden(condition, actions, range(4)).dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().max() < 0.1 * exact.std()
    rollout = varl.rollout(policy, condition, Sampling(guidance=1.0), torch.Generator().manual_seed(0), logp=True)
    assert rollout.actions.shape == actions.shape


def test_generate_returns_pictures_only(policy: Switti, condition: Condition) -> None:
    def pictures(*smooth: Any) -> Tensor:
        sampling = Sampling(guidance=1.0, top_k=6)
        return policy.generate(condition, sampling, torch.Generator().manual_seed(0), *smooth)

    plain = pictures()
    assert plain.shape == (3, 3, 64, 64)
    assert 0 <= plain.min() < plain.max() <= 1
    assert torch.equal(plain, pictures(False, 0))
    assert torch.equal(plain, pictures(True, 4)), "no step is left to be smooth"
    assert not torch.allclose(plain, pictures(True, 0), atol=1e-3)


def test_soft_codes_are_not_truncated() -> None:
    policy = make()
    condition = policy.condition_from(features())
    one, two = (
        policy.generate(condition, Sampling(top_k=1), torch.Generator().manual_seed(seed), True) for seed in (0, 1)
    )
    assert not torch.allclose(one, two, atol=1e-3)


def test_soft_codes_end_with_guidance() -> None:
    policy = make(turn_off_cfg_start_si=1)
    condition = policy.condition_from(features())
    one, two = (
        policy.generate(condition, Sampling(), torch.Generator().manual_seed(0), True, start) for start in (1, 2)
    )
    assert torch.equal(one, two)
