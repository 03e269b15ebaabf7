"""Whole runs: stopped and gone on with, failing rewards, what is held and written, and input that is refused."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from varl import cli
from varl.config import (
    EvaluationConfig,
    MethodConfig,
    OptimizerConfig,
    PolicyConfig,
    PromptConfig,
    RunConfig,
    TrainConfig,
)
from varl.evaluation import held_out
from varl.models import load_policy
from varl.policy import Condition, Policy
from varl.run.metrics import read_metrics
from varl.run.state import collected
from varl.sampling import Sampling
from varl.trainer import Trainer


def make_config(weights: Path, out: Path, *, run: dict[str, Any] | None = None, **method: Any) -> TrainConfig:
    """A small run; 7 prompts, so that 3 an update do not fill whole epochs."""
    return TrainConfig(
        policy=PolicyConfig(weights=str(weights)),
        prompts=PromptConfig(count=7),
        reward="tiny_runs:noisy",
        sampling=Sampling(top_p=0.95),
        method=MethodConfig(
            **{"prompts": 3, "group": 4, **({} if method.get("update") == "full" else {"middle": "grid:6"}), **method}
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_from=1e-4, warmup_updates=4),
        evaluation=EvaluationConfig(enabled=False),
        run=RunConfig(
            **{"out": out, "updates": 6, "save_every": 3, "micro_batch": 7, "device": "cpu"}
            | {"gallery_every": 0, "diagnose_every": 2}
            | (run or {})
        ),
    )


def with_reward(config: TrainConfig, reward: str | dict[str, Any]) -> TrainConfig:
    return replace(config, reward=reward)


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.policy.trainable.state_dict().items()}


def assert_same(found: Any, expected: Any) -> None:
    """Bitwise equality of nested values."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


def metrics(out: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_metrics(out)]


def run_until(trainer: Trainer, update: int) -> None:
    """Train; the run is killed as soon as this update's metrics are written."""

    def progress(record: dict[str, Any]) -> None:
        if record["update"] == update:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.run(progress)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "killed_at"),
    [
        ("alternate", 5),
        *(pytest.param(kind, at, marks=pytest.mark.slow) for kind, at in (("full", 4), ("prefix", 2), ("suffix", 4))),
    ],
)
def test_a_killed_run_goes_on_to_the_same_numbers(weights: Path, tmp_path: Path, kind: str, killed_at: int) -> None:
    whole = Trainer(make_config(weights, tmp_path / "whole", update=kind))
    whole.run()

    run_until(Trainer(make_config(weights, tmp_path / "killed", update=kind)), killed_at)
    assert [line["update"] for line in metrics(tmp_path / "killed")] == list(range(1, killed_at + 1))
    torch.manual_seed(1)  # a run seeds the global generator that the reward draws from, or brings back its state
    second = Trainer(make_config(weights, tmp_path / "killed", update=kind))
    assert second.update == killed_at // 3 * 3
    second.run()

    lines = metrics(tmp_path / "whole")
    assert [line["update"] for line in lines] == [1, 2, 3, 4, 5, 6]
    kinds = ["prefix", "prefix", "prefix", "suffix", "prefix", "prefix"] if kind == "alternate" else [kind] * 6
    assert [line["kind"] for line in lines] == kinds
    assert_same(metrics(tmp_path / "killed"), lines)
    assert_same(weights_of(second), weights_of(whole))
    assert_same(collected(second), collected(whole))
    finished = load_policy("inkling", weights=tmp_path / "killed" / "weights.safetensors")
    assert_same(dict(finished.trainable.state_dict()), weights_of(whole))


