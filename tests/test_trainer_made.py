"""What a trainer is made of, and what it hands on: every argument, to the letter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny_runs
import varl.clock
from test_trainer import assert_same, make_config, weights_of
from varl import trainer as module
from varl import updates
from varl.config import AdapterConfig, EvaluationConfig, TrainConfig
from varl.distributed import Distributed
from varl.ending import OUTLIVED_S
from varl.errors import RunError
from varl.models.inkling import Inkling, InklingConfig
from varl.prompts import PromptStream
from varl.run import faults, state
from varl.sampling import Sampling
from varl.sizing import FIRST
from varl.trainer import Trainer

SHAPE = InklingConfig(**(tiny_runs.SHAPE | {"grids": [1, 2, 3, 6], "width": 16, "depth": 1}))
EVALUATED = EvaluationConfig(count=2, seed=5, prompt_seed=4, sampling=Sampling(top_k=3), alarm_window=2)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.tiny_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors", SHAPE)


@pytest.fixture
def config(weights: Path, tmp_path: Path) -> TrainConfig:
    made = make_config(weights, tmp_path / "run", middle="grid:3", run={"updates": 1})
    return replace(made, reward="tiny_runs:without_regions")


@pytest.fixture
def made(config: TrainConfig) -> Iterator[Trainer]:
    trainer = Trainer(config)
    yield trainer
    trainer.folder.close()


def spied(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, inner: Callable[..., Any] | None = None) -> list[Any]:
    """The arguments of every call of a function, which still does what it did, or ``inner``."""
    seen, does = [], inner or getattr(owner, name)

    def spy(*given: Any, **named: Any) -> Any:
        seen.append((given, named))
        return does(*given, **named)

    monkeypatch.setattr(owner, name, spy)
    return seen


def test_what_is_read_and_checked(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and held-out prompts, each by its own settings; both are checked by the reward and the policy."""
    names = ("resolve_prompts", "check_reward", "check_prompts", "FailureWindow", "Average")
    seen = {name: spied(monkeypatch, module, name) for name in names}
    plans = spied(monkeypatch, updates, "plan")
    schedules = spied(monkeypatch, Inkling, "schedules", lambda self, *_: self.default_schedule)
    threads = spied(monkeypatch, torch, "set_num_threads", lambda _: None)
    prompts = replace(config.prompts, source="inkling:train", seed=3, count=20, region_counts={2: 0.5, 3: 0.5})
    policy = replace(config.policy, resolution=24, aspect_ratio=1.0)
    run = replace(config.run, threads=2, ema=0.75, failure_window=7, max_failed_share=0.25)
    trainer = Trainer(replace(config, prompts=prompts, policy=policy, evaluation=EVALUATED, run=run))
    trainer.folder.close()
    assert threads == [((2,), {})]
    assert [given[1:] for given, _ in schedules] == [(24, 1.0)]
    assert [given[0] for given, _ in plans] == ["prefix", "suffix"]
    assert seen["resolve_prompts"] == [
        (("inkling:train",), {"count": 20, "seed": 3, "region_counts": {2: 0.5, 3: 0.5}}),
        (("inkling:held-out",), {"count": 2, "seed": 4}),
    ]
    own, held_out = trainer.stream.prompts, trainer.held_out
    assert len(held_out) == 2
    assert seen["check_reward"] == [
        ((trainer.reward, own, "inkling:train"), {}),
        ((trainer.reward, held_out, "inkling:held-out"), {}),
    ]
    assert [given[1:] for given, _ in seen["check_prompts"]] == [(own, trainer.schedule), (held_out, trainer.schedule)]
    assert seen["FailureWindow"] == [((7, 0.25), {})]
    assert [given for given, _ in seen["Average"]] == [(trainer.policy.trainable, 0.75)]
    expected = PromptStream(own, seed=3)
    assert trainer.stream.next(7) == expected.next(7) != PromptStream(own, seed=0).next(7)


