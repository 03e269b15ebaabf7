"""What whole updates do with their settings: groups without variance, values, prefixes, and what follows kinds."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_runs
from bits import Bits, labels
from test_trainer import assert_same, make_config, metrics, weights_of, with_reward
from varl import Sampling, rollout, updates
from varl.config import MethodConfig
from varl.errors import RunError
from varl.rewards import RewardOutput
from varl.rollout import row_generators
from varl.run import folder
from varl.run.metrics import read_metrics
from varl.trainer import Trainer


def constant(images: Tensor, prompts: Any) -> list[float]:
    return [0.25] * len(images)


class Read:
    """A reward that reads nothing, and compares words as it is told to."""

    def __init__(self, fold: bool = True) -> None:
        self.fold = fold

    def __call__(self, images: Tensor, prompts: Any) -> RewardOutput:
        output = tiny_runs.score(images, prompts)
        output.texts = [""] * len(images)
        return output


def rising(images: Tensor, prompts: Any) -> list[int]:
    """Every picture is worth more than the one before it, whatever it shows."""
    return list(range(len(images)))


def constant_for_one(images: Tensor, prompts: Any) -> Tensor:
    """The first prompt's pictures are all worth the same."""
    score = tiny_runs.score(images, prompts).score
    return torch.where(torch.tensor([p == prompts[0] for p in prompts]), 0.25, score)


# --- Groups without variance. ---


