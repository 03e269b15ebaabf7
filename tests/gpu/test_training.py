"""What training adds to a policy, on the device: adapters, checkpointing, compiled blocks, averages, a frozen copy."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import varl.loading
from families import shaken
from gpu.measuring import Report, difference, differences
from gpu.pairs import Pair, every, make_pair
from varl import log_probs, rollout
from varl.adapters import (
    WithoutAdapters,
    adapter_state,
    add_adapters,
    load_adapters,
    merged,
    save_adapters,
)
from varl.config import AdapterConfig, PolicyConfig
from varl.ema import Average
from varl.loading import frozen_copy, prepare
from varl.models import save_policy
from varl.policy import Policy
from varl.rollout import row_generators

CPU = torch.device("cpu")
LORA = AdapterConfig(rank=2, alpha=4.0)


def prepared(pair: Pair, device: torch.device, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Policy:
    """The policy as a run has it on a device."""
    monkeypatch.setattr(varl.loading, "load_policy", lambda *_: pair.make())
    return prepare(PolicyConfig(pair.cpu.family, **options), device)


def scored(policy: Policy, pair: Pair, device: torch.device, backward: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities of fixed actions, weighed and differentiated."""
    actions = pair.actions(3).to(device)
    logp = log_probs(policy, policy.condition(pair.prompts(3)), actions).logp
    policy.trainable.zero_grad()
    if backward:
        weight = torch.randn(logp.shape, generator=torch.Generator().manual_seed(1)).to(device)
        (logp * weight).sum().backward()
    return logp.detach(), {n: p.grad.clone() for n, p in policy.trainable.named_parameters() if p.grad is not None}


def adapted(pair: Pair, device: torch.device) -> Policy:
    """With adapters that change something, the same on any device."""
    pytest.importorskip("peft")
    policy = pair.made(device)
    add_adapters(policy, LORA)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in adapter_state(policy).values():
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    return policy


@every
def test_adapters(pair: Pair, tmp_path: Path, report: Report) -> None:
    """Scores, gradients, the policy without them, merged weights; and saved here, loaded there."""
    cpu, there = (adapted(pair, place) for place in (CPU, pair.device))
    assert all(value.device == pair.device for value in adapter_state(there).values())
    (wanted, gradients), (found, own) = scored(cpu, pair, CPU), scored(there, pair, pair.device)
    assert gradients.keys() == adapter_state(cpu).keys()
    report.near(f"{pair.name}: scores with adapters", found, wanted, 1e-4)
    report.within(f"{pair.name}: gradients of adapters", differences(own, gradients), 1e-4)
    plain = scored(pair.there, pair, pair.device, False)[0]
    assert difference(found, plain) > 1e-3
    without = cast(Policy, WithoutAdapters(there))
    report.near(f"{pair.name}: scores without adapters", scored(without, pair, pair.device, False)[0], plain, 1e-5)
    with merged(there):
        report.near(f"{pair.name}: scores merged", scored(there, pair, pair.device, False)[0], found, 1e-4)
    save_adapters(there, LORA, tmp_path / "adapters.safetensors")
    for place, expected in ((CPU, wanted), (pair.device, found)):
        loaded = pair.made(place)
        load_adapters(loaded, tmp_path / "adapters.safetensors")
        report.near(f"{pair.name}: scores of loaded adapters", scored(loaded, pair, place, False)[0], expected, 1e-5)


@every
def test_weights_saved_on_the_device_load_on_the_cpu(pair: Pair, tmp_path: Path) -> None:
    policy = shaken(pair.made(CPU), 0.1).to(pair.device)  # type: ignore[attr-defined]
    save_policy(policy, tmp_path / "weights.safetensors")
    found = load_file(tmp_path / "weights.safetensors")
    state = policy.trainable.state_dict()
    held = {name: value for name, value in found.items() if name in state}
    held = held or {name.removeprefix("transformer."): value for name, value in found.items()}
    assert state.keys() <= held.keys()
    assert all(torch.equal(held[name], value.cpu()) for name, value in state.items())


@every
def test_checkpointing_gives_the_same_gradients(pair: Pair, monkeypatch: pytest.MonkeyPatch, report: Report) -> None:
    plain = scored(prepared(pair, pair.device, monkeypatch), pair, pair.device)
    found = scored(prepared(pair, pair.device, monkeypatch, checkpointing=True), pair, pair.device)
    report.near(f"{pair.name}: scores, checkpointing", found[0], plain[0], 1e-6)
    report.within(f"{pair.name}: gradients, checkpointing", differences(found[1], plain[1]), 1e-5)


@every
def test_a_frozen_copy_and_an_average(pair: Pair, monkeypatch: pytest.MonkeyPatch, report: Report) -> None:
    policy = prepared(pair, pair.device, monkeypatch)
    copy, average = frozen_copy(policy), Average(policy.trainable, 0.75)
    before = {name: value.clone() for name, value in policy.trainable.state_dict().items()}
    with torch.no_grad():
        for parameter in policy.trainable.parameters():
            parameter.mul_(1.1)
    for name, value in copy.trainable.state_dict().items():
        assert value.device == pair.device
        assert torch.equal(value, before[name]), name
    assert not any(parameter.requires_grad for parameter in copy.trainable.parameters())
    assert cast(Any, copy).tokenizer is cast(Any, policy).tokenizer
    report.near(
        f"{pair.name}: scores of a frozen copy",
        scored(copy, pair, pair.device, False)[0],
        scored(pair.cpu, pair, CPU, False)[0],
        1e-4,
    )
    average.update()
    now = {name: p.detach().clone() for name, p in policy.trainable.named_parameters() if p.requires_grad}
    with average.applied():
        for name, value in now.items():
            expected = 0.75 * before[name] + 0.25 * value
            torch.testing.assert_close(policy.trainable.get_parameter(name).detach(), expected, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(policy.trainable.get_parameter(name), value) for name, value in now.items())


def test_compiled_blocks(device: torch.device, monkeypatch: pytest.MonkeyPatch, report: Report) -> None:
    """By torch's own compiler: the graphs of draws, and of scores with gradients."""
    compilers = ("g++",) if device.type == "cpu" else ("cc", "gcc", "clang")
    if not any(shutil.which(name) for name in compilers):
        pytest.skip(f"torch compiles with the help of {' or '.join(compilers)}, and there is none")
    pair = make_pair("inkling", device)
    torch.compiler.reset()
    plain, compiled = (prepared(pair, device, monkeypatch, compile=on) for on in (False, True))
    assert sum(m._compiled_call_impl is not None for m in cast(nn.Module, compiled).modules()) == 2
    seconds = time.perf_counter()
    own, gradients = scored(compiled, pair, device)
    condition = compiled.condition(pair.prompts(3))
    drawn = rollout(compiled, condition, None, row_generators((0,), 3, device), until=3).actions
    report.facts["seconds to compile"] = time.perf_counter() - seconds
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    wanted, expected = scored(plain, pair, device)
    report.near("compiled: scores", own, wanted, 1e-4)
    report.within("compiled: gradients", differences(gradients, expected), 1e-4)
    same = rollout(plain, condition, None, row_generators((0,), 3, device), until=3).actions
    report.within("compiled: draws", float((drawn != same).double().mean()), 0.1)
    torch.compiler.reset()
