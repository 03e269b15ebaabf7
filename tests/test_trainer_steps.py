"""What a step hands from one stage to the next, alone and as one of two processes; evaluations and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from test_trainer import make_config
from test_trainer_made import EVALUATED, spied
from test_trainer_made import weights as weights
from varl import trainer as module
from varl import updates
from varl.config import TrainConfig
from varl.distributed import Distributed
from varl.errors import RunError
from varl.learner import Batch
from varl.models.inkling import Inkling
from varl.policy import Prompt
from varl.rewards import RewardOutput
from varl.run import faults
from varl.trainer import Trainer


@pytest.fixture
def config(weights: Path, tmp_path: Path) -> TrainConfig:
    return with_method(make_config(weights, tmp_path / "run", run={"updates": 2}), middle="grid:3")


def with_method(config: TrainConfig, **method: Any) -> TrainConfig:
    return replace(config, reward="test_trainer_steps:double", method=replace(config.method, **method))


def double(images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput:
    """A number of each picture alone, in double precision, and no regions."""
    score = images.double().mean((1, 2, 3)) * 10
    return RewardOutput(score, torch.zeros(len(images), dtype=torch.bool))


def learnt(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The batches that the learner is given from now on."""
    batches: list[Batch] = []
    learn = trainer.learner.learn
    monkeypatch.setattr(trainer.learner, "learn", lambda *given: batches.append(given[0]) or learn(*given))
    return batches


