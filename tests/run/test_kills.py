"""A run that is killed, wherever that is, goes on by the same command to the same bytes."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.group import VICTIMS
from benchmarks.kills import outcome, sweep

import tiny_runs
from varl.config import EvaluationConfig, MethodConfig, PolicyConfig, PromptConfig, RunConfig, TrainConfig
from varl.models.inkling import InklingConfig
from varl.run import faults
from varl.trainer import Trainer


class Killed(BaseException):
    """No Exception: nothing that tidies up after errors is to run, as nothing runs after ``kill -9``."""


class Killer:
    """Kills the process, so to speak, at the n-th passing of a point: whoever comes to any point after it dies too."""

    def __init__(self, name: str = "", passing: int = 1) -> None:
        self.name, self.left, self.dead = name, passing, False
        self.passed: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __call__(self, name: str) -> None:
        with self._lock:
            self.passed[name] += 1
            self.left -= name == self.name
            self.dead = self.dead or (name == self.name and self.left == 0)
        if self.dead:
            raise Killed(name)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = InklingConfig(grids=(3, 6), codes=32, coarse=8, fine=4, decoder=8, width=16, depth=1, heads=2)
    return tiny_runs.tiny_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors", shape)


def make_config(weights: Path, out: Path) -> TrainConfig:
    """Both kinds of update, evaluations between and after, and two checkpoints."""
    return TrainConfig(
        policy=PolicyConfig(weights=str(weights)),
        prompts=PromptConfig(count=3),
        reward="tiny_runs:noisy",
        method=MethodConfig(prompts=2, group=2, continuations=1, middle="grid:3", prefix_updates=1),
        evaluation=EvaluationConfig(count=2, every=3),
        run=RunConfig(out=out, updates=4, save_every=2, keep=1, device="cpu", gallery_every=0, diagnose_every=0),
    )


@pytest.fixture(scope="module")
def whole(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("whole")
    Trainer(make_config(weights, out)).run()
    return outcome(out)


def points_of(weights: Path, out: Path) -> Counter[str]:
    """How often a whole run passes each point."""
    with faults.armed(counter := Killer()):
        Trainer(make_config(weights, out)).run()
    return counter.passed


def killed_at(weights: Path, out: Path, name: str, passing: int) -> None:
    with faults.armed(Killer(name, passing)), pytest.raises(Killed):
        Trainer(make_config(weights, out)).run()


@pytest.mark.slow
def test_killed_at_every_point(weights: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    """At the last passing of each: where most is at stake."""
    points = points_of(weights, tmp_path / "points")
    assert outcome(tmp_path / "points") == whole  # the same machine and versions: the same bytes
    stages = {"condition", "rollout", "decode", "reward", "return", "mask", "logp", "backward", "optimizer"}
    saving = {f"checkpoint {part}" for part in ("begins", "staged", "folder made", "tensors written")}
    saving |= {"checkpoint manifest written", "checkpoint renamed", "checkpoint finished"}
    rest = {"metrics written", "evaluation", "evaluated", "finish", "file weights.safetensors", "file best.safetensors"}
    assert stages | saving | rest <= points.keys()
    for number, (name, times) in enumerate(points.items()):
        out = tmp_path / str(number)
        killed_at(weights, out, name, times)
        torch.rand(number)  # another process's generators are elsewhere
        Trainer(make_config(weights, out)).run()
        assert outcome(out) == whole, name


def test_killed_again_and_again(weights: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    for name, passing in (("backward", 1), ("file update-000000.pt", 1), ("checkpoint staged", 1), ("reward", 3)):
        killed_at(weights, tmp_path, name, passing)
    Trainer(make_config(weights, tmp_path)).run()
    assert outcome(tmp_path) == whole


def test_an_evaluation_more_changes_no_number(weights: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    """That at the end of a run that is then gone on with: its reward draws from the global generator."""
    config = make_config(weights, tmp_path)
    Trainer(replace(config, run=replace(config.run, updates=2))).run()
    Trainer(config).run()
    assert outcome(tmp_path)["metrics"] == whole["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["tiny_runs:noisy", "tiny_runs:without_regions"])
def test_killed_before_an_update_that_reuses_pictures(weights: Path, tmp_path: Path, reward: str) -> None:
    """Pictures, scores and regions that are waiting for it come back."""

    def config(out: Path) -> TrainConfig:
        made = make_config(weights, out)
        method = replace(made.method, suffix_state="reused", continuations=2)
        optimizer = replace(made.optimizer, learning_rate=1e-2, warmup_updates=0)
        run = replace(made.run, updates=5, save_every=1, keep=9, gallery_every=1)
        return replace(made, method=method, optimizer=optimizer, run=run, reward=reward)

    Trainer(config(tmp_path / "whole")).run()
    with faults.armed(Killer("checkpoint begins", 4)), pytest.raises(Killed):
        Trainer(config(tmp_path / "killed")).run()
    trainer = Trainer(config(tmp_path / "killed"))
    assert trainer.update == 3
    assert trainer.kept is not None
    trainer.run()
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_processes_really_killed(tmp_path: Path) -> None:
    found = sweep(tmp_path, kills=3, updates=6)
    assert found["kills"] == 3
    assert found["different"] == 0


@pytest.mark.slow
def test_one_of_two_processes_really_killed(tmp_path: Path) -> None:
    found = sweep(tmp_path, kills=1, updates=6, processes=2)
    assert found["kills"] == sum(found.get(victim, 0) for victim in VICTIMS) == 1
    assert found["different"] == 0
