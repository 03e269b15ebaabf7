"""LoRA adapters: they change nothing at first, train alone, and the weights without them are the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from small import make_inkling, make_prompts
from varl import log_probs, rollout
from varl.adapters import (
    WithoutAdapters,
    adapter_state,
    adapters_off,
    add_adapters,
    load_adapters,
    merged,
    save_adapters,
)
from varl.config import AdapterConfig
from varl.models import load_policy, save_policy
from varl.policy import Policy
from varl.rollout import row_generators

pytest.importorskip("peft")
CONFIG = AdapterConfig(rank=4, alpha=8.0)


def scores(policy: Policy) -> torch.Tensor:
    condition = policy.condition(make_prompts(3))
    actions = torch.randint(policy.classes, (3, condition.schedule.tokens), generator=torch.Generator().manual_seed(0))
    return log_probs(policy, condition, actions).logp


def moved(policy: Policy) -> Policy:
    """With adapters that change something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in adapter_state(policy).values():
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    return policy


def test_new_adapters_change_nothing() -> None:
    plain, policy = make_inkling(), make_inkling()
    add_adapters(policy, CONFIG)
    assert torch.equal(scores(plain), scores(policy))


def test_every_target_has_an_adapter_that_works() -> None:
    for target in make_inkling().lora_targets:
        policy = make_inkling()
        before = scores(policy).detach()
        add_adapters(policy, AdapterConfig(rank=4, alpha=8.0, targets=(target,)))
        assert (scores(moved(policy)) - before).abs().max() > 1e-3


def test_only_adapters_are_trained() -> None:
    policy = make_inkling()
    add_adapters(policy, CONFIG)
    scores(moved(policy)).sum().backward()
    for name, parameter in policy.trainable.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
        assert (parameter.grad is not None) == (".lora_" in name)
    assert all(p.grad.abs().sum() > 0 for p in policy.trainable.parameters() if p.requires_grad)


def test_without_adapters_it_is_the_old_policy() -> None:
    plain, policy = make_inkling(), make_inkling()
    add_adapters(policy, CONFIG)
    tuned = scores(moved(policy))
    reference = WithoutAdapters(policy)
    assert not torch.allclose(tuned, scores(plain), atol=1e-3)
    assert torch.equal(scores(reference), scores(plain))
    with adapters_off(policy):
        assert torch.equal(scores(policy), scores(plain))
    assert torch.equal(scores(policy), tuned)
    assert all(p.requires_grad for name, p in policy.trainable.named_parameters() if ".lora_" in name)

    condition = plain.condition(make_prompts(3))
    drawn = rollout(reference, condition, None, row_generators((0,), 3))
    assert torch.equal(drawn.actions, rollout(plain, condition, None, row_generators((0,), 3)).actions)


def test_a_reference_pass_between_forward_and_backward_keeps_the_gradient() -> None:
    gradients = []
    for between in (False, True):
        policy = make_inkling()
        add_adapters(policy, CONFIG)
        loss = scores(moved(policy)).sum()
        if between:
            scores(WithoutAdapters(policy))
        loss.backward()
        gradients.append([p.grad for p in policy.trainable.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_merging_and_back(tmp_path: Path) -> None:
    policy = make_inkling()
    names = list(policy.state_dict())
    add_adapters(policy, CONFIG)
    tuned = scores(moved(policy)).detach()
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    with merged(policy):
        assert list(policy.state_dict()) == names
        assert torch.allclose(scores(policy), tuned, atol=1e-4)
        save_policy(policy, tmp_path / "weights.safetensors")
    after = policy.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.allclose(scores(load_policy("inkling", None, tmp_path / "weights.safetensors")), tuned, atol=1e-4)


def test_adapters_travel_by_themselves(tmp_path: Path) -> None:
    policy = make_inkling()
    add_adapters(policy, CONFIG)
    tuned = scores(moved(policy))
    save_adapters(policy, CONFIG, tmp_path / "adapters.safetensors")
    other = make_inkling()
    load_adapters(other, tmp_path / "adapters.safetensors")
    assert torch.equal(scores(other), tuned)
    with pytest.raises(FileNotFoundError, match="no adapters at"):
        load_adapters(make_inkling(), tmp_path / "gone.safetensors")
    save_policy(make_inkling(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="holds no adapters of inkling"):
        load_adapters(make_inkling(), tmp_path / "weights.safetensors")


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"no linear layer is called 'q_proj'; there are .*qkv"):
        add_adapters(make_inkling(), AdapterConfig(rank=4, targets=("q_proj",)))
