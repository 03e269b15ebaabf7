"""Options that make an update cheaper: pictures, reward calls and tokens counted, and the numbers they promise."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_runs
from learning import counting, drawn, learner
from small import make_inkling, make_prompts
from varl import Sampling, log_probs, sizing, updates
from varl.config import EvaluationConfig, MaskConfig, MethodConfig, PolicyConfig, PromptConfig, RunConfig, TrainConfig
from varl.learner import Batch, Learner
from varl.models.inkling import Inkling
from varl.policy import Prompt
from varl.rewards import RewardOutput
from varl.run.metrics import read_metrics
from varl.trainer import Trainer


def seen(images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput:
    CALLS.append((threading.current_thread() is threading.main_thread(), len(images), [p.text for p in prompts]))
    return tiny_runs.score(images, prompts)


CALLS: list[tuple[bool, int, list[str]]] = []


def run(weights: Path, out: Path, method: dict[str, Any], **run: Any) -> Trainer:
    CALLS.clear()
    rollout_precision = run.pop("rollout_precision", None)
    trainer = Trainer(
        TrainConfig(
            policy=PolicyConfig(weights=str(weights), rollout_precision=rollout_precision),
            prompts=PromptConfig(count=6),
            reward="test_cheaper:seen",
            method=MethodConfig(prompts=2, group=4, middle="grid:3", prefix_updates=1, **method),
            evaluation=EvaluationConfig(enabled=False),
            run=RunConfig(out=out, updates=2, device="cpu", gallery_every=0, diagnose_every=0, **run),
        )
    )
    trainer.run()
    return trainer


def test_scoring_in_the_background_changes_no_number(weights: Path, tmp_path: Path) -> None:
    alone = run(weights, tmp_path / "alone", {})
    assert [(main, count) for main, count, _ in CALLS] == [(True, 16), (True, 8)]
    prompts = [text for _, _, texts in CALLS for text in texts]
    beside = run(weights, tmp_path / "beside", {}, overlap=True)
    # A prefix update's 16 pictures four at a time, and a suffix group of four, each one at a time after the other.
    assert {main for main, _, _ in CALLS} == {False}
    assert [count for _, count, _ in CALLS] == [4] * 4 + [2] * 4
    assert [text for _, _, texts in CALLS for text in texts] == prompts
    for own, other in zip(alone.policy.trainable.parameters(), beside.policy.trainable.parameters(), strict=True):
        torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-5)
    for one, two in zip(*(read_metrics(tmp_path / name) for name in ("alone", "beside")), strict=True):
        assert two["reward"] == pytest.approx(one["reward"], abs=1e-5)
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)


def test_what_the_reward_raises_in_the_background_ends_the_run(weights: Path, tmp_path: Path) -> None:
    trainer = run(weights, tmp_path, {}, overlap=True)

    def broken(*_: Any) -> RewardOutput:
        raise RuntimeError("no reader left")

    trainer.reward = broken  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="no reader left"):
        trainer.step()


def test_a_prefix_valued_on_an_early_picture(inkling: Inkling) -> None:
    """The continuations are those of whole pictures, cut; and no later token is computed."""
    condition = inkling.condition(make_prompts(2))
    method = MethodConfig(middle=2, group=2, continuations=2)
    plans = [
        updates.plan("prefix", own, inkling.default_schedule) for own in (method, replace(method, value_at="grid:6"))
    ]
    whole, early = (updates.draw(inkling, condition, plan, Sampling(), (0,)) for plan in plans)
    assert early.whole.steps == plans[1].until == 4
    assert torch.equal(early.whole.actions, whole.whole.actions[:, :50])
    assert torch.equal(early.trained.actions, whole.trained.actions)
    with counting(inkling) as found:
        updates.draw(inkling, condition, plans[1], Sampling(), (0,))
    assert found["tokens"] == 4 * 5 + 8 * 45
    images = inkling.decode(early.whole.actions)
    assert images.shape == inkling.decode(whole.whole.actions).shape
    output = RewardOutput.from_scores(images.mean((1, 2, 3)), 8)
    value, _ = updates.returns(output, early, plans[1], method, inkling, None, 8)
    torch.testing.assert_close(value.flatten(), output.score.view(4, 2).exp().mean(1).log())
    with pytest.raises(ValueError, match="value_at is step 1, and must not be before the middle step 2"):
        updates.plan("prefix", replace(method, value_at=1), inkling.default_schedule)


def test_a_prefix_valued_on_its_own_picture(inkling: Inkling) -> None:
    """Nothing is continued, so the return is the picture's reward."""
    condition = inkling.condition(make_prompts(2))
    method = MethodConfig(middle=3, group=2, continuations=1, value_at="grid:3")
    plan = updates.plan("prefix", method, inkling.default_schedule)
    with counting(inkling) as found:
        drawn = updates.draw(inkling, condition, plan, Sampling(), (0,))
    assert found["tokens"] == 4 * 14
    longer = updates.plan("prefix", replace(method, value_at="end"), inkling.default_schedule)
    expected = updates.draw(inkling, condition, longer, Sampling(), (0,)).trained.actions
    assert torch.equal(drawn.trained.actions, expected)
    assert torch.equal(drawn.whole.actions, expected)
    output = RewardOutput.from_scores(torch.arange(4.0), 4)
    value, valid = updates.returns(output, drawn, plan, method, inkling, None, 4)
    assert torch.equal(value, torch.arange(4.0))
    assert valid.all()
    for changes in ({"continuations": 2}, {"continuations_by": "reference"}, {"value": "soft-reference"}):
        with pytest.raises(ValueError, match="prefixes are not continued"):
            updates.plan("prefix", replace(method, **changes), inkling.default_schedule)