class Half(Distributed):
    """One of two processes, as it is told what all have by a run of one process that did the same.

    Args:
        rank: which of the two.
        whole: what ``gather`` gave the whole run, in order, and the output that was gathered.
    """

    def __init__(self, rank: int, whole: list[Tensor], scores: RewardOutput) -> None:
        super().__init__()
        self.rank, self.size = rank, 2
        self.expected, self.scores, self.asked = list(whole), scores, list[str]()

    def place(self, *_: Any) -> None: ...

    def add_up(self, *_: Any) -> None: ...

    def gather_values(self, value: Any) -> list[Any]:
        return [value, value]

    def mine(self, rows: Tensor) -> Tensor:
        return rows[len(rows) // 2 * self.rank :][: len(rows) // 2]

    def gather(self, rows: Tensor, everywhere: bool = True) -> Tensor:
        whole = self.expected.pop(0)
        torch.testing.assert_close(rows, self.mine(whole), atol=1e-4, rtol=1e-4)
        return whole

    def gather_scores(self, output: RewardOutput) -> RewardOutput:
        self.asked.append("scores")
        torch.testing.assert_close(output.score, self.mine(self.scores.score), atol=1e-4, rtol=1e-4)
        return self.scores

    def alike(self, output: RewardOutput) -> RewardOutput:
        self.asked.append("alike")
        return super().alike(output)


@pytest.mark.parametrize(("kind", "beta"), [("prefix", 0.0), ("suffix", 0.1)])
def test_two_processes_learn_from_their_halves_of_what_one_learns(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, kind: str, beta: float
) -> None:
    config = with_method(config, update=kind, prompts=2, beta=beta)
    alone = Trainer(config)
    batches = learnt(alone, monkeypatch)
    gathered: list[Tensor] = []
    gather = alone.distributed.gather
    monkeypatch.setattr(alone.distributed, "gather", lambda rows: gathered.append(gather(rows)) or gathered[-1])
    scores = spied(monkeypatch, alone.distributed, "gather_scores")
    record = alone.step()
    alone.folder.close()
    (whole,) = batches
    assert len(gathered) == 2  # returns, and which are valid
    assert (whole.total, whole.segment, whole.shared) == (8, kind, 4 if kind == "suffix" else 1)
    assert whole.advantage_B.dtype == torch.float32
    assert (whole.reference_logp_BL is None) == (beta == 0)
    assert type(record["seconds"]) is dict
    for rank in (0, 1):
        half = Half(rank, gathered, scores[0][0][0])
        run = replace(config.run, out=config.run.out / str(rank), gallery_every=1)
        trainer = Trainer(replace(config, run=run), half)
        own = learnt(trainer, monkeypatch)
        shown: list[Any] = []
        monkeypatch.setattr(trainer, "_show", lambda *given, shown=shown: shown.append(given))
        found = trainer.step()
        trainer.folder.close()
        assert (half.asked, half.expected) == (["alike", "scores"], [])
        assert len(shown) == (rank == 0)  # by the main process, where both were to show theirs
        assert {name: found[name] for name in ("reward", "return", "pictures")} == {
            name: record[name] for name in ("reward", "return", "pictures")
        }
        (batch,) = own
        assert batch.total == 8
        assert torch.equal(batch.sequences.actions, half.mine(whole.sequences.actions))
        assert torch.equal(batch.advantage_B, half.mine(whole.advantage_B))
        assert torch.equal(batch.valid_B, half.mine(whole.valid_B))
        if whole.reference_logp_BL is not None:
            torch.testing.assert_close(batch.reference_logp_BL, half.mine(whole.reference_logp_BL))


def test_the_rate_of_a_suffix(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = replace(config.optimizer, suffix_scale=0.5, moments="segment")
    trainer = Trainer(replace(with_method(config, prefix_updates=1, beta=0), optimizer=optimizer))
    batches = learnt(trainer, monkeypatch)
    records = [trainer.step() for _ in range(2)]
    trainer.folder.close()
    assert [(batch.segment, batch.rate) for batch in batches] == [("prefix", 1.0), ("suffix", 0.5)]
    assert [record["update"] for record in records] == [1, 2]
    assert trainer.kept is None


@pytest.mark.parametrize("by", ["policy", "reference"])
@pytest.mark.parametrize(("rollout_batch", "overlap", "at_once"), [(0, False, 0), (5, True, 5), (0, True, 7)])
def test_who_draws_what_and_how_much_at_once(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, by: str, rollout_batch: int, overlap: bool, at_once: int
) -> None:
    """27 pictures are drawn in four parts where scoring overlaps, unless a number is given."""
    config = with_method(config, update="prefix", group=3, continuations=3, continuations_by=by)
    run = replace(config.run, seed=6, rollout_batch=rollout_batch, overlap=overlap)
    trainer = Trainer(replace(config, run=run))
    trainer.update = 4
    plan, sentinel = updates.plan("prefix", trainer.config.method, trainer.schedule), ZeroDivisionError()

    def stop(*_: Any) -> Any:
        raise sentinel

    drawn = spied(monkeypatch, updates, "draw", stop)
    gathered = spied(monkeypatch, trainer.distributed, "gathered")
    conditions = spied(monkeypatch, Inkling, "condition")
    points: list[str] = []
    with faults.armed(points.append), pytest.raises(ZeroDivisionError):
        trainer._sample(plan, range(9))
    trainer.folder.close()
    policy, reference = trainer.policy, trainer.reference
    by_reference = by == "reference"
    assert gathered == [((policy, reference)[: 1 + by_reference], {"stage": trainer.stage})]
    ((_, prompts, schedule), _), *_ = conditions
    assert (len(prompts), schedule) == (3, trainer.schedule)
    ((given, _),) = drawn
    assert given[0] is policy
    assert given[2:7] == (plan, config.sampling, (6, 4), reference if by_reference else None, at_once)
    assert given[8] == range(9)
    assert points == ["condition", "rollout"]


def test_rows_that_share_a_prefix_are_told_to_the_reference_and_to_what_measures(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_method(config, update="suffix", beta=0.1)
    trainer = Trainer(replace(config, run=replace(config.run, micro_batch="auto")))
    measured = spied(monkeypatch, module, "fastest_micro_batch", lambda *_: 3)
    referred = spied(monkeypatch, trainer.learner, "reference_logp")
    points: list[str] = []
    with faults.armed(points.append):
        trainer.step()
    trainer.folder.close()
    (((_, sequences, *rest), _),) = measured
    assert rest == [range(3, 4), 4]
    assert [given for given, _ in referred] == [(sequences, range(3, 4), 4)]
    assert trainer.learner.micro_batch == 3
    first = ["condition", "rollout", "decode", "measuring", "reference", "reward", "return", "mask"]
    points.remove("file micro_batches.json")
    assert points[: len(first)] == first
    assert set(points[len(first) :]) == {"logp", "backward", "optimizer"}


def test_reused_sequences_have_their_own_reference(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_method(config, prompts=1, prefix_updates=1, suffix_state="reused", beta=0.1)
    trainer = Trainer(config)
    batches = learnt(trainer, monkeypatch)
    trainer.step()
    assert trainer.kept is not None
    points: list[str] = []
    with faults.armed(points.append):
        trainer.step()
    trainer.folder.close()
    assert points[:3] == ["reference", "return", "mask"]
    suffix = batches[1]
    expected = trainer.learner.reference_logp(suffix.sequences, suffix.steps, 2)
    torch.testing.assert_close(suffix.reference_logp_BL, expected)
    assert suffix.shared == 2


# --- Evaluations and checkpoints. ---


@pytest.fixture
def evaluated(config: TrainConfig) -> Iterator[Trainer]:
    trainer = Trainer(replace(config, evaluation=EVALUATED, run=replace(config.run, rollout_batch=3)))
    yield trainer
    trainer.folder.close()


def test_an_evaluation(evaluated: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own settings; the best is the first with the highest first metric, and is exported."""
    scores = iter([1.0, 1.0, 2.0, 1.5])

    def result(*_: Any, **__: Any) -> Any:
        values = {"first": next(scores), "second": 0.0}
        metrics = list(values)
        return SimpleNamespace(metrics=metrics, estimate=lambda name: SimpleNamespace(value=values[name]))

    asked = spied(monkeypatch, module, "evaluate", result)
    noted = spied(monkeypatch, evaluated.folder, "evaluation", lambda *_: None)
    exported = spied(monkeypatch, evaluated.folder, "export", lambda *_: None)
    points, best = list[str](), list[Any]()
    evaluated.pictures = 70
    with faults.armed(points.append):
        for update in range(4):
            evaluated.update = update
            result_of = evaluated.evaluate()
            best.append(evaluated.best)
            assert evaluated.evaluated == update
            assert noted[-1][0] == (update, 70, result_of, EVALUATED.alarm_window)
    assert best == [(0, 1.0), (0, 1.0), (2, 2.0), (2, 2.0)]
    assert [given[0] for given, _ in exported] == ["best.safetensors"] * 2
    assert points == ["evaluation", "evaluated"] * 4
    given, named = asked[0]
    assert given == (evaluated.policy, evaluated.held_out, EVALUATED.sampling, evaluated.reward)
    precision = named.pop("precision")
    assert isinstance(precision, torch.autocast)
    assert named == {"seed": 5, "batch": 3, "schedule": evaluated.schedule, "distributed": evaluated.distributed}


def test_an_evaluation_is_drawn_as_the_run_draws_unless_told_otherwise(
    evaluated: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise MemoryError("full")

    asked = spied(monkeypatch, module, "evaluate", full)
    seeds = spied(monkeypatch, module.state, "own_generators")
    evaluated.config = replace(evaluated.config, evaluation=replace(EVALUATED, sampling=None))
    with pytest.raises(RunError, match=r"full\); decode fewer pictures at once: lower run.micro_batch; a run of"):
        evaluated.evaluate()
    assert asked[0][0][2] == evaluated.config.sampling
    assert seeds == [((5,), {})]


@pytest.mark.parametrize(
    ("size", "kept", "update", "owed"),
    [(2, True, 3, True), (1, True, 3, False), (2, False, 3, False), (2, True, 2, False)],
)
def test_a_checkpoint_waits_for_what_the_next_update_reuses(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, size: int, kept: bool, update: int, owed: bool
) -> None:
    trainer = Trainer(config)
    saved = spied(monkeypatch, trainer.folder.checkpoints, "save", lambda *_: None)
    monkeypatch.setattr(module.state, "collected", lambda _: ("tensors", "values"))
    trainer.distributed.size = size
    trainer.kept = "what was drawn" if kept else None  # type: ignore[assignment]
    trainer.update = update
    trainer.save()
    trainer.best = (1, 0.5)
    trainer.save()
    trainer.distributed.size = 1
    trainer.folder.close()
    assert trainer.owed is owed
    expected = [((update, "tensors", "values", best), {}) for best in (None, 1)]
    assert saved == ([] if owed else expected)
