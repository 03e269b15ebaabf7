"""A Python reward in a process of its own (``process: true``): whatever ends or hangs it costs pictures only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from varl.policy import Prompt
from varl.rewards import load_reward
from varl.rewards.process import ProcessCall
from varl.rewards.python import PythonReward

MODULE = """
import multiprocessing, os, posix, sys, time
import numpy as np, torch
from varl.rewards import RewardOutput

def square(x):
    return x * x

class Moody:
    '''Its mood is the first prompt.'''
    def __init__(self, factor: float = 1.0):
        self.factor = factor
    def __call__(self, images, prompts):
        mood = prompts[0].text
        if mood == "dies":
            posix._exit(0)
        if mood == "hangs":
            time.sleep(600)
        if mood == "leaves":
            sys.exit(0)
        if mood == "raises":
            raise KeyError("mini")
        if mood == "spoils":
            images.zero_()
            prompts.clear()
            torch.set_grad_enabled(False)
            os.chdir("/")
            return [1.0] * len(images)
        if mood == "draws":
            return torch.rand(len(images)) + np.random.rand()
        if mood == "forks":
            with multiprocessing.get_context("fork").Pool(2) as pool:
                return [float(sum(pool.map(square, range(4))))] * len(images)
        score = images.mean((1, 2, 3)) * self.factor
        regions = [[np.ones((4, 2))]] * len(images)
        return RewardOutput(score, regions=regions, parts={"a": score}, texts=["TEA"] * len(images))
    def describe(self):
        return {"version": 7}
    def check(self, prompts):
        if not all(prompt.text for prompt in prompts):
            raise ValueError("no text")
"""


@pytest.fixture(scope="module")
def moody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PythonReward]:
    """Started once: a process takes a second to come up."""
    folder, here = tmp_path_factory.mktemp("rewards"), Path.cwd()
    (folder / "moody_reward.py").write_text(MODULE)
    try:
        os.chdir(folder)
        reward = load_reward({"name": "moody_reward:Moody", "factor": "2", "process": "true", "timeout_s": 60})
    finally:
        os.chdir(here)
    assert isinstance(reward, PythonReward)
    yield reward
    host(reward).close()


def host(reward: PythonReward) -> ProcessCall:
    assert isinstance(reward.fn, ProcessCall)
    return reward.fn


def asked(mood: str, batch: int = 2) -> tuple[Tensor, list[Prompt]]:
    return torch.full((batch, 3, 4, 4), 0.25), [Prompt(mood)] * batch


def test_it_scores_as_in_this_process(moody: PythonReward) -> None:
    output = moody(*asked("well"))
    assert output.score.tolist() == [0.5, 0.5]
    assert output.parts["a"].tolist() == [0.5, 0.5]
    assert output.texts == ["TEA", "TEA"]
    assert output.regions is not None
    assert [own[0].shape for own in output.regions] == [(4, 2), (4, 2)]
    assert not output.failed.any()


@pytest.mark.parametrize(
    ("mood", "reason"),
    [
        ("dies", "the process of reward 'moody_reward:Moody' crashed (exit code 0)"),
        ("leaves", "SystemExit: 0"),
        ("raises", "KeyError: 'mini'"),
    ],
)
def test_what_goes_wrong_fails_the_pictures_and_it_goes_on(moody: PythonReward, mood: str, reason: str) -> None:
    before = moody.failures.reasons.get(reason, 0)
    assert moody(*asked(mood)).failed.all()
    assert moody.failures.reasons[reason] == before + 2
    assert moody(*asked("well")).score.tolist() == [0.5, 0.5]


def test_a_call_that_hangs_is_ended(moody: PythonReward, monkeypatch: pytest.MonkeyPatch) -> None:
    moody(*asked("well"))
    process = host(moody)._host.process
    assert process is not None
    monkeypatch.setattr(host(moody)._host, "timeout_s", 0.3)
    assert moody(*asked("hangs")).failed.all()
    assert not process.is_alive()
    monkeypatch.undo()
    assert moody(*asked("well")).score.tolist() == [0.5, 0.5]


def test_what_it_does_stays_there(moody: PythonReward) -> None:
    (images, prompts), here = asked("spoils"), os.getcwd()
    assert moody(images, prompts).score.tolist() == [1, 1]
    assert (images == 0.25).all()
    assert len(prompts) == 2
    assert torch.is_grad_enabled()
    assert os.getcwd() == here


def test_its_draws_follow_from_the_generators_of_this_process(moody: PythonReward) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first, second = (moody(*asked("draws")).score for _ in range(2))
        torch.manual_seed(3)
        moody(*asked("dies"))  # which draws too, so the process that replaces it goes on as that one would have
        again = moody(*asked("draws")).score
    assert not torch.equal(first, second)
    np.testing.assert_array_equal(second, again)


def test_it_may_have_processes_of_its_own(moody: PythonReward) -> None:
    assert moody(*asked("forks")).score.tolist() == [14, 14]


def test_it_describes_and_checks(moody: PythonReward) -> None:
    said = moody.describe()
    assert said == {"reward": "moody_reward:Moody", "version": "7", "process": "time limit 60 s a call"}
    moody.check([Prompt("a")])
    with pytest.raises(ValueError, match="no text"):
        moody.check([Prompt()])
