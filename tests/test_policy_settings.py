"""Whole runs with adapters, in bf16, with checkpointing: only what should move moves, and what is left loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from small import make_prompts
from test_trainer import make_config, metrics
from tiny_runs import tiny_weights
from varl.adapters import adapter_state, load_adapters
from varl.config import AdapterConfig, PolicyConfig, TrainConfig
from varl.loading import frozen_copy, prepare
from varl.models import load_policy
from varl.models.blocks import blocks_of
from varl.rollout import rollout, row_generators
from varl.scoring import log_probs
from varl.trainer import Trainer


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return tiny_weights(tmp_path / "tiny.safetensors")


def configured(weights: Path, out: Path, update: str = "alternate", **policy: Any) -> TrainConfig:
    config = make_config(weights, out, update=update)
    return replace(config, policy=replace(config.policy, **policy))


@pytest.mark.slow
@pytest.mark.numeric
@pytest.mark.parametrize("kind", ["full", "prefix", "suffix"])
def test_a_run_with_adapters(weights: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("peft")
    config = configured(weights, tmp_path / "run", kind, lora=AdapterConfig(rank=2, alpha=4.0))
    trainer = Trainer(config)
    before = {key: value.clone() for key, value in trainer.policy.trainable.state_dict().items()}
    trainer.run()
    moved = {key for key, value in trainer.policy.trainable.state_dict().items() if not torch.equal(value, before[key])}
    assert moved
    assert moved <= set(adapter_state(trainer.policy))
    assert metrics(tmp_path / "run")[-1]["kl_by_step"][-1] > 0

    base = load_policy("inkling", weights=weights)
    load_adapters(base, tmp_path / "run" / "adapters.safetensors")
    for key, value in adapter_state(trainer.policy).items():
        assert torch.equal(adapter_state(base)[key], value)
    finished = load_policy("inkling", weights=tmp_path / "run" / "weights.safetensors")
    original = load_policy("inkling", weights=weights).trainable.state_dict()
    changed = {key for key, value in finished.trainable.state_dict().items() if not torch.equal(value, original[key])}
    assert changed
    assert all(key.split(".")[-2] in finished.lora_targets for key in changed)


@pytest.mark.slow
def test_a_run_with_adapters_goes_on_to_the_same_numbers(weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lora = AdapterConfig(rank=2, alpha=4.0)
    whole = configured(weights, tmp_path / "whole", lora=lora)
    Trainer(whole).run()
    part = configured(weights, tmp_path / "part", lora=lora)
    Trainer(replace(part, run=replace(part.run, updates=3))).run()
    trainer = Trainer(part)
    trainer.run()
    assert metrics(tmp_path / "part")[-1] == metrics(tmp_path / "whole")[-1]
    checkpoint = trainer.folder.checkpoints.latest()
    assert checkpoint is not None
    assert all(".lora_" in name for name in checkpoint.names() if name.startswith("policy."))


def test_a_run_in_bf16_is_near_one_in_fp32(weights: Path, tmp_path: Path) -> None:
    lines = {}
    for precision in ("float32", "bfloat16"):
        config = configured(weights, tmp_path / precision, "full", precision=precision)
        trainer = Trainer(config)
        assert all(p.dtype == torch.float32 for p in trainer.policy.trainable.parameters())
        record = trainer.step()
        lines[precision] = record
        assert record["skipped"] == 0
    # Of the same draws up to rounding: entropies agree to bf16's two digits, and are not the same numbers.
    exact, rounded = (torch.tensor(lines[p]["entropy_by_step"]) for p in ("float32", "bfloat16"))
    assert torch.allclose(exact[:1], rounded[:1], rtol=0.03)
    assert not torch.equal(exact, rounded)


def test_checkpointing_gives_the_same_numbers_with_fewer_saved_tensors(weights: Path, tmp_path: Path) -> None:
    found = {}
    for checkpointing in (False, True):
        trainer = Trainer(configured(weights, tmp_path / str(checkpointing), "full", checkpointing=checkpointing))
        condition = trainer.policy.condition(trainer.stream.prompts[:2])
        actions = torch.zeros(2, condition.schedule.tokens, dtype=torch.long)
        saved = 0

        def pack(value: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += value.numel()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            trainer.policy.hidden(condition, actions, range(len(condition.schedule))).sum()
        torch.manual_seed(0)
        found[checkpointing] = (saved, trainer.step())
    assert found[True][0] < 0.5 * found[False][0]
    plain, again = ({k: v for k, v in record.items() if k != "seconds"} for _, record in found.values())
    assert plain == again


@pytest.mark.slow
def test_compiled_blocks_are_equal(weights: Path) -> None:
    """Drawing, scoring and gradients, with a prefix that is shared."""
    plain, compiled = (
        prepare(PolicyConfig(weights=str(weights), compile=on), torch.device("cpu")) for on in (False, True)
    )
    for policy, on in ((plain, False), (compiled, True), (frozen_copy(plain), False), (frozen_copy(compiled), True)):
        assert {block._compiled_call_impl is not None for block in blocks_of(policy.trainable)} == {on}
    condition = plain.condition(make_prompts(1)).repeat(2)
    actions, found = [], []
    for policy in (plain, compiled):
        actions.append(rollout(policy, condition, None, row_generators((0,), 2)).actions)
        shared = actions[0].clone()
        shared[1, :14] = shared[0, :14]
        logp = log_probs(policy, condition, shared, range(3, 5), shared=2).logp
        logp.sum().backward()
        found.append([logp, *(p.grad for p in policy.trainable.parameters() if p.grad is not None)])
    assert torch.equal(*actions)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
