"""Rewards that fail in every way cost their groups, are counted, and stop a run only when they are too many."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny_runs
from patience import PATIENCE
from rewards.moody import Mortal
from varl.config import EvaluationConfig, MethodConfig, PolicyConfig, PromptConfig, RunConfig, TrainConfig
from varl.errors import RunError
from varl.policy import Prompt
from varl.rewards.ocr import OcrReward
from varl.rewards.worker import OcrWorker
from varl.run.failures import FailureWindow
from varl.run.metrics import read_metrics
from varl.trainer import Trainer

PICTURES = 12


class Broken:
    """``tiny_runs.score``, but broken in one way a call, in the order given; whole afterwards."""

    def __init__(self, ways: Sequence[str] = ()) -> None:
        self.ways, self.gate = list(ways), threading.Event()

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Any:
        way = self.ways.pop(0) if self.ways else ""
        output = tiny_runs.score(images, prompts)
        if way == "hangs":
            self.gate.wait(PATIENCE)
        if way == "raises":
            raise ZeroDivisionError("a bug")
        wrong = {
            "nothing": None,
            "a text": "good",
            "too few": output.score[1:],
            "a square": output.score[:, None],
            "NaN": output.score * torch.nan,
            "infinite": output.score + torch.inf,
            "regions that are none": replace(output, regions=[[np.zeros((4, 3))]] * len(images)),
            "infinite regions": replace(output, regions=[[np.full((4, 2), np.inf)]] * len(images)),
            "too few regions": replace(output, regions=[]),
            "texts that are none": replace(output, texts=[None] * len(images)),
            "parts of another length": replace(output, parts={"part": torch.zeros(1)}),
        }
        return wrong.get(way, output)


WAYS = ["nothing", "a text", "too few", "a square", "NaN", "infinite", "regions that are none", "infinite regions"]
WAYS += ["too few regions", "texts that are none", "parts of another length", "raises", "hangs"]


def make_config(weights: Path, out: Path, updates: int, ways: Sequence[str] = (), **run: Any) -> TrainConfig:
    return TrainConfig(
        policy=PolicyConfig(weights=str(weights)),
        prompts=PromptConfig(count=3),
        reward={"name": f"{__name__}:Broken", "ways": list(ways), "timeout_s": PATIENCE if "hangs" in ways else None},
        method=MethodConfig(prompts=3, group=4, update="full"),
        evaluation=EvaluationConfig(enabled=False),
        run=RunConfig(**{"out": out, "updates": updates, "save_every": 100, "device": "cpu", "gallery_every": 1} | run),
    )


@pytest.mark.slow
def test_every_way_of_failing_skips_the_step_and_is_counted(weights: Path, tmp_path: Path) -> None:
    trainer = Trainer(make_config(weights, tmp_path, len(WAYS) + 2, WAYS, max_failed_share=1.0))
    states = []

    def note(_: dict[str, Any]) -> None:
        states.append(trainer.policy.trainable.state_dict()["head.weight"].clone())
        trainer.reward.timeout_s = 0.3 if WAYS[len(states) :] == ["hangs"] else PATIENCE
        if len(states) == len(WAYS):
            trainer.reward.fn.gate.set()
            trainer.reward._hung.join()

    before = trainer.policy.trainable.state_dict()["head.weight"].clone()
    trainer.run(note)
    lines = read_metrics(tmp_path)
    assert [line["failed_pictures"] for line in lines] == [PICTURES] * len(WAYS) + [0, 0]
    assert [line["skipped"] for line in lines] == [1] * len(WAYS) + [0, 0]
    assert all(torch.equal(state, before) for state in states[:-2])
    assert not torch.equal(states[-1], before)
    reasons = trainer.reward.failures.reasons  # type: ignore[attr-defined]
    assert any("ZeroDivisionError: a bug" in reason for reason in reasons)
    assert any("no answer after 0.3 s" in reason for reason in reasons)
    assert any("regions hold polygons" in reason for reason in reasons)


@pytest.mark.slow
def test_too_many_failures_stop_the_run_which_goes_on_later(weights: Path, tmp_path: Path) -> None:
    config = make_config(weights, tmp_path, 8, ["", *["raises"] * 4], failure_window=4, max_failed_share=0.5)
    with pytest.raises(
        RunError, match=r"in the last 4 updates 75% of the pictures could not be scored; .* allows 50% of 4"
    ):
        Trainer(config).run()
    assert [line["failed_pictures"] for line in read_metrics(tmp_path)] == [0, PICTURES, PICTURES, PICTURES]
    trainer = Trainer(config)  # the reward begins its ways anew: what failed before the stop does not count again
    assert trainer.update == 4
    trainer.reward.fn.ways = ["raises"] * 2  # type: ignore[attr-defined]
    trainer.run()
    assert len(read_metrics(tmp_path)) == 8


def test_failures_are_remembered_by_a_run_that_is_killed(weights: Path, tmp_path: Path) -> None:
    ways = ["raises"] * 3

    def killed(record: dict[str, Any]) -> None:
        if record["update"] == 2:
            raise KeyboardInterrupt

    config = make_config(weights, tmp_path, 8, ways, failure_window=4, max_failed_share=0.5, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        Trainer(config).run(killed)
    assert list(Trainer(replace(config, run=replace(config.run))).failures.shares) == [(1.0, 0.0)]


@pytest.mark.parametrize("epochs", [1, 2])
def test_gradients_that_are_not_finite_skip_the_step_and_count(weights: Path, tmp_path: Path, epochs: int) -> None:
    config = make_config(weights, tmp_path, 9, failure_window=4, max_failed_share=0.5)
    trainer = Trainer(replace(config, method=replace(config.method, epochs=epochs)))
    head = trainer.policy.trainable.get_parameter("head.weight")
    head.register_hook(lambda gradient: gradient * torch.nan)
    before = head.detach().clone()
    with pytest.raises(
        RunError, match="in the last 3 updates 100% of the steps were not taken, as the loss or gradient was not finite"
    ):
        trainer.run()
    assert torch.equal(head, before)
    assert [line["skipped"] for line in read_metrics(tmp_path)] == [epochs] * 3
    assert read_metrics(tmp_path)[0]["gradient_norm"] is None


def test_an_ocr_process_that_dies_costs_a_picture(weights: Path, tmp_path: Path) -> None:
    trainer = Trainer(make_config(weights, tmp_path, 2))
    with OcrWorker(make_reader=partial(Mortal, 7)) as reader:
        trainer.reward = OcrReward(reader)
        trainer.run()
        assert reader.crashes == 2 * PICTURES // 7
    assert [line["failed_pictures"] for line in read_metrics(tmp_path)] == [1, 2]
    # Nothing was read in any of the others, so no group has variance: the step is not taken, which is no failure.
    assert [line["skipped"] for line in read_metrics(tmp_path)] == [1, 1]
    assert [line["not_finite"] for line in read_metrics(tmp_path)] == [0, 0]


@pytest.mark.parametrize(
    ("failed", "stops_at"),
    [([1] * 9, 3), ([0, 1, 1, 0, 1], 5), ([0.5] * 9, None), ([0.6] * 9, 4), ([1, 0, 0, 0] * 3, None), ([0] * 9, None)],
)
def test_the_share_is_of_a_whole_window(failed: list[float], stops_at: int | None) -> None:
    """More than 2 whole updates in 4."""
    window = FailureWindow(4, 0.5)
    errors = [window.add(share, 0.0) for share in failed]
    assert [i for i, error in enumerate(errors, 1) if error is not None][:1] == ([] if stops_at is None else [stops_at])


def test_pictures_and_steps_are_not_counted_twice() -> None:
    window = FailureWindow(4, 1.0)
    assert window.add(0.25, 0.5) is None
    assert window.add(0.75, 0.5) is None
    assert list(window.shares) == [(0.25, 0.5), (0.75, 0.5)]
    half = FailureWindow(4, 0.3)
    assert half.add(0.5, 0.5) is None
    assert half.add(0.5, 0.5) is None
    assert "50% of the pictures could not be scored and 50% of the steps" in str(half.add(0.5, 0.5))


@pytest.mark.slow
def test_a_run_too_short_for_the_window_does_not_end_as_if_all_were_well(weights: Path, tmp_path: Path) -> None:
    config = make_config(weights, tmp_path, 2, ["raises"] * 2)
    for _ in range(2):  # and the same command says it again
        with pytest.raises(RunError, match=r"last update, but in the last 2 updates 100% of the pictures"):
            Trainer(config).run()
    assert (tmp_path / "weights.safetensors").is_file()
    fine = make_config(weights, tmp_path / "fine", 3, ["raises", "", ""])
    Trainer(fine).run()
