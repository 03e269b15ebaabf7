"""Every family with adapters, in bf16, copied, checked and probed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from families import FAMILIES, Family, actions_of, assert_same, every, prepared, prompts, scored, shaken
from tiny_runs import score
from varl import Sampling, log_probs, rollout
from varl.adapters import WithoutAdapters, adapter_state, adapters_off, add_adapters, merged, save_adapters
from varl.config import (
    AdapterConfig,
)
from varl.doctor import check_policy
from varl.loading import frozen_copy
from varl.models import load_policy, save_policy
from varl.models.infinity.condition import TextEncoder
from varl.models.switti.condition import TextEncoders
from varl.models.tokenflow.condition import PromptReader
from varl.policy import Policy
from varl.probe import probe
from varl.rollout import row_generators

LORA = AdapterConfig(rank=2, alpha=4.0)


def adapted(policy: Policy, config: AdapterConfig = LORA) -> Policy:
    """With adapters of random values."""
    add_adapters(policy, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in adapter_state(policy).values():
            value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return policy


@pytest.mark.slow
@pytest.mark.numeric
@every
def test_every_linear_layer_can_have_an_adapter(family: Family) -> None:
    """None is bypassed: neither those that the family names nor any other."""
    pytest.importorskip("peft")
    policy = family.make()
    before, targets = scored(policy).detach(), policy.lora_targets
    layers = [name for name, module in policy.trainable.named_modules() if isinstance(module, nn.Linear)]
    adapted(policy, AdapterConfig(2, 4.0, tuple(layers)))
    second = {name: value for name, value in adapter_state(policy).items() if ".lora_B." in name}
    values = {name: value.clone() for name, value in second.items()}
    assert len(second) == len(layers)
    for name in layers:
        for other, value in second.items():
            value.copy_(values[other] * other.startswith(f"{name}.lora_B."))
        assert (scored(policy) - before).abs().max() > 1e-4, name
    for target in targets:
        assert any(name.endswith(f".{target}") for name in layers), target
    assert sum(name.endswith(tuple(f".{target}" for target in targets)) for name in layers) >= len(layers) / 2


@every
def test_adapters_on_and_off(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    plain = family.make()
    before = scored(plain)
    policy = prepared(family, monkeypatch, lora=LORA)
    assert_same(scored(policy), before)
    with torch.no_grad():
        for value in adapter_state(policy).values():
            value.add_(0.1)
    tuned = scored(policy)
    assert (tuned - before).abs().max() > 1e-2
    assert_same(scored(cast(Policy, WithoutAdapters(policy))), before)
    with adapters_off(policy):
        assert_same(scored(policy), before)
    assert_same(scored(policy), tuned)
    condition = plain.condition(prompts(2))
    drawn = [
        rollout(cast(Policy, model), condition, Sampling(guidance=1.0), row_generators((0,), 2)).actions
        for model in (plain, WithoutAdapters(policy))
    ]
    assert torch.equal(*drawn)
    tuned.sum().backward()
    for name, parameter in cast(nn.Module, policy).named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None) == (".lora_" in name), name


@every
def test_adapters_of_a_run_are_loaded(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    policy = adapted(family.make())
    save_adapters(policy, LORA, tmp_path / "adapters.safetensors")
    loaded = prepared(family, monkeypatch, adapters=str(tmp_path / "adapters.safetensors"))
    assert_same(scored(loaded), scored(policy))
    assert_same(scored(cast(Policy, WithoutAdapters(loaded))), scored(family.make()))
    assert not torch.allclose(scored(loaded), scored(family.make()), atol=1e-2)
    scored(loaded).sum().backward()
    for name, parameter in cast(nn.Module, loaded).named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None) == (".lora_" in name), name


@every
def test_merged_adapters_saved_and_loaded(family: Family, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    policy, names = family.make(), family.make().trainable.state_dict().keys()
    adapted(policy)
    tuned = scored(policy)
    before = {key: value.clone() for key, value in policy.trainable.state_dict().items()}
    with merged(policy):
        assert policy.trainable.state_dict().keys() == names
        save_policy(policy, tmp_path / "weights")
    after = policy.trainable.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert before.keys() == after.keys()
    assert_same(scored(policy), tuned)
    loaded = load_policy(policy.family, family.config, tmp_path / "weights")
    condition = policy.condition(prompts(3))
    found = log_probs(loaded, condition, actions_of(policy, 3, condition.schedule.tokens)).logp
    assert not torch.allclose(tuned, scored(family.make()), atol=1e-2)
    torch.testing.assert_close(found, tuned, atol=1e-4, rtol=1e-4)


@every
def test_bf16(family: Family) -> None:
    """Rollout, log-probabilities and their gradients under autocast: finite, and within 0.05 nats on average."""
    policy = family.make()
    condition = policy.condition(prompts(3))
    actions = actions_of(policy, 3, condition.schedule.tokens)
    exact = log_probs(policy, condition, actions).logp
    parameters = {name: p for name, p in policy.trainable.named_parameters() if name not in family.frozen}
    gradients = torch.autograd.grad(exact.mean(), list(parameters.values()))
    with torch.autocast("cpu", torch.bfloat16):
        drawn = rollout(policy, condition, Sampling(guidance=1.0), row_generators((0,), 3), logp=True)
        logp = log_probs(policy, condition, actions).logp
        logp.mean().backward()
    assert drawn.logp is not None
    assert drawn.logp.isfinite().all()
    assert logp.dtype == torch.float32
    assert 0 < (logp - exact).abs().mean() < 0.05
    assert (logp - exact).abs().max() < 0.5
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad - gradient).norm() <= 0.15 * gradient.norm() + 1e-4, name


@every
def test_a_frozen_copy(family: Family) -> None:
    policy = family.make()
    twin = frozen_copy(policy)
    expected = scored(policy).detach()
    assert_same(scored(twin), expected)
    assert not any(p.requires_grad for p in twin.trainable.parameters())
    shared = {p.data_ptr() for p in policy.trainable.parameters()} & {p.data_ptr() for p in twin.trainable.parameters()}
    assert not shared
    assert all(p.requires_grad for n, p in policy.trainable.named_parameters() if n not in family.frozen)
    shaken(policy, 0.1)
    assert_same(scored(twin), expected)
    assert cast(Any, twin).tokenizer is cast(Any, policy).tokenizer


def test_copies_share_the_text_encoders(tmp_path: Path) -> None:
    policies = {family.name: cast(Any, family.make()) for family in FAMILIES}
    policies["infinity"].text_encoder = TextEncoder(tmp_path)
    assert frozen_copy(policies["infinity"]).text_encoder is policies["infinity"].text_encoder
    policies["switti"].encoders = TextEncoders((tmp_path, tmp_path))
    assert frozen_copy(policies["switti"]).encoders is policies["switti"].encoders
    policies["tokenflow"]._reader = PromptReader(tmp_path, policies["tokenflow"].config.transformer)
    assert frozen_copy(policies["tokenflow"])._reader is policies["tokenflow"]._reader


@every
def test_the_doctor_finds_nothing(family: Family) -> None:
    checks = list(check_policy(family.make(), prompts(3)))
    assert [f"{check.name}: {check.found}" for check in checks if not check.fine] == []
    assert len(checks) == 6 + len(family.make().default_schedule) - 1


@pytest.mark.slow
@pytest.mark.numeric
@every
def test_a_probe(family: Family) -> None:
    policy = family.make()
    steps = len(policy.default_schedule)
    result = probe(policy, score, prompts(2), Sampling(top_p=0.95), prefixes=2, continuations=2)
    assert [report.step for report in result.steps] == list(range(1, steps + 1))
    assert result.pictures == 2 * 2 * 2 * (steps - 1)
    assert result.failed == 0
    assert all(math.isfinite(report.share) and report.entropy > 0 for report in result.steps)
    assert len({report.share for report in result.steps}) > 2
    apart = probe(policy, score, prompts(2), Sampling(top_p=0.95), prefixes=2, continuations=2, batch=1)
    for one, other in zip(result.steps, apart.steps, strict=True):
        assert (one.share, one.error, one.entropy) == pytest.approx((other.share, other.error, other.entropy), abs=1e-3)