def test_the_value_of_an_early_picture_weighs_what_was_drawn(inkling: Inkling) -> None:
    method = MethodConfig(middle=2, group=2, value_at="grid:3", value="soft-reference")
    plan = updates.plan("prefix", method, inkling.default_schedule)
    made = updates.draw(inkling, inkling.condition(make_prompts(1)), plan, Sampling(), (0,))
    output = RewardOutput.from_scores(torch.rand(4, generator=torch.Generator().manual_seed(0)), 4)
    value, _ = updates.returns(output, made, plan, method, inkling, make_inkling(1), 4)
    logp, reference_logp = (
        log_probs(p, made.whole.condition, made.whole.actions, range(2, 3)).logp.sum(1)
        for p in (inkling, make_inkling(1))
    )
    weight = (reference_logp - logp).view(2, 2).softmax(1)
    torch.testing.assert_close(
        value.flatten(), (weight * output.score.view(2, 2).exp()).sum(1).log(), atol=1e-5, rtol=0
    )


def test_a_suffix_update_that_reuses_continuations(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each prefix's continuations are a group; nothing is drawn, scored or taken from the prompts."""
    batches: list[Batch] = []
    whole: list[Tensor] = []
    learn, draw = Learner.learn, updates.draw
    monkeypatch.setattr(Learner, "learn", lambda self, batch, *rest: batches.append(batch) or learn(self, batch, *rest))

    def watched(*arguments: Any) -> updates.Drawn:
        made = draw(*arguments)
        whole.append(made.whole.actions)
        return made

    monkeypatch.setattr(updates, "draw", watched)
    trainer = run(weights, tmp_path, {"suffix_state": "reused", "continuations": 3, "mask": MaskConfig(kl=True)})
    assert [count for _, count, _ in CALLS] == [24]
    assert trainer.pictures == 24
    assert len(whole) == 1
    _, suffix = batches
    assert torch.equal(suffix.sequences.actions, whole[0])
    assert suffix.steps == range(3, 5)
    assert suffix.shared == 3
    score = tiny_runs.score(
        trainer._decode(whole[0]), [Prompt(words=("A",) * len(text.split("'")[1::2])) for text in CALLS[0][2]]
    )
    grouped = score.score.view(8, 3)
    expected = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, unbiased=False, keepdim=True) + 1e-6)
    torch.testing.assert_close(suffix.advantage_B.view(8, 3), expected, atol=1e-3, rtol=1e-3)
    assert suffix.mask_BL is not None
    assert suffix.mask_BL.shape == (24, 180)
    assert [line["kind"] for line in read_metrics(tmp_path)] == ["prefix", "suffix"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update": "suffix"}, "needs prefix updates"),
        ({"suffix_updates": 2}, "one suffix update in a row"),
        ({"continuations": 1}, "continuations 2 or more"),
        ({"value_at": "grid:6"}, "whole pictures by the policy"),
        ({"continuations_by": "reference"}, "whole pictures by the policy"),
    ],
)
def test_what_cannot_be_reused_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MethodConfig(suffix_state="reused", **options)


