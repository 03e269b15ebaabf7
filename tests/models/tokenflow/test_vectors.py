"""Against the numbers of the published code, run on small random weights."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.tokenflow.cases import LM_CASES, TOKENIZER_CASES, Case, lm_policy, new_policy, prompts_of
from models.tokenflow.whole import allowed, whole_logits
from varl import Sampling
from varl.models.tokenflow import TokenFlow, model, refine
from varl.models.tokenflow.config import TokenizerConfig
from varl.models.tokenflow.refine import draw_refined
from varl.models.tokenflow.tokenizer import Tokenizer
from varl.models.weights import load_strict
from varl.sampling import filter_logits

ATOL = 5e-5
"""Measured differences are 3e-5 at most; the manifests allow 1e-3 for logits and 3e-4 for the tokenizer."""
FEATURES = 1e-5
"""Of features of codes, of size 2: resizing rounds otherwise on processors without AVX-512 (2e-6)."""
KERNELS = os.environ.get("ONEDNN_MAX_CPU_ISA"), torch.backends.cpu.get_cpu_capability()
SAME_SUMS = KERNELS == ("AVX512_CORE", "AVX512")
"""Whether bf16 products are summed in the order of the machine that made the vectors: with AVX-512, without AMX."""

every_lm = pytest.mark.parametrize("case", LM_CASES)
every_tokenizer = pytest.mark.parametrize("case", TOKENIZER_CASES)


def near(found: Tensor, expected: Tensor, atol: float = ATOL) -> None:
    torch.testing.assert_close(found.float(), expected.float(), atol=atol, rtol=0)


def settings(case: Case, name: str) -> list[Sampling]:
    """The passes of a generation; upstream's top-p 0 is our 1."""
    given = case.manifest["generation_settings"][name]
    pairs = zip(given["topk_list"], given["topp_list"], strict=True)
    return [Sampling(given["cfg"], top_k, top_p or 1.0) for top_k, top_p in pairs]


@every_tokenizer
@torch.no_grad()
def test_tokenizer(case: Case) -> None:
    tokenizer, t = Tokenizer(TokenizerConfig(**case.manifest["sizes"])), case.tensors
    load_strict(tokenizer, case.tokenizer_weights, "the case")
    semantic, pixel = tokenizer.quantize.split(tokenizer.features(t["images"]))
    near(tokenizer.encoder_vqkd(t["images"]), t["enc.semantic_tokens"])
    near(semantic.flatten(2).transpose(1, 2), t["enc.semantic_code_feat"])
    near(pixel, t["enc.pixel_feat"])
    actions = tokenizer.encode(t["images"] / 2 + 0.5)
    assert torch.equal(actions, t["enc.idx"].long())
    total = tokenizer.quantize.features(actions)
    near(total, t["enc.fhat"], FEATURES)
    near(tokenizer.picture(total), t["enc.recon_image"])

    codes = t["codes"].long()
    near(tokenizer.quantize.entries(codes[:1, :8])[0], t["dec.codebook_entries"], FEATURES)
    total = tokenizer.quantize.features(codes)
    near(total, t["dec.fhat"], FEATURES)
    near(tokenizer.picture(total), t["dec.image"])
    near(tokenizer.semantics(total), t["dec.semantic"])
    near(tokenizer.decode(codes), (t["dec.image"].clamp(-1, 1) + 1) / 2)
    early = codes[:, : tokenizer.schedule.offsets[-2]]
    near(tokenizer.picture(tokenizer.quantize.features(early)), t["dec.image_without_last_scale"])


@every_lm
@torch.no_grad()
def test_features_of_drawn_grids(case: Case) -> None:
    """From grid to grid; in refinement, with the codes of the grid itself."""
    policy, t = lm_policy(case), case.tensors
    quantize, codes, schedule = policy.tokenizer.quantize, t["in.codes"].long(), policy.default_schedule
    maps = quantize.inputs(codes, len(schedule))
    flat = torch.cat([m.flatten(2) for m in maps], 2).transpose(1, 2)
    near(flat, t["feat"], FEATURES)
    for place in range(2):
        refined = maps[place] + quantize.grid(codes[:, schedule.tokens_of(place + 1)], place + 1)
        own = slice(schedule.offsets[place + 1] - 1, schedule.offsets[place + 2] - 1)
        near(refined.flatten(2).transpose(1, 2), t[f"feat_cur{place}"][:, own], FEATURES)
    features = prompts_of(case)
    rows = policy.transformer.model.embed(features["prompt"], maps, range(len(schedule)))
    near(rows, t["tf.inputs_embeds"][:, : rows.shape[1]], FEATURES)


