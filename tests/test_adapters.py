"""LoRA adapters: they change nothing at first, train alone, and the weights without them are the reference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from families import assert_same
from small import make_inkling, make_prompts
from tiny_runs import TINY, tiny_weights
from varl import log_probs, rollout
from varl.adapters import (
    WithoutAdapters,
    adapter_state,
    adapters_off,
    add_adapters,
    load_adapters,
    merged,
    read_adapters,
    save_adapters,
    with_adapters,
)
from varl.config import (
    AdapterConfig,
    EvaluationConfig,
    MethodConfig,
    OptimizerConfig,
    PolicyConfig,
    PromptConfig,
    RunConfig,
    TrainConfig,
)
from varl.loading import prepare
from varl.models import load_policy, save_policy
from varl.policy import Policy
from varl.rollout import row_generators
from varl.trainer import Trainer

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
    assert_same(scores(policy), scores(plain))


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
    assert_same(scores(reference), scores(plain))
    with adapters_off(policy):
        assert_same(scores(policy), scores(plain))
    assert_same(scores(policy), tuned)
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
    assert_same(scores(other), tuned)
    with pytest.raises(FileNotFoundError, match="no adapters at"):
        load_adapters(make_inkling(), tmp_path / "gone.safetensors")
    save_policy(make_inkling(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="holds no adapters of inkling"):
        load_adapters(make_inkling(), tmp_path / "weights.safetensors")


def saved(folder: Path, config: AdapterConfig = CONFIG) -> tuple[Path, Policy]:
    """Adapters on disk, and the policy that they are of."""
    policy = make_inkling(config=TINY)
    policy.load_state_dict(load_policy("inkling", None, tiny_weights(folder / "base.safetensors")).state_dict())
    add_adapters(policy, config)
    moved(policy)
    save_adapters(policy, config, folder / "adapters.safetensors")
    return folder / "adapters.safetensors", policy


def config_of(folder: Path, **policy: Any) -> PolicyConfig:
    return PolicyConfig(
        weights=str(folder / "base.safetensors"), adapters=str(folder / "adapters.safetensors"), **policy
    )


def test_a_configuration_takes_its_adapters(tmp_path: Path) -> None:
    _, policy = saved(tmp_path)
    config = config_of(tmp_path)
    targets = ("qkv", "out", "up", "down")
    assert with_adapters(config) == replace(config, lora=AdapterConfig(4, 8.0, targets))
    assert with_adapters(with_adapters(config)) == with_adapters(config)
    assert with_adapters(config_of(tmp_path, lora=CONFIG)) == with_adapters(config)
    assert with_adapters(PolicyConfig()) == PolicyConfig()
    for other in (AdapterConfig(8, 8.0), AdapterConfig(4), AdapterConfig(4, 8.0, ("qkv",))):
        with pytest.raises(
            ValueError, match=r"policy.lora asks for rank .* holds some of rank 4 and alpha 8 on qkv, out"
        ):
            with_adapters(config_of(tmp_path, lora=other))
    prepared = prepare(config, torch.device("cpu"))
    assert_same(scores(prepared), scores(policy))
    assert_same(scores(WithoutAdapters(prepared)), scores(WithoutAdapters(policy)))
    assert {name for name, p in prepared.trainable.named_parameters() if p.requires_grad} == adapter_state(
        policy
    ).keys()


def test_training_goes_on_from_adapters(tmp_path: Path) -> None:
    """With their numbers and their settings; what the KL is to is the policy without them."""
    _, policy = saved(tmp_path)
    config = TrainConfig(
        policy=config_of(tmp_path),
        prompts=PromptConfig(count=8),
        reward="tiny_runs:score",
        method=MethodConfig(prompts=2, group=2, beta=0.1),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_updates=0),
        evaluation=EvaluationConfig(enabled=False),
        run=RunConfig(out=tmp_path / "run", updates=1, device="cpu", gallery_every=0, diagnose_every=0),
    )
    trainer = Trainer(config)
    assert_same(scores(trainer.policy), scores(policy))
    assert trainer.reference is not None
    assert_same(scores(trainer.reference), scores(WithoutAdapters(policy)))
    records: list[dict[str, Any]] = []
    trainer.run(records.append)
    assert min(records[0]["kl_by_step"]) > 0
    written = prepare(
        replace(config.policy, adapters=str(tmp_path / "run" / "adapters.safetensors")), torch.device("cpu")
    )
    assert_same(scores(written), scores(trainer.policy))
    assert not torch.allclose(scores(written), scores(policy), atol=1e-3)
    again = Trainer(replace(config, run=replace(config.run, updates=2)))
    assert again.update == 1
    assert_same(scores(again.policy), scores(written))


def test_files_that_hold_no_adapters(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    with pytest.raises(ValueError, match="holds no adapters of var but of inkling"):
        read_adapters(path, "var")
    (tmp_path / "torn.safetensors").write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"torn.safetensors is not a whole safetensors file"):
        read_adapters(tmp_path / "torn.safetensors", "inkling")
    for about in ("[]", "{", '{"rank": 4}', '{"rank": -4, "alpha": 1, "targets": []}'):
        save_file({"x": torch.zeros(1)}, tmp_path / "odd.safetensors", metadata={"family": "inkling", "lora": about})
        with pytest.raises(ValueError, match=r"odd.safetensors does not say what adapters it holds"):
            read_adapters(tmp_path / "odd.safetensors", "inkling")
    state = {key: value[:1] for key, value in adapter_state(make_adapted()).items()}
    about = json.dumps({"rank": 4, "alpha": 8.0, "targets": ["qkv", "out", "up", "down"]})
    save_file(state, tmp_path / "odd.safetensors", metadata={"family": "inkling", "lora": about})
    with pytest.raises(ValueError, match=r"weights of .*odd.safetensors do not fit: 16 shapes differ"):
        load_adapters(make_inkling(), tmp_path / "odd.safetensors")


def described(folder: Path, state: dict[str, torch.Tensor], **about: Any) -> Path:
    path = folder / "odd.safetensors"
    whole = {"rank": 4, "alpha": 8.0, "targets": ["qkv", "out", "up", "down"]} | about
    save_file(state, path, metadata={"family": "inkling", "lora": json.dumps(whole)})
    return path


CLAIMS: dict[str, tuple[dict[str, Any], str]] = {
    "a rank that no tensor has": ({"rank": 1_000_000}, "keys are missing|shapes differ"),
    "a rank that no adapter has": ({"rank": 2_000_000}, "rank must be from 0 to 1000000, got 2000000"),
    "a rank of true": ({"rank": True}, "rank must be a whole number"),
    "no finite alpha": ({"alpha": float("inf")}, "alpha must be positive and finite"),
    "targets without end": ({"targets": [f"x{i}" for i in range(100_000)]}, "100000 targets are named for adapters"),
    "targets that are not there": ({"targets": ["q_proj\x1b[31m"]}, "no linear layer is called 'q_proj'"),
    "targets that are no list": ({"targets": "qkv"}, "targets must be a list"),
}


@pytest.mark.parametrize("case", CLAIMS)
def test_claims_are_held_against_the_tensors_before_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr("varl.adapters.add_adapters", lambda *_: pytest.fail("memory would be taken"))
    claim, message = CLAIMS[case]
    for state in ({"x": torch.zeros(2_000_000, 0)}, adapter_state(make_adapted())):
        path = described(tmp_path, state, **claim)
        with pytest.raises(ValueError, match=message) as refused:
            load_adapters(make_inkling(), path)
        assert str(path) in str(refused.value)
        assert str(refused.value).isprintable()


def test_adapters_that_are_no_numbers_are_refused_by_name(tmp_path: Path) -> None:
    for value, message in ((float("nan"), "NaN or infinity"), (torch.int8, "int8")):
        state = {key: tensor.clone() for key, tensor in adapter_state(make_adapted()).items()}
        key = sorted(state)[0]
        state[key] = state[key].to(value) if isinstance(value, torch.dtype) else state[key].fill_(value)
        with pytest.raises(ValueError, match=message) as refused:
            load_adapters(make_inkling(), described(tmp_path, state))
        assert key in str(refused.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_ddp_and_compile_are_taken_off(tmp_path: Path, prefix: str) -> None:
    policy = moved(make_adapted())
    state = {prefix + key: value.contiguous() for key, value in adapter_state(policy).items()}
    about = {"rank": CONFIG.rank, "alpha": CONFIG.alpha}
    other = make_inkling()
    load_adapters(other, described(tmp_path, state, **about))
    assert_same(scores(other), scores(policy))


def make_adapted() -> Policy:
    policy = make_inkling()
    add_adapters(policy, CONFIG)
    return policy


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"no linear layer is called 'q_proj'; there are .*qkv"):
        add_adapters(make_inkling(), AdapterConfig(rank=4, targets=("q_proj",)))