@pytest.mark.parametrize("kind", ["alternate", "full"])
def test_ten_updates_of_a_constant_reward_move_nothing(
    weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    config = make_config(weights, tmp_path / "run", update=kind, beta=0.1, run={"updates": 12, "failure_window": 4})
    trainer = Trainer(with_reward(config, f"{__name__}:constant"))
    before = weights_of(trainer)
    trainer.run()
    assert_same(weights_of(trainer), before)
    lines = metrics(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [1] * 12
    assert [line["not_finite"] for line in lines] == [0] * 12
    assert [line["zero_variance_groups"] for line in lines] == [1.0] * 12
    assert trainer.learner.updates_taken == 0
    said = [record.message for record in caplog.records if "of every group are equal" in record.message]
    assert said == ["update 1: the returns of every group are equal; it takes no step"]


@pytest.mark.parametrize("kind", ["alternate", "full"])
def test_groups_of_one_sequence_move_nothing(weights: Path, tmp_path: Path, kind: str) -> None:
    """Their returns differ, but their advantages cancel: AdamW would scale the rounding that is left to full steps."""
    config = make_config(weights, tmp_path / "run", update=kind, beta=0.0, run={"updates": 4})
    trainer = Trainer(with_reward(replace(config, sampling=Sampling(top_k=1)), f"{__name__}:rising"))
    before = weights_of(trainer)
    trainer.run()
    assert_same(weights_of(trainer), before)
    lines = metrics(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [1] * 4
    assert min(line["group_std"] for line in lines) > 0


def test_terms_cancel_where_every_group_is_of_one_sequence() -> None:
    policy = Bits()
    sequences = rollout(policy, policy.condition(labels(6)), None, row_generators((0,), 6))
    sequences = replace(sequences, actions=sequences.actions[[0, 0, 1, 1, 2, 3]])
    mask = torch.ones(sequences.actions.shape[:2])
    mask[3, -1] = 0.5
    plain, masked = updates.digests(sequences, None), updates.digests(sequences, mask)

    def cancelled(learnt: list[bool], digests: list[str], **options: Any) -> bool:
        return updates.cancelled(torch.tensor(learnt), digests, MethodConfig(**options))

    assert cancelled([True, True, False], plain)
    assert not cancelled([True, True, True], plain)
    assert not cancelled([True, True, False], masked)  # the second group's masks differ
    assert not cancelled([False, False, False], plain)  # nothing is learnt from anyway
    assert not cancelled([True, True, False], plain, zero_variance="kl")


def test_the_kl_of_such_groups_moves_the_weights_if_asked_to(
    weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(weights, tmp_path / "run", update="full", beta=0.1, zero_variance="kl", run={"updates": 3})
    trainer = Trainer(with_reward(config, f"{__name__}:constant"))
    before = weights_of(trainer)
    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert [line["skipped"] for line in metrics(tmp_path / "run")] == [0, 0, 0]
    assert not torch.equal(weights_of(trainer)["head.weight"], before["head.weight"])
    assert "its step follows the KL alone" in caplog.text


@pytest.mark.parametrize("kept", ["drop", "kl"])
def test_a_group_without_variance_beside_others(weights: Path, tmp_path: Path, kept: str) -> None:
    """Its rows carry their KL only if that is asked for."""
    config = make_config(weights, tmp_path / kept, update="full", beta=0.1, zero_variance=kept, run={"updates": 1})
    trainer = Trainer(with_reward(config, f"{__name__}:constant_for_one"))
    seen = []
    learn = trainer.learner.learn
    trainer.learner.learn = lambda *given: seen.append(given[0]) or learn(*given)  # type: ignore[method-assign]
    trainer.step()
    assert seen[0].advantage_B[:4].tolist() == [0] * 4
    assert seen[0].valid_B.tolist() == [kept == "kl"] * 4 + [True] * 8


def test_a_dropped_group_keeps_no_kl() -> None:
    found = updates.advantages(
        torch.tensor([[1.0, 2.0], [3.0, 3.0], [1.0, 5.0]]),
        torch.tensor([[True, True], [True, True], [True, False]]),
        MethodConfig(),
    )
    assert updates.learnt_from(found, MethodConfig()).tolist() == [True, False, False]
    assert updates.learnt_from(found, MethodConfig(zero_variance="kl")).tolist() == [True, True, False]


# --- Values under the distribution that was drawn from. ---


def test_a_run_values_by_what_it_draws(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    inner = updates._sequence_logp
    monkeypatch.setattr(updates, "_sequence_logp", lambda *given: seen.append(given[-1]) or inner(*given))
    Trainer(make_config(weights, tmp_path / "run", update="prefix", value="policy", eta=0.01)).step()
    assert seen == [Sampling(top_p=0.95)] * 2


# --- Pictures and diagnostics follow the kinds. ---


@pytest.mark.parametrize(
    ("method", "every", "shown"),
    [
        ({"prefix_updates": 3}, 4, [3, 4, 7, 8]),  # the cycle of four has a suffix update at its end
        ({"prefix_updates": 9}, 20, [19, 20]),
        ({"prefix_updates": 2, "suffix_updates": 2}, 3, [2, 3, 4, 6, 8, 9]),
        ({"update": "full"}, 4, [4, 8]),
        ({"update": "full"}, 1, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({}, 0, []),
    ],
)
def test_the_last_update_of_each_kind_is_shown(
    weights: Path, tmp_path: Path, method: dict[str, Any], every: int, shown: list[int]
) -> None:
    trainer = Trainer(make_config(weights, tmp_path / "run", **method))
    due = []
    for update in range(max(9, every)):
        trainer.update = update
        due += [update + 1] if trainer._due(every) else []
    trainer.update = 0
    assert not trainer._due(10**20)  # says so at once
    trainer.folder.close()
    assert due == shown


def test_pictures_and_norms_of_both_kinds(weights: Path, tmp_path: Path) -> None:
    run = {"updates": 4, "gallery_every": 4, "diagnose_every": 4}
    Trainer(make_config(weights, tmp_path / "run", prefix_updates=1, run=run)).run()
    lines = read_metrics(tmp_path / "run")
    assert [line["kind"] for line in lines if "gradient_norm_by_step" in line] == ["prefix", "suffix"]
    names = sorted(path.name for path in (tmp_path / "run" / "gallery").iterdir())
    assert names == ["update-000003.png", "update-000004.png"]


@pytest.mark.slow
@pytest.mark.parametrize("fold", [True, False])
def test_pictures_judge_as_the_reward_does(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fold: bool
) -> None:
    seen = []
    for name in ("save_gallery", "save_before_after"):
        inner = getattr(folder, name)

        def spy(*given: Any, inner: Any = inner, **named: Any) -> None:
            seen.append(named["fold"])
            inner(*given, **named)

        monkeypatch.setattr(folder, name, spy)
    run = {"updates": 1, "gallery_every": 1}
    config = make_config(weights, tmp_path / "run", update="full", run=run)
    reward = {"name": f"{__name__}:Read"} | ({} if fold else {"fold": False})
    evaluation = replace(config.evaluation, enabled=True, count=2)
    Trainer(replace(config, reward=reward, evaluation=evaluation)).run()
    assert seen == [fold, fold]


# --- Weights that are no numbers. ---


def test_a_short_run_whose_every_loss_is_not_finite_ends_with_an_error(weights: Path, tmp_path: Path) -> None:
    trainer = Trainer(make_config(weights, tmp_path / "run", run={"updates": 2}))
    trainer.policy.trainable.get_parameter("head.weight").data[0, 0] = torch.nan
    with pytest.raises(RunError, match="100% of the steps were not taken, as the loss or gradient was not finite"):
        trainer.run()