@every_lm
@torch.no_grad()
def test_teacher_forced_logits(case: Case) -> None:
    policy, t = lm_policy(case), case.tensors
    condition = policy.condition_from(prompts_of(case))
    logits = policy.logits(policy.hidden(condition, t["in.codes"].long(), range(len(condition.schedule))))
    first = condition.features["prompt"].shape[1] - 1
    start = policy.config.transformer.image_token_start
    expected = t["tf.logits"][:, first : first + logits.shape[1], start : start + policy.classes]
    near(logits, expected)


@every_lm
@torch.no_grad()
def test_the_whole_sequence_and_its_losses(case: Case) -> None:
    """The long way that other tests compare with is itself upstream's: all text rows, all classes, both losses."""
    policy, t = lm_policy(case), case.tensors
    ids, prompt = t["in.input_ids"].long(), len(t["in.neg_prefix"])
    valid = ids != policy.config.transformer.pad_token_id
    if "tf.mask_allowed" in t:
        sees = allowed(ids, prompt, list(policy.default_schedule.counts), policy.config.transformer.pad_token_id)
        assert torch.equal(sees[valid], t["tf.mask_allowed"].bool()[valid])
    logits = whole_logits(policy, ids, prompt)
    near(logits[valid], t["tf.logits"][valid])
    loss = {
        name: F.cross_entropy(logits[:, :-1].flatten(0, 1), t[labels][:, 1:].flatten().long(), ignore_index=-100)
        for name, labels in (("vision", "in.labels"), ("text", "in.text_labels"))
    }
    near(loss["vision"], t["tf.loss_vision"].squeeze())
    near(loss["text"], t["tf.loss_text"].squeeze())
    near(sum(loss.values()), t["tf.loss"].squeeze())


@every_lm
@torch.no_grad()
def test_guided_logits_from_the_cache(case: Case) -> None:
    policy, t = lm_policy(case), case.tensors
    condition, codes = policy.condition_from(prompts_of(case)), t["in.codes"].long()
    state = policy.start(condition, case.manifest["config"]["cfg"])
    for step in range(len(condition.schedule)):
        near(policy.next_logits(state), t[f"forced.cfg_logits.{step}"])
        policy.advance(state, codes[:, condition.schedule.tokens_of(step)])
    near(policy.tokenizer.picture(policy.tokenizer.quantize.features(codes)), t["decode_to_img"])


@every_lm
@pytest.mark.parametrize("name", ["greedy", "greedy_loop2"])
def test_greedy_generation(case: Case, name: str) -> None:
    policy, t = lm_policy(case), case.tensors
    condition = policy.condition_from(prompts_of(case))
    codes = draw_refined(policy, condition, settings(case, name))
    assert torch.equal(codes, t[f"{name}.codes"].long())
    near(policy.generate(condition, settings(case, name)), (t[f"{name}.image_float"].clamp(-1, 1) + 1) / 2)


