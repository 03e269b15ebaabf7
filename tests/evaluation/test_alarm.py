"""The alarm at reward hacking: closed forms, and a run whose reward is hacked."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny_runs
from varl.config import EvaluationConfig, MethodConfig, PolicyConfig, PromptConfig, RunConfig, TrainConfig
from varl.errors import RunError
from varl.evaluation.alarm import falling_metrics, rise
from varl.evaluation.held_out import Estimate
from varl.models import load_policy
from varl.models.inkling import InklingConfig
from varl.policy import Prompt
from varl.run.metrics import read_metrics
from varl.trainer import Trainer

HELD_OUT = 5


def test_the_rise_is_that_of_the_halves_means() -> None:
    value, error = rise([1, 3, 99, 5, 9])  # the middle one is in no half
    assert value == 7 - 2
    assert error == pytest.approx(math.sqrt((2 + 8) / 2))  # variances 2 and 8 of 2 values each
    assert rise([1, math.nan, 3, 5, math.inf, 9]) == rise([1, 3, 5, 9])
    assert rise([4, 4, 4, 4]) == (0, 0)


@pytest.mark.parametrize("values", [[], [1], [1, 2, 3], [1, math.nan, 2, 3]])
def test_too_few_values_say_nothing(values: list[float]) -> None:
    assert rise(values) == (0, math.inf)
    assert falling_metrics(values, {"ned": Estimate(-1, -1, -1)}) == []


UP, DOWN = [0.0, 0.1, 1.0, 1.1], [1.0, 1.1, 0.0, 0.1]
FELL, ROSE, UNSURE = Estimate(-0.2, -0.3, -0.1), Estimate(0.2, 0.1, 0.3), Estimate(-0.2, -0.5, 0.1)


@pytest.mark.parametrize(
    ("rewards", "changes", "expected"),
    [
        (UP, {"ned": FELL, "reward": ROSE, "word_accuracy": FELL}, ["ned", "word_accuracy"]),
        (UP, {"ned": ROSE, "reward": UNSURE}, []),
        (UP, {}, []),
        (DOWN, {"ned": FELL}, []),
        ([0.0, 1.0, 0.5, 1.5], {"ned": FELL}, []),  # rises by 0.5, with a standard error of 0.71
        ([0.0, 0.0, 1e-9, 1e-9], {"ned": FELL}, ["ned"]),
        ([1.0, 1.0, 1.0, 1.0], {"ned": FELL}, []),
    ],
)
def test_both_must_be_beyond_noise(rewards: list[float], changes: dict[str, Estimate], expected: list[str]) -> None:
    assert falling_metrics(rewards, changes) == expected


class Hacked:
    """Rises with every batch of training; its evaluations score what they are told to."""

    def __init__(self, held_out: Sequence[float]) -> None:
        self.held_out, self.calls = list(held_out), 0

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self.calls += 1
        level = self.held_out.pop(0) if len(images) == HELD_OUT else self.calls
        return level + 0.01 * torch.arange(len(images))


FALLS, RISES = (4.0, 3.0, 2.0, 1.0), (1.0, 2.0, 3.0, 4.0)


def make_config(out: Path, held_out: Sequence[float], window: int, stops: bool) -> TrainConfig:
    shape = InklingConfig(grids=(3, 6), codes=32, coarse=8, fine=4, decoder=8, width=16, depth=1, heads=2)
    weights = tiny_runs.tiny_weights(out.parent / "tiny.safetensors", shape)
    return TrainConfig(
        policy=PolicyConfig(weights=str(weights)),
        prompts=PromptConfig(count=3),
        reward={"name": f"{__name__}:Hacked", "held_out": list(held_out)},
        method=MethodConfig(prompts=2, group=2, update="full"),
        evaluation=EvaluationConfig(count=HELD_OUT, every=4, alarm_window=window, alarm_stops=stops),
        run=RunConfig(out=out, updates=10, save_every=100, device="cpu", gallery_every=0),
    )


def alarms(out: Path) -> list[list[str]]:
    return [json.loads(path.read_text())["alarm"] for path in sorted((out / "evaluations").glob("*.json"))]


@pytest.mark.parametrize(
    ("held_out", "window", "expected"),
    [
        (FALLS, 2, [[], ["reward"], ["reward"], []]),  # after 4, 8 and 10; between the last two are only 2 updates
        (FALLS, 3, [[], [], ["reward"], ["reward"]]),
        (FALLS, 0, [[], [], [], []]),
        (RISES, 2, [[], [], [], []]),
    ],
)
def test_the_alarm_of_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, held_out: Sequence[float], window: int, expected: list[list[str]]
) -> None:
    with caplog.at_level(logging.WARNING):
        Trainer(make_config(tmp_path / "run", held_out, window, stops=False)).run()
    assert alarms(tmp_path / "run") == expected
    assert caplog.text.count("the training reward rises while held-out reward falls") == sum(map(bool, expected))


class Levels(Hacked):
    """Suffix updates, of four pictures, are worth more than prefix updates, of eight; neither rises."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        level = self.held_out.pop(0) if len(images) == HELD_OUT else {8: 0.0, 4: 5.0}[len(images)]
        return level + 0.01 * torch.arange(len(images))


