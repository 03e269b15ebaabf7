"""What an update's record, stages and pictures are, to the letter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import varl.learner
from bits import Bits
from learning import batch, learner
from signatures import defaults
from test_trainer import make_config
from varl import updates
from varl.config import MaskConfig, MethodConfig
from varl.rewards import RewardOutput
from varl.schedule import ScaleSchedule
from varl.trainer import Trainer


def test_a_record() -> None:
    """Three groups of two: one with a failure, one without variance, and one that is learnt from."""
    method = MethodConfig(update="full", group=2)
    plan = updates.plan("full", method, ScaleSchedule.square([1, 2, 4]))
    nan = float("nan")
    score = torch.tensor([1.0, nan, 2.0, 2.0, 1.0, 5.0])
    parts = {"part": torch.tensor([4.0, nan, 1.0, 2.0, 3.0, 5.0]), "some": torch.tensor([nan, 9.0, 1.0, 2.0, nan, nan])}
    scores = RewardOutput(score, score.isnan(), parts=parts)
    found = updates.advantages(score.view(3, 2), ~scores.failed.view(3, 2), method)
    expected = {
        "kind": "full",
        "reward": {"score": 2.2, "part": 3.0, "some": 1.5},
        "failed_pictures": 1,
        "failed_share": 1 / 6,
        "return": 2.5,
        "group_std": 1.0,
        "zero_variance_groups": 1 / 3,
        "dropped_groups": 1 / 3,
        "advantage_abs": 2 / 6,
    }
    record = updates.record(plan, scores, score.view(3, 2), found)
    assert record.keys() == expected.keys()
    for name, value in expected.items():
        assert record[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5)), name


def test_a_record_of_nothing() -> None:
    method = MethodConfig(update="full", group=2)
    plan = updates.plan("full", method, ScaleSchedule.square([1, 2, 4]))
    scores = RewardOutput.failed_like(4)
    found = updates.advantages(torch.zeros(2, 2), ~scores.failed.view(2, 2), method)
    record = updates.record(plan, scores, torch.zeros(2, 2), found)
    assert record["reward"] == {"score": None}
    assert record["return"] is record["group_std"] is None
    assert (record["failed_pictures"], record["failed_share"], record["dropped_groups"]) == (4, 1.0, 1.0)


def test_the_stages_and_the_log_of_a_gradient_step() -> None:
    policy, reference, stages = Bits().double(), Bits(1).double(), list[str]()

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        stages.append(name)
        yield

    own = learner(policy, MethodConfig(beta=0.1), reference, micro_batch=8)
    log = own.learn(batch(policy), stage, diagnose=True)
    assert stages == ["reference", "backward", "logp", "backward", "optimizer"]
    assert log.keys() == {
        *("skipped", "not_finite", "loss", "gradient_norm", "gradient_norm_by_step", "log_ratio_by_step"),
        *("log_ratio_max", "clip_fraction", "loss_share_by_step", "entropy_by_step", "kl_by_step"),
        "masked_share_by_step",
    }


@pytest.mark.parametrize("masked", [True, False])
def test_the_pictures_that_are_shown(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, masked: bool
) -> None:
    """Those of the first four prompts' worth, each with the advantage and the mask of its own sequence."""
    config = make_config(
        weights,
        tmp_path / "run",
        update="prefix",
        mask=MaskConfig(enabled=masked),
        run={"updates": 1, "gallery_every": 1},
    )
    trainer, seen, learnt = Trainer(config), list[Any](), list[Any]()
    monkeypatch.setattr(trainer.folder, "gallery", lambda *given: seen.append(given))
    learn = trainer.learner.learn
    monkeypatch.setattr(trainer.learner, "learn", lambda *given: learnt.append(given[0]) or learn(*given))
    trainer.step()
    trainer.folder.close()
    (update, shown, images, output, advantage, mask, schedule), (made,) = seen[0], learnt
    assert update == 1
    assert len(shown) == len(images) == len(output.score) == 3 * 4 * 2
    assert shown[0] == shown[7] != shown[8]
    assert schedule is trainer.schedule
    assert torch.equal(advantage, made.advantage_B.repeat_interleave(2))
    if not masked:
        assert mask is made.mask_BL is None
    else:
        assert mask.shape == (24, schedule.tokens)
        assert torch.equal(mask[:, schedule.span(range(4))], made.mask_BL.repeat_interleave(2, 0))


DEFAULTS: dict[ModuleType, dict[str, dict[str, Any]]] = {
    updates: {
        "Plan": {"reuses": False},
        "draw": {"continued_by": None, "at_once": 0, "trained": None},
        "returns": {"sampling": None},
    },
    varl.learner: {
        "Batch": {
            "mask_BL": None,
            "rate": 1.0,
            "segment": "",
            "shared": 1,
            "reference_logp_BL": None,
            "total": None,
            "cancelled": False,
        },
        "Learner": {"distributed": None},
    },
}


@pytest.mark.parametrize("module", DEFAULTS, ids=lambda module: module.__name__)
def test_defaults(module: ModuleType) -> None:
    assert defaults(module) == DEFAULTS[module]