def test_rollouts_in_bf16(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are drawn in bf16; what is learned from them is computed in fp32."""
    kinds: list[tuple[bool, bool]] = []
    forward = Inkling.logits

    def watched(self: Inkling, hidden: Tensor) -> Tensor:
        kinds.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return forward(self, hidden)

    monkeypatch.setattr(Inkling, "logits", watched)
    run(weights, tmp_path, {"beta": 0.0}, rollout_precision="bfloat16")
    assert set(kinds) == {(False, True), (True, False)}


def costing(monkeypatch: pytest.MonkeyPatch, cost: dict[int, float], filled: float = 0.0) -> list[int]:
    """Passes that cost so many seconds by their size; returns the sizes that are tried."""
    tried: list[int] = []

    def seconds(own: Learner, *_: Any) -> float:
        tried.append(own.micro_batch)
        if cost[own.micro_batch] < 0:
            raise torch.OutOfMemoryError("full")
        return cost[own.micro_batch]

    monkeypatch.setattr(sizing, "_seconds", seconds)
    monkeypatch.setattr(sizing, "_filled", lambda device: filled)
    return tried


@pytest.mark.parametrize(
    ("cost", "filled", "expected", "last"),
    [
        ({1: 1.0, 2: 1.6, 4: 2.4, 8: 4.0}, 0.0, 8, 8),
        ({1: 1.0, 2: 1.6, 4: 2.4, 8: 4.79}, 0.0, 4, 8),  # 8 costs a little less a sequence: not worth the memory
        ({1: 1.0, 2: 1.6, 4: 4.8, 8: 1.0}, 0.0, 2, 4),  # slower by more than a fifth: larger ones are not tried
        ({1: 1.0, 2: 1.6, 4: -1.0}, 0.0, 2, 4),
        ({1: 1.0, 2: 1.6, 4: 2.4}, 0.5, 1, 1),  # twice as much would not fit
    ],
)
def test_the_fastest_micro_batch(
    cost: dict[int, float], filled: float, expected: int, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, method = make_inkling(), MethodConfig(middle=3, group=4)
    own, batch = learner(policy, method), drawn(policy, "prefix", method)
    tried = costing(monkeypatch, cost, filled)
    assert sizing.fastest_micro_batch(own, batch.sequences, batch.steps) == expected
    assert tried[-1] == last
    assert own.micro_batch == 8
    costing(monkeypatch, {1: -1.0})
    with pytest.raises(RuntimeError, match="not even one sequence"):
        sizing.fastest_micro_batch(own, batch.sequences, batch.steps)


def test_a_run_keeps_to_what_it_measured(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = costing(monkeypatch, dict.fromkeys((1, 2, 4, 8), 1.0))
    trainer = run(weights, tmp_path, {}, micro_batch="auto")
    assert json.loads((tmp_path / "micro_batches.json").read_text()) == {"prefix": 8, "suffix": 8}
    assert trainer.learner.micro_batch == 8
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in trainer.learner.parameters)
    tried.clear()
    trainer.step()
    assert tried == []


def test_measuring_leaves_no_gradients() -> None:
    policy, method = make_inkling(), MethodConfig(middle=3, group=4)
    own, batch = learner(policy, method), drawn(policy, "prefix", method)
    assert sizing.fastest_micro_batch(own, batch.sequences, batch.steps) in (1, 2, 4, 8)
    assert all(parameter.grad is None for parameter in own.parameters)


def test_measuring_takes_no_step(weights: Path, tmp_path: Path) -> None:
    measured = run(weights, tmp_path / "measured", {}, micro_batch="auto")
    sizes = json.loads((tmp_path / "measured" / "micro_batches.json").read_text())
    assert set(sizes) == {"prefix", "suffix"}
    given = run(weights, tmp_path / "given", {}, micro_batch=8)
    for own, other in zip(measured.policy.trainable.parameters(), given.policy.trainable.parameters(), strict=True):
        torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-5)