def test_what_a_trainer_begins_with(made: Trainer, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (made.update, made.pictures, made.evaluated, made.best) == (0, 0, None, None)
    assert (made.owed, made.kept, made.ema, made._pool) == (False, None, None, None)
    assert made.held_out == []
    assert made.learner.micro_batch == 7
    assert made.learner.distributed is made.distributed
    assert made.distributed.config is config.parallel
    assert made.fingerprint == state.fingerprint(made.policy)  # type: ignore[arg-type]
    assert made.reference is not None
    assert made._models == [made.policy, made.reference]


@pytest.mark.parametrize(("size", "patience"), [(1, 0.0), (3, OUTLIVED_S)])
def test_the_processes_that_are_given(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, size: int, patience: float
) -> None:
    given = Distributed()
    given.size = size
    placed = spied(monkeypatch, given, "place", lambda *_: None)
    shares = spied(monkeypatch, given, "share")
    monkeypatch.setattr(given, "gather_values", lambda value: [value] * size)
    threads = spied(monkeypatch, torch, "set_num_threads", lambda _: None)
    folders = spied(monkeypatch, module, "RunFolder")
    run = replace(config.run, micro_batch="auto", overlap=True)
    trainer = Trainer(replace(config, run=run, method=replace(config.method, update="prefix", continuations=3)), given)
    trainer.folder.close()
    assert trainer.distributed is trainer.learner.distributed is given
    assert [models for models, _ in placed] == [(model, "float32") for model in (trainer.policy, trainer.reference)]
    assert shares == [((12,), {})]
    assert [made for made, _ in folders] == [(trainer.config, True, patience)]
    assert trainer.learner.micro_batch == FIRST
    assert trainer._pool is not None
    assert trainer._pool._max_workers == 1  # parts are scored one after another
    assert threads == []


def test_a_run_is_seeded(config: TrainConfig) -> None:
    states = []
    for before, seed in ((1, 4), (2, 4), (1, 5)):
        torch.manual_seed(before)
        run = replace(config.run, seed=seed, out=config.run.out / f"{before}-{seed}")
        Trainer(replace(config, run=run)).folder.close()
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_what_does_not_fit_is_refused_and_what_just_fits_is_not(config: TrainConfig) -> None:
    prompts = replace(config.prompts, count=3)
    sampling = Sampling(top_k=32)
    fits = replace(config, prompts=prompts, sampling=sampling, evaluation=replace(EVALUATED, sampling=sampling))
    Trainer(fits).folder.close()
    for changes, name in (
        ({"sampling": Sampling(top_k=33)}, "sampling"),
        ({"evaluation": replace(EVALUATED, sampling=Sampling(top_k=33))}, "evaluation.sampling"),
    ):
        with pytest.raises(ValueError, match=f"^{name}.top_k is 33; there are only 32 classes$"):
            Trainer(replace(config, **changes))
    with pytest.raises(ValueError, match=r"^an update needs 3 prompts, inkling:train has 2$"):
        Trainer(replace(config, prompts=replace(prompts, count=2)))


def test_a_trainer_that_cannot_resume_lets_go_of_its_folder(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Trainer) -> None:
        raise ZeroDivisionError

    closed = spied(monkeypatch, module.RunFolder, "close")
    monkeypatch.setattr(Trainer, "_resume", broken)
    with pytest.raises(ZeroDivisionError):
        Trainer(config)
    assert len(closed) == 1


def test_a_run_is_gone_on_with(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, evaluation=EVALUATED, method=replace(config.method, update="full", middle="quarter"))
    began = spied(monkeypatch, module.RunFolder, "begin")
    first = Trainer(config)
    first.run()
    second = Trainer(replace(config, run=replace(config.run, updates=2)))
    assert [given[1:] for given, _ in began] == [(0, first.held_out), (1, second.held_out)]
    assert (second.update, second.pictures, second.best) == (1, 12, first.best)
    assert_same(weights_of(second), weights_of(first))
    second.folder.close()
    # Not from other weights than it began with.
    other = tiny_runs.tiny_weights(config.run.out.parent / "other.safetensors", replace(SHAPE, codes=16))
    with pytest.raises(ValueError, match="holds a run with another configuration"):
        Trainer(replace(config, policy=replace(config.policy, weights=str(other))))


def test_adapters_and_averages_are_what_is_exported(config: TrainConfig) -> None:
    """A rank of 1 is adapters; the files hold the average of the steps, whole and as adapters alone."""
    lora = AdapterConfig(rank=1)
    trained = replace(
        config,
        policy=replace(config.policy, lora=lora),
        run=replace(config.run, ema=0.5),
        optimizer=replace(config.optimizer, learning_rate=0.1, warmup_updates=0, warmup_from=1e-6),
        method=replace(config.method, update="full", middle="quarter"),
    )
    trainer, points = Trainer(trained), list[str]()
    assert trainer._models == [trainer.policy]
    before = {name: p.detach().clone() for name, p in trainer.policy.trainable.named_parameters() if p.requires_grad}
    trainer.step()
    with faults.armed(points.append):
        trainer.finish()
    trainer.folder.close()
    assert points[0] == "finish"
    now = dict(trainer.policy.trainable.named_parameters())
    mean = {name: (value + now[name].detach()) / 2 for name, value in before.items()}
    assert any(not torch.equal(mean[name], value) for name, value in before.items())
    out = config.run.out
    again = Trainer(
        replace(
            trained,
            policy=replace(config.policy, adapters=str(out / "adapters.safetensors")),
            run=replace(trained.run, out=out.parent / "again"),
        )
    )
    again.folder.close()
    assert again.lora
    assert again.config.policy.lora.rank == 1
    found = dict(again.policy.trainable.named_parameters())
    for name, value in mean.items():
        torch.testing.assert_close(found[name].detach(), value)
    policy = replace(config.policy, weights=str(out / "weights.safetensors"))
    whole = Trainer(replace(config, policy=policy, run=replace(config.run, out=out.parent / "whole")))
    whole.folder.close()
    assert not whole.lora
    actions = torch.zeros(2, whole.schedule.tokens, dtype=torch.long)
    prompts = [prompt for _, prompt in whole.stream.next(2)]
    logits = []
    for policy in (whole.policy, again.policy):
        with torch.no_grad():
            logits.append(policy.logits(policy.hidden(policy.condition(prompts), actions, range(3))))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)