@pytest.mark.slow
def test_a_run_goes_on_for_longer_and_survives_a_torn_checkpoint(weights: Path, tmp_path: Path) -> None:
    whole = Trainer(make_config(weights, tmp_path / "whole"))
    whole.run()
    Trainer(make_config(weights, tmp_path / "parts", run={"updates": 4, "save_every": 1})).run()
    checkpoints = sorted((tmp_path / "parts" / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["update-000003", "update-000004"]
    torn = next(checkpoints[-1].glob("*.safetensors"))
    torn.write_bytes(torn.read_bytes()[:1000])
    second = Trainer(make_config(weights, tmp_path / "parts"))
    assert second.update == 3
    assert [line["update"] for line in metrics(tmp_path / "parts")] == [1, 2, 3]
    second.run()
    assert_same(metrics(tmp_path / "parts"), metrics(tmp_path / "whole"))
    assert_same(weights_of(second), weights_of(whole))


def test_failing_rewards_drop_their_groups_and_the_run_goes_on(weights: Path, tmp_path: Path) -> None:
    config = make_config(weights, tmp_path / "run", update="prefix", run={"updates": 4})
    trainer = Trainer(with_reward(config, {"name": "tiny_runs:Failing", "raises": [1], "nans": [2]}))
    states = []
    trainer.run(lambda record: states.append(weights_of(trainer)))
    lines = metrics(tmp_path / "run")
    pictures = 3 * 4 * 2
    assert [line["failed_pictures"] for line in lines] == [0, pictures, 1, 0]
    assert [line["dropped_groups"] for line in lines] == pytest.approx([0, 1, 1 / 3, 0])
    assert [line["skipped"] for line in lines] == [0, 1, 0, 0]
    assert lines[1]["return"] is None
    assert lines[1]["reward"]["score"] is None
    assert all(isinstance(line["return"], float) for line in (lines[0], lines[2], lines[3]))
    assert_same(states[1], states[0])  # no sequence was left: momentum and weight decay alone move nothing
    assert not torch.equal(states[2]["head.weight"], states[1]["head.weight"])
    assert lines[2]["gradient_norm"] > 0
    assert trainer.reward.failures.total == pictures + 1  # type: ignore[attr-defined]


def test_a_dropped_group_has_no_say(weights: Path, tmp_path: Path) -> None:
    """The gradient is that of the other groups, over the same number of sequences."""
    learnt = []
    for out, nans in (("one", [0]), ("none", [])):
        config = make_config(weights, tmp_path / out, beta=0, run={"updates": 1})
        trainer = Trainer(with_reward(config, {"name": "tiny_runs:Failing", "nans": nans}))
        learn = trainer.learner.learn
        trainer.learner.learn = lambda *given, learn=learn: learnt.append(given[0]) or learn(*given)  # type: ignore
        trainer.step()
    one, none = learnt
    assert one.valid_B.tolist() == [False] * 4 + [True] * 8
    assert bool(none.valid_B.all())
    assert one.advantage_B[:4].tolist() == [0] * 4
    assert torch.equal(one.advantage_B[4:], none.advantage_B[4:])
    assert bool((none.advantage_B[:4] != 0).any())


def test_without_kl_no_reference_is_held(weights: Path, tmp_path: Path) -> None:
    trainer = Trainer(make_config(weights, tmp_path / "without", beta=0, run={"updates": 1}))
    assert trainer.reference is None
    trainer.run()
    assert "kl_by_step" not in metrics(tmp_path / "without")[0]
    checkpoint = trainer.folder.checkpoints.latest()
    assert checkpoint is not None
    assert {name.partition(".")[0] for name in checkpoint.names()} == {"policy", "optimizer", "rng0"}


def test_the_reference_stays_the_initial_policy(weights: Path, tmp_path: Path) -> None:
    trainer = Trainer(make_config(weights, tmp_path / "with", beta=0.1, run={"updates": 2}))
    start = weights_of(trainer)
    trainer.run()
    assert trainer.reference is not None
    assert_same(dict(trainer.reference.trainable.state_dict()), start)
    assert not torch.equal(weights_of(trainer)["head.weight"], start["head.weight"])
    assert not any(p.requires_grad for p in trainer.reference.trainable.parameters())
    assert metrics(tmp_path / "with")[0]["kl_by_step"] == pytest.approx([0] * 4, abs=1e-9)
    assert sum(metrics(tmp_path / "with")[1]["kl_by_step"]) > 0
    # All but the trained part is shared: a second tokenizer would be memory for nothing.
    policy, reference = (nn.Module.get_submodule(m, "tokenizer") for m in (trainer.policy, trainer.reference))  # type: ignore
    assert policy is reference
    finished = load_policy("inkling", weights=tmp_path / "with" / "weights.safetensors")
    first = load_policy("inkling", weights=weights)
    assert_same(dict(finished.tokenizer.state_dict()), dict(first.tokenizer.state_dict()))  # type: ignore[attr-defined]


def test_evaluations_are_drawn_in_parts(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    inner = held_out.rollout

    def counted(policy: Policy, condition: Condition, *rest: Any) -> Any:
        drawn.append(condition.batch)
        return inner(policy, condition, *rest)

    monkeypatch.setattr(held_out, "rollout", counted)
    config = make_config(weights, tmp_path / "run", run={"micro_batch": 4, "rollout_batch": 3})
    Trainer(replace(config, evaluation=EvaluationConfig(count=7))).evaluate()
    assert drawn == [3, 3, 1]


def test_what_a_run_leaves_behind(weights: Path, tmp_path: Path) -> None:
    """Evaluations before, between and after; pictures; a record with every stage's seconds; and where it all is."""
    out = tmp_path / "run"
    config = make_config(weights, out, run={"updates": 2, "gallery_every": 2})
    trainer = Trainer(replace(config, evaluation=EvaluationConfig(count=2, every=1)))
    trainer.run()
    assert sorted(p.name for p in (out / "evaluations").glob("*.json")) == [f"update-00000{i}.json" for i in range(3)]
    assert [p.name for p in (out / "gallery").iterdir()] == ["update-000002.png"]
    stages = {
        "condition",
        "rollout",
        "decode",
        "reference",
        "reward",
        "return",
        "mask",
        "logp",
        "backward",
        "optimizer",
    }
    assert all(set(line["seconds"]) == stages for line in read_metrics(out))
    assert [line["pictures"] for line in read_metrics(out)] == [24, 48]
    assert [len(line["loss_share_by_step"]) for line in read_metrics(out)] == [4, 4]
    assert len(read_metrics(out)[1]["gradient_norm_by_step"]) == 4
    assert (out / "tensorboard").is_dir()
    assert (out / "config.yaml").is_file()


# --- What is refused, before any work starts. ---


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def failed_command(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a command with bad input says; its exit code is 2."""
    try:
        code = cli.main(words)
    except SystemExit as exit:
        code = exit.code  # type: ignore[assignment]
    said = capsys.readouterr()
    assert code == 2
    assert "Traceback" not in said.err + said.out
    lines = [line for line in said.err.splitlines() if "error:" in line]
    assert len(lines) == 1, said.err
    return lines[0]


def recipe_of(weights: Path, tmp_path: Path) -> list[str]:
    text = f"""
policy: {{weights: {weights}}}
prompts: {{count: 7}}
reward: tiny_runs:score
method: {{prompts: 3, group: 4, middle: grid:6}}
evaluation: {{enabled: false}}
run: {{out: {tmp_path / "run"}, updates: 1, device: cpu, gallery_every: 0}}
"""
    return ["train", write(tmp_path / "recipe.yaml", text)]


REFUSED = {
    "a resolution that is no step": (["--method.middle", "pixels:40"], "the steps have 4, 8, 12, 24, 48"),
    "a grid that is no step": (["--method.middle", "grid:5"], "the steps have 1, 2, 3, 6, 12"),
    "a middle that is none": (["--method.middle", "half"], "not a middle step"),
    "a middle without suffix": (["--method.middle", "5"], "5 of 5 steps"),
    "too few prompts": (["--prompts.count", "2"], "an update needs 3 prompts, inkling:train has 2"),
    "unknown prompts": (["--prompts.source", "inkling:best"], "inkling:best"),
    "a missing prompt file": (["--prompts.source", "nowhere.txt"], "no prompt file nowhere.txt"),
    "missing weights": (["--policy.weights", "nowhere.safetensors"], "no Inkling weights at nowhere.safetensors"),
    "weights of another shape": (["--policy.config", '{"width": 64}'], "do not fit"),
    "an unknown family": (["--policy.family", "dall-e"], "no model family 'dall-e'; there are "),
    "an unknown setting of the family": (["--policy.config", '{"wdth": 64}'], "wdth"),
    "an unknown key": (["--method.grop", "3"], "method.grop"),
    "a wrong type": (["--method.group", "many"], "method.group"),
    "an unknown choice": (["--method.update", "sometimes"], "method.update"),
    "a value out of range": (["--method.group", "1"], "method.group must be at least 2"),
    "an unknown reward": (["--reward", "beauty"], "no reward 'beauty'"),
    "a reward that is not there": (["--reward", "nowhere:at_all"], "no module 'nowhere'"),
    "a reward without that name": (["--reward", "tiny_runs:scoer"], "has no attribute 'scoer'"),
    "missing held-out prompts": (
        ["--evaluation.enabled", "true", "--evaluation.source", "nowhere.txt"],
        "no prompt file nowhere.txt",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings_are_refused_before_work(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    words, expected = REFUSED[case]
    assert expected in failed_command(capsys, *recipe_of(weights, tmp_path), *words)
    assert not (tmp_path / "run").exists()


FILES = {
    "an empty prompt file": ("prompts.source", "prompts.txt", "\n \n", "holds no prompt"),
    "prompts that cannot be drawn": ("prompts.source", "prompts.txt", "a cat\n" * 3, "asks for no word"),
    "weights that are none": ("policy.weights", "weights.safetensors", "nothing", "not a whole safetensors file"),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_files_are_refused_before_work(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    key, name, text, expected = FILES[case]
    words = ["--evaluation.enabled", "true", f"--{key}", write(tmp_path / name, text)]
    assert expected in failed_command(capsys, *recipe_of(weights, tmp_path), *words)
    assert not (tmp_path / "run").exists()


UNUSABLE = {
    "more classes than there are": (["--sampling.top_k", "33"], "top_k"),
    "an exponent that is no number": (["--method.alpha", ".nan"], "alpha"),
    "a dilation below 0": (["--method.mask.dilation", "-1"], "dilation"),
    "a seed below 0": (["--run.seed", "-1"], "seed"),
    "a warm-up of negative length": (["--optimizer.warmup_updates", "-3"], "warmup_updates"),
    "held-out prompts that cannot be drawn": (
        ["--evaluation.enabled", "true", "--evaluation.source"],
        "asks for no word",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_settings_that_could_not_be_used_are_refused_before_work(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    words, expected = UNUSABLE[case]
    held_out = [write(tmp_path / "held.txt", "a cat\n")] if words[-1] == "--evaluation.source" else []
    words = [*words, *held_out]
    assert expected in failed_command(capsys, *recipe_of(weights, tmp_path), *words)
    assert not (tmp_path / "run").exists()


def test_bad_recipes_are_refused(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.yaml" in failed_command(capsys, "train", str(tmp_path / "nowhere.yaml"))
    out = f"run: {{out: {tmp_path / 'run'}}}\n"
    unknown = write(tmp_path / "unknown.yaml", out + "method: {grop: 3}\n")
    assert "grop" in failed_command(capsys, "train", unknown)
    wrong = write(tmp_path / "wrong.yaml", out + "optimizer: {learning_rate: fast}\n")
    assert "learning_rate" in failed_command(capsys, "train", wrong)
    assert "trian" in failed_command(capsys, "trian")
    assert "at least 2 prompts, got 1" in failed_command(capsys, "probe", "--count", "1")
    (tmp_path / "one.txt").write_text("the words 'KEBA' at the top\n")
    assert "at least 2 prompts, got 1" in failed_command(capsys, "doctor", "--source", str(tmp_path / "one.txt"))
    assert not (tmp_path / "run").exists()


def test_another_configuration_leaves_a_run_alone(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(weights, tmp_path)
    assert cli.main(recipe) == 0

    def files() -> dict[Path, str]:
        found = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}

    before = files()
    said = failed_command(capsys, *recipe, "--method.alpha", "0.9", "--run.updates", "3")
    assert "another configuration" in said
    assert "method.alpha was 0.6, is now 0.9" in said
    assert files() == before
    assert cli.main([*recipe, "--run.updates", "2"]) == 0
    assert [line["update"] for line in metrics(tmp_path / "run")] == [1, 2]