def test_kinds_of_updates_that_are_worth_unequally_are_no_rise(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", FALLS, 2, stops=True)
    method = MethodConfig(prompts=2, group=2, middle="grid:3", prefix_updates=4, suffix_updates=4)
    reward = {"name": f"{__name__}:Levels", "held_out": list(FALLS)}
    evaluation, run = replace(config.evaluation, every=8), replace(config.run, updates=8)
    Trainer(replace(config, method=method, reward=reward, evaluation=evaluation, run=run)).run()
    lines = read_metrics(tmp_path / "run")
    assert [line["kind"] for line in lines] == ["prefix"] * 4 + ["suffix"] * 4
    assert rise([line["reward"]["score"] for line in lines])[0] > 4
    assert alarms(tmp_path / "run") == [[], []]


def test_the_alarm_stops_a_run_if_asked_to(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", FALLS, 2, stops=True)
    for _ in range(2):  # the same command does not go on over it
        with pytest.raises(
            RunError, match=r"the reward is hacked. The best weights are in .*best\.safetensors; --eval"
        ):
            Trainer(config).run()
        assert [line["update"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
        assert (tmp_path / "run" / "best.safetensors").exists()
    Trainer(replace(config, evaluation=replace(config.evaluation, alarm_stops=False))).run()
    assert len(read_metrics(tmp_path / "run")) == 10


def test_an_alarm_that_was_not_saved_is_forgotten_by_a_killed_run(tmp_path: Path) -> None:
    """Or the run would stop before it gets there again."""
    config = make_config(tmp_path / "run", FALLS, 2, stops=True)
    trainer = Trainer(config)

    def killed() -> None:
        raise KeyboardInterrupt

    trainer.save = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert alarms(tmp_path / "run") == [[], ["reward"]]
    with pytest.raises(RunError, match="the reward is hacked"):
        Trainer(config).run()
    assert [line["update"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_the_best_is_kept(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", (3.0, 5.0, 5.0, 4.0), 0, stops=False)
    trainer = Trainer(replace(config, run=replace(config.run, keep=1)))
    states = {}
    trainer.run(
        lambda record: states.update({record["update"]: trainer.policy.trainable.state_dict()["head.bias"] + 0})
    )
    assert trainer.best == (4, pytest.approx(5.02))  # of equals the first
    assert sorted(path.name[-2:] for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["04", "10"]
    for name, update in (("best", 4), ("weights", 10)):
        policy = load_policy("inkling", weights=tmp_path / "run" / f"{name}.safetensors")
        assert torch.equal(policy.trainable.state_dict()["head.bias"], states[update])
    assert Trainer(config).best == trainer.best
