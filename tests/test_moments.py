"""AdamW's moments of each segment: neither carries on nor scales the other's gradients."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bits import Bits
from learning import batch, learner, stage
from test_trainer import assert_same, make_config, metrics, run_until, weights_of
from varl.config import MethodConfig, OptimizerConfig
from varl.learner import Batch
from varl.plan import estimate
from varl.run.state import collected
from varl.trainer import Trainer

METHOD = MethodConfig(beta=0)
PLAIN = {"weight_decay": 0.0, "learning_rate": 1e-2}


def segments(policy: Bits) -> dict[str, Batch]:
    return {
        "prefix": replace(batch(policy, range(2), seed=1), segment="prefix"),
        "suffix": replace(batch(policy, range(2, 3), seed=2), segment="suffix"),
    }


def flat(policy: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])


def after(moments: Any, order: list[str]) -> torch.Tensor:
    """The weights after updates in an order, those of suffixes at a thousandth of the rate."""
    policy = Bits().double()
    own = learner(policy, METHOD, moments=moments, **PLAIN)
    made = segments(policy)
    for kind in order:
        own.learn(replace(made[kind], rate=0.001 if kind == "suffix" else 1.0), stage)
    return flat(policy).clone()


def test_a_scaled_suffix_update_moves_by_its_scale() -> None:
    """A thousandth of the rate is about a thousandth of the movement, in the prefix updates after it too."""
    alone = after("segment", ["prefix", "prefix", "prefix"])
    step = float((after("segment", ["prefix"]) - flat(Bits().double())).norm())
    mixed = float((after("segment", ["prefix", "suffix", "prefix", "prefix"]) - alone).norm())
    assert 1e-4 * step < mixed < 0.01 * step
    # With shared moments the suffix gradient acts again in the prefix updates, at their rate.
    shared = float((after("shared", ["prefix", "suffix", "prefix", "prefix"]) - alone).norm())
    assert shared > 0.3 * step


def test_the_moments_are_those_of_adamw_on_the_segments_own_gradients() -> None:
    policy = Bits().double()
    own = learner(policy, METHOD, moments="segment", betas=(0.5, 0.75), **PLAIN)  # type: ignore[arg-type]
    made, seen = segments(policy), {"prefix": [], "suffix": []}  # type: ignore[var-annotated]
    for kind in ("prefix", "suffix", "prefix"):
        own.learn(made[kind], stage)
        seen[kind].append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
    for kind, gradients in seen.items():
        state = own.optimizers[kind].state
        touched = [p for p in policy.parameters() if p in state]
        assert all(int(state[p]["step"]) == len(gradients) for p in touched)
        for index, parameter in enumerate(touched):
            first = torch.zeros_like(parameter)
            for one in gradients:
                first = 0.5 * first + 0.5 * one[index]
            torch.testing.assert_close(state[parameter]["exp_avg"], first)


def test_shared_moments_are_one_optimizer() -> None:
    assert list(learner(Bits(), METHOD).optimizers) == [""]
    assert list(learner(Bits(), METHOD, moments="segment").optimizers) == ["prefix", "suffix"]  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_with_moments_per_segment_resumes_to_the_same_bits(weights: Path, tmp_path: Path) -> None:
    def config(out: str) -> Any:
        made = make_config(weights, tmp_path / out)
        return replace(made, optimizer=replace(made.optimizer, moments="segment", suffix_scale=0.3))

    whole = Trainer(config("whole"))
    whole.run()
    run_until(Trainer(config("killed")), 5)
    second = Trainer(config("killed"))
    assert second.update == 3
    second.run()
    assert_same(metrics(tmp_path / "killed"), metrics(tmp_path / "whole"))
    assert_same(weights_of(second), weights_of(whole))
    assert_same(collected(second), collected(whole))
    groups = {name.partition(".")[0] for name in collected(whole)[0]}
    assert {"optimizer_prefix", "optimizer_suffix"} <= groups


def test_the_scale_is_that_of_suffix_updates(weights: Path, tmp_path: Path) -> None:
    rates: dict[str, list[float]] = {"prefix": [], "suffix": []}
    made = make_config(weights, tmp_path / "run", prefix_updates=1, run={"updates": 4})
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_updates=0, moments="segment", suffix_scale=0.25)
    trainer = Trainer(replace(made, optimizer=optimizer))

    def note(record: dict[str, Any]) -> None:
        kind = record["kind"]
        rates[kind].append(trainer.learner.optimizers[kind].param_groups[0]["lr"])

    trainer.run(note)
    assert rates == {"prefix": [pytest.approx(1e-3)] * 2, "suffix": [pytest.approx(2.5e-4)] * 2}


def test_the_plan_counts_them(weights: Path, tmp_path: Path) -> None:
    shared = make_config(weights, tmp_path / "run")
    own = replace(shared, optimizer=replace(shared.optimizer, moments="segment"))

    def moments(config: Any) -> float:
        return next(item.bytes for item in estimate(config).items if "moments" in item.name)

    assert moments(own) == 2 * moments(shared) > 0


def test_the_learner_is_copied_with_its_moments() -> None:
    """Two learners of one policy share nothing."""
    policy = Bits()
    one, two = (learner(copy.deepcopy(policy), METHOD, moments="segment") for _ in range(2))  # type: ignore[arg-type]
    one.learn(segments(policy)["prefix"], stage)
    assert one.optimizers["prefix"].state
    assert not one.optimizers["suffix"].state
    assert not two.optimizers["prefix"].state