@every_lm
@pytest.mark.parametrize("name", ["sample", "sample_loop3"])
def test_sampled_generation(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same survivors of truncation in every pass; with upstream's way of drawing, over all ids, the same draws."""
    policy, t = lm_policy(case), case.tensors
    lm = policy.config.transformer
    keys = [
        f"{step}.{turn}"
        for step in range(len(policy.default_schedule))
        for turn in range(len(settings(case, name)))
        if f"{name}.idx.{step}.{turn}" in t
    ]
    generator = torch.Generator().manual_seed(case.manifest["generation_settings"][name]["g_seed"])

    def multinomial(logits: Tensor, _: object) -> Tensor:
        key = keys.pop(0)
        after = lm.vocab_size - lm.image_token_start - policy.classes
        kept = F.pad(logits, (lm.image_token_start, after), value=-torch.inf)
        assert torch.equal(kept.isfinite(), t[f"{name}.kept.{key}"].bool())
        drawn = torch.multinomial(kept.softmax(-1).flatten(0, 1), 1, generator=generator).view(logits.shape[:2])
        assert torch.equal(drawn, t[f"{name}.idx.{key}"].long())
        return drawn - lm.image_token_start

    monkeypatch.setattr(refine, "draw", multinomial)
    codes = draw_refined(policy, policy.condition_from(prompts_of(case)), settings(case, name))
    assert torch.equal(codes, t[f"{name}.codes"].long())
    assert not keys


@torch.no_grad()
def bf16_logits(case: Case, policy: TokenFlow) -> Tensor:
    condition = policy.condition_from(prompts_of(case))
    hidden = policy.hidden(condition, case.tensors["in.codes"].long(), range(len(condition.schedule)))
    assert hidden.dtype == torch.bfloat16
    logits = policy.logits(hidden)
    assert logits.dtype == torch.float32
    return logits


def expected_rows(case: Case, policy: TokenFlow, name: str) -> Tensor:
    first, start = len(case.tensors["in.neg_prefix"]) - 1, policy.config.transformer.image_token_start
    rows = slice(first, first + policy.default_schedule.tokens)
    return case.tensors[name][:, rows, start : start + policy.classes]


@every_lm
def test_bf16_with_upstreams_rounding(case: Case) -> None:
    """Both parts cast: rounded where upstream rounds, unless told otherwise.

    Sums of products end in another last bit on another processor: on average 0.0002 (AMX) to 0.0032 (AVX2) away. One
    rounding too few, of the frequencies or in attention, is 0.012 away everywhere, and fp32 0.018.
    """
    policy = new_policy(case).to(torch.bfloat16)
    maps = policy.tokenizer.quantize.inputs(case.tensors["in.codes"].long(), len(policy.default_schedule))
    rows = policy.transformer.model.embed(prompts_of(case)["prompt"], maps, range(len(policy.default_schedule)))
    spread = case.manifest["bf16_vs_fp32_max_abs(valid)"]
    near(rows, case.tensors["bf16.inputs_embeds"][:, : rows.shape[1]], spread / 2)
    found, expected = bf16_logits(case, policy), expected_rows(case, policy, "bf16.logits").float()
    near(found, expected, spread)
    fp32 = expected_rows(case, policy, "tf.logits")
    assert (found - expected).abs().mean() < (fp32 - expected).abs().mean() / 2


@every_lm
@pytest.mark.skipif(not SAME_SUMS, reason="bf16 is summed as upstream's only under ONEDNN_MAX_CPU_ISA=AVX512_CORE")
def test_bf16_is_upstreams_to_the_bit_where_sums_are(case: Case) -> None:
    policy = new_policy(case).to(torch.bfloat16)
    found, expected = bf16_logits(case, policy), expected_rows(case, policy, "bf16.logits")
    assert torch.equal(found.bfloat16(), expected.bfloat16())


@every_lm
@torch.no_grad()
def test_autocast_rounds_nothing_as_upstream(case: Case) -> None:
    found = []
    for rounding in (True, False):
        policy = new_policy(case, upstream_rounding=rounding)
        condition = policy.condition_from(prompts_of(case))
        with torch.autocast("cpu", torch.bfloat16):
            found.append(policy.hidden(condition, case.tensors["in.codes"].long(), range(len(condition.schedule))))
    assert torch.equal(*found)


@every_lm
def test_fused_bf16_is_near_fp32(case: Case) -> None:
    """No further from fp32 than upstream in bf16 is, on average."""
    policy = new_policy(case, upstream_rounding=False)
    policy.trainable.to(torch.bfloat16)
    fp32, bf16 = (expected_rows(case, policy, name) for name in ("tf.logits", "bf16.logits"))
    found = bf16_logits(case, policy)
    assert found.isfinite().all()
    assert (found - fp32).abs().mean() < 1.2 * (bf16 - fp32).abs().mean()


@every_lm
@torch.no_grad()
def test_attention_as_upstream_rounds_it_from_a_cache(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_attend", model._attend_rounding)
    policy, t = new_policy(case), case.tensors
    state = policy.start(policy.condition_from(prompts_of(case)), case.manifest["config"]["cfg"])
    for step in range(len(state.schedule)):
        near(filter_logits(policy.next_logits(state), Sampling()), t[f"forced.cfg_logits.{step}"])
        policy.advance(state, t["in.codes"].long()[:, state.schedule.tokens_of(step)])