# --- Memory, time and precision. ---

ANEW = "a run of other settings needs another --run.out"
REMEDIES = {
    "rollout": f"draw fewer pictures at once: lower run.rollout_batch (0 draws all of an update at once); {ANEW}",
    "decode": f"decode fewer pictures at once: lower run.micro_batch; {ANEW}",
    "logp": f"learn from fewer sequences at once: lower run.micro_batch, or set policy.checkpointing; {ANEW}",
}


@pytest.mark.parametrize("name", REMEDIES)
def test_what_is_said_where_memory_runs_out(made: Trainer, name: str) -> None:
    with pytest.raises(RunError) as raised, made.stage(name):
        raise MemoryError("full")
    assert str(raised.value) == f"out of memory (full); {REMEDIES[name]}"


def test_the_time_of_stages(made: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages inside a stage count for themselves, however deep, and each adds to what it took before."""
    clock, points = [100.0], list[str]()

    def wait(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(varl.clock, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    made.clock.seconds()
    with faults.armed(points.append):
        for _ in range(2):
            with made.stage("a"):
                wait(1)
                with made.stage("b"):
                    wait(2)
                    with made.stage("c"):
                        wait(4)
                wait(8)
                with made.stage("b"):
                    wait(16)
    assert made.clock.seconds() == {"a": 18.0, "b": 36.0, "c": 8.0}
    assert made.clock.seconds() == {}
    assert points == ["a", "b", "c", "b"] * 2


def test_the_precision(made: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spied(monkeypatch, module, "autocast")
    made.precision()
    monkeypatch.setattr(Distributed, "sharded", True)
    made.precision(drawing=True)
    policy = made.config.policy
    assert seen == [((policy, made.device, False, True), {}), ((policy, made.device, True, False), {})]


def test_pictures_are_decoded_in_parts_to_full_precision(made: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    actions = torch.zeros(9, made.schedule.tokens, dtype=torch.long)
    actions[8] = 1
    whole = made._decode(actions)
    decode = Inkling.decode
    seen = spied(monkeypatch, Inkling, "decode", lambda self, part, schedule: decode(self, part, schedule).bfloat16())
    found = made._decode(actions)
    assert [(len(part), schedule) for (_, part, schedule), _ in seen] == [(7, made.schedule), (2, made.schedule)]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, whole, atol=0.01, rtol=0)


# --- Groups of prefixes, warnings. ---


def test_sequences_that_share_a_prefix(made: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a suffix group; where a group is spread over processes, as many as every process surely has."""
    prefix, suffix = (updates.plan(kind, made.config.method, made.schedule) for kind in ("prefix", "suffix"))  # type: ignore
    assert (made._shared(prefix), made._shared(suffix)) == (1, 4)
    asked = spied(monkeypatch, made.distributed, "share", lambda rows: range(rows // 2))
    assert (made._shared(prefix), made._shared(suffix)) == (1, 2)
    assert asked == [((12,), {})]


def test_what_is_shown_is_of_four_prompts(made: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = updates.plan("prefix", made.config.method, made.schedule)
    count = 5 * plan.pictures  # eight a prompt, two a trained sequence
    images, shown = torch.arange(count), [str(i) for i in range(count)]
    sampled: Any = SimpleNamespace(images=images, shown=shown, output="scores")
    seen: list[Any] = []
    monkeypatch.setattr(made.folder, "gallery", lambda *given: seen.append(given))
    advantage, mask = torch.arange(20.0), torch.arange(20) * 2
    made._show(sampled, plan, advantage, mask)
    made._show(sampled, plan, advantage, None)
    first = torch.arange(32) // 2
    for given, own in zip(seen, (mask, None), strict=True):
        update, prompts, pictures, output, advantages_of, masks, schedule = given
        assert (update, prompts, output, schedule) == (0, shown[:32], "scores", made.schedule)
        assert torch.equal(pictures, images[:32])
        assert torch.equal(advantages_of, advantage[first])
        assert masks is None if own is None else torch.equal(masks, own[first])


def test_what_is_placed_on_the_processes(weights: Path, tmp_path: Path) -> None:
    """The policy, and its reference where that has weights of its own."""
    for out, beta, models in (("with", 0.1, 2), ("without", 0.0, 1)):
        trainer = Trainer(make_config(weights, tmp_path / out, beta=beta, middle="grid:3"))
        trainer.folder.close()
        assert trainer._models == [trainer.policy, trainer.reference][:models]
