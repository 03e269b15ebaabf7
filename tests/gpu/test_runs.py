"""Whole runs of a tiny Inkling on the device: to the end, stopped and gone on with, also on another device."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_runs
from gpu.measuring import Report, difference
from gpu.pairs import Pair, every
from test_trainer import assert_same, make_config, metrics, run_until, weights_of
from varl import Sampling, log_probs, rollout
from varl.config import AdapterConfig, EvaluationConfig, TrainConfig
from varl.loading import compute_alike
from varl.models import load_policy
from varl.rollout import row_generators
from varl.run.metrics import read_metrics
from varl.run.state import collected
from varl.trainer import Trainer

NOT_EXACT = "operators that are not exact"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.tiny_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture
def _alike() -> Iterator[None]:
    """Deterministic operators, and afterwards the others again."""
    cuda, kinds, name = torch.backends.cuda, ("flash", "mem_efficient", "cudnn"), "CUBLAS_WORKSPACE_CONFIG"
    before, workspace = [getattr(cuda, f"{kind}_sdp_enabled")() for kind in kinds], os.environ.get(name)
    compute_alike()
    yield
    torch.use_deterministic_algorithms(False)
    for kind, on in zip(kinds, before, strict=True):
        getattr(cuda, f"enable_{kind}_sdp")(on)
    if workspace is None:
        os.environ.pop(name, None)


def config(weights: Path, out: Path, device: torch.device, **changes: Any) -> TrainConfig:
    """Four updates; ``changes`` are of the method, but for ``policy`` and ``run``."""
    run = {"device": str(device), "ema": 0.5, "updates": 4, "save_every": 2, **changes.pop("run", {})}
    policy = changes.pop("policy", {})
    made = make_config(weights, out, run=run, prefix_updates=1, **changes)
    evaluation = EvaluationConfig(count=5, enabled=not (policy or changes))
    return replace(made, evaluation=evaluation, policy=replace(made.policy, **policy), sampling=Sampling(1.0, 0, 0.95))


WAYS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16, two epochs": {
        "policy": {"precision": "bfloat16", "checkpointing": True},
        "prompts": 2,
        "group": 2,
        "epochs": 2,
        "value": "soft-reference",
        "logp": "sampling",
    },
    "adapters, reused": {
        "policy": {"lora": AdapterConfig(rank=2)},
        "suffix_state": "reused",
        "beta": 0.1,
        "kl": "exact",
    },
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("_alike")
def test_a_stopped_run_goes_on_to_the_same_bits(
    way: str, weights: Path, tmp_path: Path, device: torch.device, report: Report
) -> None:
    """With ``run.deterministic``; operators that warn that they are not exact are named in the report."""
    options = WAYS[way] | {"run": {"deterministic": True}}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        whole = Trainer(config(weights, tmp_path / "whole", device, **options))
        whole.run()
        run_until(Trainer(config(weights, tmp_path / "stopped", device, **options)), 3)
        torch.manual_seed(1)  # a run seeds the global generators, or brings back their state
        second = Trainer(config(weights, tmp_path / "stopped", device, **options))
        second.run()
    named = report.facts.setdefault(NOT_EXACT, [])
    named += sorted({str(w.message)[:120] for w in said if "determinis" in str(w.message)} - {*named})
    assert whole.policy.trainable.state_dict()["first"].device.type == device.type
    lines = metrics(tmp_path / "whole")
    assert [line["update"] for line in lines] == [1, 2, 3, 4]
    assert all(line["not_finite"] == 0 and line["skipped"] == 0 for line in lines)
    report.facts[f"loss by update, {way}"] = [line["loss"] for line in lines]
    assert_same(metrics(tmp_path / "stopped"), lines)
    assert_same(weights_of(second), weights_of(whole))
    assert_same(collected(second), collected(whole))
    finished = load_policy("inkling", weights=tmp_path / "stopped" / "weights.safetensors")
    assert finished.trainable.state_dict().keys()


def test_a_run_moves_what_it_trains(weights: Path, tmp_path: Path, device: torch.device, report: Report) -> None:
    trainer = Trainer(config(weights, tmp_path / "run", device, run={"updates": 4, "micro_batch": "auto"}))
    before = weights_of(trainer)
    trainer.run()
    after = weights_of(trainer)
    assert all(value.device.type == device.type for value in after.values())
    assert sum(not torch.equal(after[name], before[name]) for name in before) > len(before) / 2
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"checkpoints", "config.yaml", "metrics.jsonl", "weights.safetensors"} <= left
    seconds = [line["seconds"] for line in read_metrics(tmp_path / "run")]
    report.facts["seconds of the last update by stage"] = seconds[-1]
    assert {"rollout", "decode", "reward", "logp", "backward", "optimizer"} <= seconds[-1].keys()
    assert all(value >= 0 for value in seconds[-1].values())


@pytest.mark.parametrize("way", ["fp32", "adapters, reused"])
@pytest.mark.parametrize("home", [True, False], ids=["written on the device", "written on the CPU"])
def test_a_run_goes_on_on_another_device(
    way: str, home: bool, weights: Path, tmp_path: Path, device: torch.device, report: Report
) -> None:
    """The checkpoint's numbers are the same there, on that device, and training goes on."""
    places = [device, torch.device("cpu")][:: 1 if home else -1]
    options = WAYS[way] | {"run": {"updates": 1, "save_every": 1}}
    first = Trainer(config(weights, tmp_path / "run", places[0], **options))
    first.run()
    options = WAYS[way] | {"run": {"updates": 3, "save_every": 1}}
    second = Trainer(config(weights, tmp_path / "run", places[1], **options))
    assert second.update == 1
    before, after = collected(first)[0], collected(second)[0]
    shared = before.keys() & after.keys()
    assert {name for name in before.keys() ^ after.keys() if not name.endswith(".cuda")} == set()
    for name in shared:
        assert torch.equal(before[name].cpu(), after[name].cpu()), name
    for state in second.learner.optimizers[""].state.values():
        assert all(value.device.type == places[1].type for value in state.values())
    second.run()
    lines = metrics(tmp_path / "run")
    assert [line["update"] for line in lines] == [1, 2, 3]
    assert all(line["not_finite"] == 0 for line in lines)
    report.facts[f"loss by update, {way}, resumed on {places[1].type}"] = [line["loss"] for line in lines]


@every
@pytest.mark.usefixtures("_alike")
def test_gradients_and_draws_are_the_same_bits_twice(pair: Pair, report: Report) -> None:
    """Of every family, with deterministic operators; those that warn are named in the report."""
    policy, found = pair.made(pair.device), []
    actions = pair.actions(3).to(pair.device)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            policy.trainable.zero_grad()
            condition = policy.condition(pair.prompts(3))
            with torch.autocast(pair.device.type, torch.bfloat16):
                log_probs(policy, condition, actions).logp.mean().backward()
                own = row_generators((0,), 3, pair.device)
                drawn = rollout(policy, condition, Sampling(1.0, 0, 0.9), own, logp=True)
            gradients = {n: p.grad for n, p in policy.trainable.named_parameters() if p.grad is not None}
            found.append({"actions": drawn.actions, "logp": drawn.logp, **gradients})
    named = report.facts.setdefault(NOT_EXACT, [])
    named += sorted({str(w.message)[:120] for w in said if "determinis" in str(w.message)} - {*named})
    assert found[0].keys() == found[1].keys()
    other = [name for name, value in found[0].items() if not torch.equal(value, found[1][name])]
    assert not other, {name: difference(found[1][name], found[0][name]) for name in other}
